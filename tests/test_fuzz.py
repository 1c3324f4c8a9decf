"""Broken inputs raise an InputError, never another exception, and no row is lost silently (see fuzz_run.py)."""

import time

import fuzz_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cozyrag.config import parse_settings
from cozyrag.data.documents import InputSource, read_container, read_document
from cozyrag.data.passages import read_passages
from cozyrag.data.questions import read_questions
from cozyrag.data.rows import BadRows
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import encode_prompts


@pytest.mark.parametrize("name", fuzz_run.READERS)
def test_drawn_inputs_are_read_or_refused(name, tmp_path):
    pytest.importorskip({"html": "trafilatura", "docx": "pypandoc", "pdf": "pypdf"}.get(name, "json"))
    # The parser of settings is slow, and each file of Word starts a process.
    fuzz_run.fuzz(name, {"yaml": 15, "docx": 10, "html": 40}.get(name, 60), tmp_path, same=True)


# ---- faults that it has found


def test_answers_nested_too_deeply_are_a_bad_row(tmp_path):
    rows = ['{"question": "Who?", "answers": ["Ada"]}', f'{{"question": "Who?", "answers": {"[" * 700}{"]" * 700}}}']
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    read = read_questions(str(tmp_path / "q.jsonl"), skip_bad_rows=True)
    assert len(read.table) == 1 and "line 2: answers is nested too deeply" in read.report


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2**62], pa.int64()).view(pa.timestamp("us")),  # a year beyond the range of Python
        pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff\xfe"], pa.binary()).buffers()),
    ],
    ids=["time", "bytes"],
)
def test_a_parquet_cell_that_python_cannot_hold_is_a_bad_row(tmp_path, column):
    pq.write_table(
        pa.Table.from_arrays([pa.array(["A.", "B."]), column], names=["text", "more"]), tmp_path / "p.parquet"
    )
    table, report = read_passages(str(tmp_path / "p.parquet"), skip_bad_rows=True)
    assert table["text"][:] == ["A."] and "p.parquet, row 2: cannot be read (" in report


def test_a_repeated_parquet_column_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["A."]), pa.array(["B."])], names=["text", "text"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(InputError, match='found "text" more than once'):
        read_passages(str(tmp_path / "p.parquet"))


def test_a_message_about_a_lone_surrogate_can_be_printed(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"\\ud800": "A."}')
    with pytest.raises(InputError, match=r'found "\\ud800"') as refused:
        read_passages(str(tmp_path / "p.jsonl"))
    str(refused.value).encode("utf-8")
    bad = BadRows()
    bad.add("p.jsonl, line 1", "found \ud800")
    bad.first[0].encode("utf-8")


@pytest.mark.parametrize(
    "encoding", ["undefined", "unicode_escape", "base64", "no-such", "utf-7", "punycode", "utf-16"]
)
def test_a_web_page_with_a_label_that_is_no_encoding_is_detected(tmp_path, encoding):
    pytest.importorskip("trafilatura")
    (tmp_path / "page.html").write_text(f'<meta charset="{encoding}"><p>caf\u00e9 \\ud800</p>', encoding="utf-8")
    assert read_document(InputSource(str(tmp_path / "page.html"), "html")).sections == [((), "caf\u00e9 \\ud800")]


def test_a_long_line_that_nearly_opens_an_article_is_fast(tmp_path):
    (tmp_path / "wiki_00").write_text("<doc " + 'title="' * 40_000)
    started, bad = time.process_time(), BadRows()
    assert (
        list(read_container(InputSource(str(tmp_path / "wiki_00"), "wikiextractor"), bad=bad)) == [] and bad.count == 1
    )
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("report_to: " + "[" * 600, "not valid YAML"),
        ("? [rounds]\n: 1\n", "line 1: expected the name of a setting, found a sequence"),
        ("save_minutes: inf\n", "save_minutes: expected a finite number, found inf"),
    ],
    ids=["nested", "key", "infinite"],
)
def test_impossible_settings_are_refused(tmp_path, text, found):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=found):
        parse_settings(["--config", str(tmp_path / "s.yaml")])


def test_a_context_without_a_budget_is_left_out(generator_path):
    tokenizer = Generator.load(str(generator_path)).tokenizer
    given = {"questions": ["Who?"], "contexts": ["The fox is red."], "max_length": 100, "reserve": 1}
    assert encode_prompts(tokenizer, context_tokens=-1, **given) == encode_prompts(tokenizer, context_tokens=0, **given)
