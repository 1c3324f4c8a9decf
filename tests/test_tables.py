"""Rows of every format, and the errors of broken sources: file, line, remedy."""

import bz2
import csv
import gzip
import json
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.data.readers import is_hub_id, read_rows
from cozyrag.data.rows import SHOWN, BadRows, BadValue, text_of
from cozyrag.errors import InputError

TWO = [{"question": "who?", "answer": "Ada"}, {"question": "wann?", "answer": "früh"}]
KNOWN = ("question", "answer", "answers", "id")


def write(path, content):
    raw = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def read(source, **options):
    options = {"known": KNOWN, "headerless": lambda _: ("question", "answer")} | options
    return list(read_rows(source, **options))


def parquet(rows):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue().to_pybytes()


CONTENTS = {
    "tsv": "question\tanswer\nwho?\tAda\nwann?\tfrüh\n",
    "csv": 'question,answer\nwho?,Ada\n"wann?","früh"\n',
    "jsonl": "".join(json.dumps(row) + "\n" for row in TWO),
    "ndjson": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in TWO),
    "json": json.dumps(TWO, indent=1),
    "parquet": parquet(TWO),
}


@pytest.mark.parametrize("extension", CONTENTS)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path, extension, ending):
    rows = read(write(tmp_path / f"a.{extension}{ending}", CONTENTS[extension]))
    assert [row.values for row in rows] == TWO


@pytest.mark.parametrize(
    ("name", "content", "wheres"),
    [
        ("a.tsv", "who?\tAda\n\nwhen?\tnow\n", ["line 1", "line 3"]),
        ("a.csv", 'question,answer\n"two\nlines",x\nlast,y\n', ["line 2", "line 4"]),
        ("a.jsonl", '\n{"a": 1}\n\n{"a": 2}', ["line 2", "line 4"]),
        ("a.json", '[{"a": 1},\n\n{"a": 2}]', ["row 1", "row 2"]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', ["line 1", "line 2"]),
        ("a.json", '{\n"a": 1}', ["row 1"]),
    ],
)
def test_rows_know_their_place(tmp_path, name, content, wheres):
    source = write(tmp_path / name, content)
    assert [row.where for row in read(source)] == [f"{source}, {where}" for where in wheres]


def test_squad_layout_is_flattened(tmp_path):
    qas = [
        {"id": "x", "question": "q1", "answers": [{"text": "a", "answer_start": 0}]},
        {"id": "y", "question": "q2", "answers": [], "is_impossible": True},
    ]
    data = [{"title": "T", "paragraphs": [{"context": "c0", "qas": []}, {"context": "c1", "qas": qas}]}]
    source = write(tmp_path / "squad.json", json.dumps({"version": "1.1", "data": data}))
    first, second = read(source)
    assert first.where == f"{source}, data[0].paragraphs[1].qas[0]"
    assert first.values == {"id": "x", "question": "q1", "answers": qas[0]["answers"], "title": "T", "context": "c1"}
    assert second.values["answers"] == []


@pytest.mark.parametrize(
    ("data", "place"),
    [(["x"], "data[0]"), ([{"paragraphs": [{"context": "c"}]}], "data[0].paragraphs[0]")],
)
def test_broken_squad_layout(tmp_path, data, place):
    source = write(tmp_path / "squad.json", json.dumps({"data": data}))
    with pytest.raises(InputError, match="expected the SQuAD layout") as error:
        read(source)
    assert f"{source}, {place}:" in str(error.value)
    assert ".jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("first", "header"),
    [
        ("question\tanswer", True),
        (" Question \tANSWER", True),
        ("id\tnote", True),
        ("nr\tquestion\tanswer", True),
        ("what?\tanswer", False),
        ("what?\t42", False),
    ],
)
def test_tsv_header_is_recognised(tmp_path, first, header):
    source = write(tmp_path / "a.tsv", first + "\n")
    assert len(read(source, bad=BadRows())) == (0 if header else 1)


def test_header_takes_the_known_spelling_and_drops_the_byte_order_mark(tmp_path):
    source = write(tmp_path / "a.csv", "\ufeffQUESTION, Note \nwho?,n\n")
    assert read(source)[0].values == {"question": "who?", "Note": "n"}


def test_tsv_has_no_quoting(tmp_path):
    source = write(tmp_path / "a.tsv", 'who said "hi?\t"Ada\n')
    assert read(source)[0].values == {"question": 'who said "hi?', "answer": '"Ada'}


def test_cells_longer_than_the_csv_default(tmp_path):
    source = write(tmp_path / "a.tsv", "q\t" + "x" * 200_000)
    assert len(read(source)[0].values["answer"]) == 200_000


