"""One idea of a line: characters at which `splitlines` splits, but no file, do no harm anywhere."""

import argparse
import json
import shutil

import pytest
import tiny

from cozyrag.commands import audit
from cozyrag.errors import InputError
from cozyrag.pipeline import CozyRAG
from cozyrag.reporting.compare import as_text, compare
from cozyrag.reporting.html_report import report
from cozyrag.reporting.run_reader import FinishedRun
from cozyrag.run import train
from cozyrag.runtime.atomic_files import write_jsonl
from cozyrag.runtime.json_lines import read_json_lines

SPLITTING = [chr(number) for number in range(0x3000) if len(f"a{chr(number)}b".splitlines()) > 1]


def test_these_are_the_characters():
    assert set("\v\f\x1c\x1d\x1e\x85\u2028\u2029") < set(SPLITTING)


@pytest.mark.parametrize("character", SPLITTING, ids=lambda character: f"U+{ord(character):04X}")
def test_a_row_is_one_line_for_everybody(character, tmp_path):
    rows = [{"text": f"before{character}after{character}", character: [character]}, {"text": "next"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
    assert len((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    older = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # as earlier versions wrote it
    (tmp_path / "older.jsonl").write_text(older, encoding="utf-8")
    assert read_json_lines(tmp_path / "older.jsonl") == rows


@pytest.mark.parametrize(
    ("content", "line"),
    [(b'{"a": 1}\n{"a"', 2), (b'{"a": 1}\n\n{}\n', 2), (b"[1]\n", 1), (b"\0\0\n", 1), (b"\xff\n", 1), (b"[" * 9999, 1)],
    ids=["cut", "blank", "list", "zeros", "no UTF-8", "deep"],
)  # fmt: skip
def test_a_line_that_is_none_is_named(content, line, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"rows.jsonl, line {line}: expected a JSON object") as refused:
        read_json_lines(tmp_path / "rows.jsonl")
    assert len(str(refused.value)) < 600


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"")
    assert read_json_lines(tmp_path / "rows.jsonl") == []


def odd(text: str, number: int) -> str:
    """The text with one of the characters between its words."""
    return text.replace(" ", f" {SPLITTING[number % len(SPLITTING)]}", 2)


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory, short_run):
    """A run whose passages, titles, questions and answers hold all of these characters."""
    folder = tmp_path_factory.mktemp("odd")
    passages, questions = tiny.corpus()
    for number, row in enumerate(passages):
        row |= {"title": odd(row["title"], number), "text": odd(row["text"], number)}
    for number, row in enumerate(questions):
        row |= {"question": odd(row["question"], number), "answers": [odd(f"{row['answers'][0]} it is", number)]}
    files = {"questions": questions[:64], "eval_questions": questions[64:], "passages": passages}
    given = list(short_run)
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        given[given.index(f"--{name}") + 1] = str(path)
    given = [*given, "--output_dir", str(folder / "out")]
    for name in ("generator", "retriever"):
        given[given.index(f"--{name}_steps") + 1] = "1"
    train(given)
    return given, folder / "out"


@pytest.mark.slow
def test_a_run_with_such_texts_finishes_resumes_and_reports(odd_run, capsys):
    given, folder = odd_run
    texts = json.dumps([vars(CozyRAG.from_pretrained(folder).index.passages)["texts"][number] for number in range(40)])
    assert all(json.dumps(each)[1:-1] in texts for each in SPLITTING if each not in "\r\n")
    given[given.index("--rounds") + 1] = "2"
    train([*given, "--resume"])
    run = FinishedRun.read(folder)
    assert set(run.evaluated) == {0, 1, 2} and len(run.evaluated[2]) == 16
    audit.main([str(folder)], argparse.ArgumentParser())
    shutil.copytree(folder, folder.with_name("copy"))
    assert as_text(compare(folder, folder.with_name("copy")))
    assert report(folder, latency=0).stat().st_size > 10_000