def test_other_line_ends(tmp_path):
    windows = write(tmp_path / "a.tsv", "who?\tAda\r\nwann?\tfrüh\r\n")
    assert [row.values for row in read(windows)] == TWO
    separator = write(tmp_path / "b.tsv", "line\u2028separator\tkept\u0085whole\n")
    assert read(separator)[0].values == {"question": "line\u2028separator", "answer": "kept\u0085whole"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.tsv",
            "a\té\nc\t".encode() + b"\xff\n",
            ["line 2", "UTF-8", "0xff (byte 3", "with the program that wrote it"],
        ),
        ("a.jsonl", b'{"a": 1}\n{"a": \0}\n', ["line 2", "NUL byte (byte 7", "UTF-8"]),
        ("a.csv", "a,b\n".encode("utf-16")[:-1], ["after line 0", "utf-16"]),
        ("a.json", '["é",\n"'.encode() + b'\xe9"]', ["line 2", "0xe9"]),
        ("a.jsonl", '{"a": 1}\n{"a": }\n', ["line 2", "expected JSON", "column 7", "Correct that line"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["line 2", "expected JSON", "column 7"]),
        ("a.json", '[{"a": 1}]\n[2]', ["line 1", "expected JSON", "one list of objects"]),
        ("a.json", "[" * 100_000, ["expected JSON"]),
        ("a.json", '{"a": 1}\n{"a": }', ["line 2", "expected JSON"]),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', ["line 3", "CSV record", "Correct the quotes"]),
        ("a.csv", 'a,b\n1,"2"x\n', ["line 2", "CSV record"]),
        ("a.tsv", "a\tb\n1\r2\t3\n", ["line 2", "TSV record", "line ends"]),
        ("a.csv", "a,b,A\n", ["line 1", "every column once", '"a"', "Rename"]),
        ("a.parquet", b"PAR1 no more", ["expected a Parquet file", "again"]),
        ("a.parquet.gz", b"PAR1 no more", ["expected a Parquet file", "again"]),
        ("a.tsv", "", ["file is empty", "Check the step"]),
        ("a.jsonl.gz", "\n \n", ["file is empty"]),
        ("a.parquet", b"", ["file is empty"]),
        ("a.txt", "x", ["extension .txt", "Supported: .tsv .csv", ".gz"]),
        ("a", "x", ["extension (none)", "Supported:"]),
    ],
)
def test_broken_files(tmp_path, name, content, words):
    source = write(tmp_path / name, content)
    with pytest.raises(InputError) as error:
        read(source, known=("a", "b"), headerless=lambda _: ("a", "b"))
    assert str(error.value).startswith(source)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-12], lambda raw: b"plain text", lambda raw: raw[:20] + b"\xff" * 9]
)
def test_broken_gzip(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(CONTENTS["jsonl"].encode() * 50)))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: expected a complete gzip file.*drop the \.gz"):
        read(str(path))


def test_missing_file_names_path_and_similar_file(tmp_path, monkeypatch):
    write(tmp_path / "questions.tsv", "a\tb")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        read("question.tsv")
    assert str(tmp_path / "question.tsv") in str(error.value)
    assert f"Did you mean {tmp_path / 'questions.tsv'}?" in str(error.value)
    with pytest.raises(InputError, match="Check the path and the working folder"):
        read("zzz.parquet")
    with pytest.raises(InputError, match=r"The folder .*/none does not exist"):
        read("none/questions.tsv")
    with pytest.raises(InputError, match=r'is a directory of another kind. Name a file, or ".*/\*\.tsv"'):
        read(str(tmp_path))


def test_rows_of_the_wrong_shape_are_collected(tmp_path):
    bad = BadRows()
    source = write(tmp_path / "a.tsv", "a\tb\na\na\tb\tc\n")
    assert len(read(source, bad=bad)) == 1
    assert bad.first == [
        f"{source}, line 2: expected 2 cells, found 1 (the delimiter is a tab; --delimiter names another)",
        f"{source}, line 3: expected 2 cells, found 3",
    ]
    other = write(tmp_path / "a.jsonl", '{"a": 1}\n3\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: expected a JSON object, found a int.*--skip_bad_rows"):
        read(other)


def test_bad_rows_are_counted_and_the_first_named():
    bad = BadRows()
    assert bad.finish("f", skip=False) is None
    for number in range(SHOWN + 2):
        bad.add(f"f, line {number + 1}", "empty answer")
    with pytest.raises(InputError) as error:
        bad.finish("f", skip=False)
    assert f"f: {SHOWN + 2} rows cannot be used: f, line 1: empty answer;" in str(error.value)
    assert f"line {SHOWN}:" in str(error.value)
    assert f"line {SHOWN + 1}:" not in str(error.value)
    assert "fix them or pass --skip_bad_rows" in str(error.value)
    assert bad.finish("f", skip=True).startswith(f"f: {SHOWN + 2} rows skipped: f, line 1: empty answer;")


def test_text_of():
    read = {"ä": "ä", None: "", 7: "7", 2.0: "2", 3.5: "3.5", -0.25: "-0.25", 1e22: "1" + "0" * 22, math.nan: ""}
    assert [text_of(value, "x") for value in read] == list(read.values())
    odd = ((True, "bool"), (math.inf, "float"), (["a"], "list"), ("a\ud800", "surrogate pair at character 2"))
    for value, found in odd:
        with pytest.raises(BadValue, match=f"x .*{found}"):
            text_of(value, "x")


def test_hub_dataset(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_list(TWO)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("user/name:config", split="validation")
    assert [row.values for row in rows] == TWO
    assert rows[1].where == "user/name:config (validation), row 2"
    read("squad")
    assert calls == [(("user/name", "config"), {"split": "validation"}), (("squad", None), {"split": "train"})]


@pytest.mark.parametrize("source", ["a/b/c", "csv", "./data", "user/name.tsv"])
def test_sources_that_are_not_hub_ids(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(InputError, match="Expected a file at"):
        read(source)


@pytest.mark.parametrize(
    "problem",
    [
        ConnectionError("Couldn't reach 'user/name' on the Hub"),
        datasets.exceptions.DatasetNotFoundError("no"),
        ValueError('Unknown split "x"'),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_unreachable_hub_names_both_remedies(monkeypatch, tmp_path, problem):
    def load_dataset(*arguments, **options):
        raise problem

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as error:
        read("user/name")
    for word in (str(tmp_path / "user/name"), str(problem), "local file", ".jsonl", "HF_HUB_OFFLINE", "network"):
        assert word in str(error.value)


CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r\n\t"), max_size=6)
CELL = CELL.filter(lambda cell: not cell.startswith('"'))  # see the tests of quoting


def without_padding(table):
    """Rows of the columns question and answer without blank rows and blank cells behind them."""
    rows = [list(cells) for cells in table if any(map(str.strip, cells))]
    for cells in rows:
        while len(cells) > 2 and not cells[-1].strip():
            cells.pop()
    return rows


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.lists(CELL, min_size=1, max_size=4).filter(lambda cells: any(map(str.strip, cells))), min_size=1))
def test_tsv_rows_are_kept_or_reported(tmp_path_factory, table):
    source = write(tmp_path_factory.mktemp("h") / "a.tsv", "question\tanswer\n" + "\n".join(map("\t".join, table)))
    bad = BadRows()
    rows = read(source, bad=bad)
    table = without_padding(table)
    assert [list(row.values.values()) for row in rows] == [cells for cells in table if len(cells) == 2]
    assert len(rows) + bad.count == len(table)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6))))
def test_csv_rows_are_kept_or_reported(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("h") / "a.csv"
    table = [cells for cells in table if cells]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["question", "answer"], *table])
    bad = BadRows()
    rows = read(str(path), bad=bad)
    table = without_padding(table)
    assert [list(row.values.values()) for row in rows] == [cells for cells in table if len(cells) == 2]
    assert len(rows) + bad.count == len(table)


ANY_JSON = st.one_of(st.none(), st.integers(), st.text(max_size=4), st.dictionaries(st.text(max_size=3), st.text()))


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(ANY_JSON, min_size=1), st.booleans())
def test_json_rows_are_kept_or_reported(tmp_path_factory, values, as_list):
    folder = tmp_path_factory.mktemp("h")
    if as_list:
        source = write(folder / "a.json", json.dumps(values))
    else:
        source = write(folder / "a.jsonl", "\n".join(map(json.dumps, values)))
    bad = BadRows()
    rows = read(source, bad=bad)
    assert [row.values for row in rows] == [value for value in values if isinstance(value, dict)]
    assert len(rows) + bad.count == len(values)


# ---- options that the commands use


def test_bzip2_and_a_forced_kind(tmp_path):
    path = tmp_path / "wiki_00.bz2"
    path.write_bytes(bz2.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert [row.values["text"] for row in read_rows(str(path), kind=".jsonl")] == ["one", "two"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="expected a complete bzip2 file"):
        list(read_rows(str(path), kind=".jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_bytes_read_from_disk_are_reported(tmp_path, name):
    raw = b'{"text": "one"}\n' * 5000
    path, sizes = tmp_path / name, []
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert len(list(read_rows(str(path), progress=sizes.append))) == 5000
    assert sum(sizes) == path.stat().st_size


def test_hub_ids_are_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    assert is_hub_id("user/name:config") and not is_hub_id("user") and not is_hub_id("a.csv") and not is_hub_id("a b")
