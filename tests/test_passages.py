"""Passage sources: the tables they become and the errors they raise."""

import hashlib
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.data.metadata import metadata_in
from cozyrag.data.passages import (
    features,
    merge_passages,
    passage_id,
    passages_from_contexts,
    read_passages,
)
from cozyrag.data.rows import Columns
from cozyrag.errors import InputError


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def table(*rows):
    return datasets.Dataset.from_list([dict(zip(features(), row, strict=True)) for row in rows], features=features())


def test_passage_id():
    assert passage_id("abc") == "a9993e364706816a"  # FIPS 180: SHA-1 of "abc"
    assert passage_id("ä") == hashlib.sha1(b"\xc3\xa4").hexdigest()[:16]


def test_columns_and_defaults(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"id": 7, "title": " A \n b", "text": " x "}, {"text": "y", "more": 1}])
    passages, report = read_passages(source)
    assert passages.select_columns(list(features())).features == features()
    assert passages.to_list() == [
        {"id": "7", "title": "A b", "text": " x ", "metadata": ""},
        {"id": passage_id("y"), "title": "", "text": "y", "metadata": '{"more": 1}'},
    ]
    assert report is None
    assert read_passages(jsonl(tmp_path / "q.jsonl", [{"text": "x"}]))[0].features == features()


@pytest.mark.parametrize(
    ("others", "kept"),
    [
        ({"url": "https://x.org/ä", "page": 3, "share": 0.5, "new": True}, None),
        ({"page": 3.0}, {"page": 3}),
        ({"metadata": {"url": "u"}, "source": "s"}, {"source": "s", "url": "u"}),
        ({"metadata": '{"url": "u"}'}, {"url": "u"}),
        ({"metadata": "plain"}, None),
        ({"url": "", "page": None, "other": "  "}, {}),
        ({"share": float("nan")}, {}),
    ],
    ids=str,
)
def test_other_columns_are_kept_as_metadata(tmp_path, others, kept):
    table, report = read_passages(jsonl(tmp_path / "p.jsonl", [{"text": "x"} | others, {"text": "y", "url": "z"}]))
    assert metadata_in(table[0]["metadata"]) == (others if kept is None else kept)
    assert metadata_in(table[1]["metadata"]) == {"url": "z"} and report is None


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, "long " * 300], ids=["list", "object", "text"])
def test_what_is_no_metadata_is_left_out_and_named(tmp_path, value):
    table, report = read_passages(jsonl(tmp_path / "p.jsonl", [{"text": "x", "vector": value}]))
    assert table.column_names == ["id", "title", "text"]
    assert 'some values of "vector"' in report and "not kept" in report


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "7", '{"a": [1], "b": null}', "[" * 9999])
def test_metadata_of_another_form_is_none(text):
    assert metadata_in(text) == {}


def test_named_columns_and_delimited_files(tmp_path):
    (tmp_path / "p.tsv").write_text("Nr\tBODY\n1\tx\n")
    (tmp_path / "p.csv").write_text('text,title\n"x\ny",t\n')
    read = read_passages(str(tmp_path / "p.tsv"), columns=Columns(id="nr", text="body"))[0]
    assert read.to_list() == [{"id": "1", "title": "", "text": "x"}]
    assert read_passages(str(tmp_path / "p.csv"))[0]["text"][:] == ["x\ny"]


def test_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([{"text": "x"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: rows if split == "test" else None)
    assert read_passages("user/name", split="test")[0]["text"][:] == ["x"]


def test_bad_rows(tmp_path):
    rows = [{"id": "a", "text": "x"}, {"id": "b", "text": " "}, {"id": "a", "text": "x"}, {"text": True}, {"id": "c"}]
    source = jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError) as error:
        read_passages(source)
    for word in (
        f"{source}: 4 rows cannot be used",
        f"{source}, line 2: empty text",
        f"{source}, line 3: repeats {source}, line 1",
        f"{source}, line 4: text is a bool",
        f"{source}, line 5: empty text",
        "--skip_bad_rows",
    ):
        assert word in str(error.value)
    passages, report = read_passages(source, skip_bad_rows=True)
    assert passages["id"][:] == ["a"]
    assert report.startswith(f"{source}: 4 rows skipped")


def test_two_texts_under_one_id(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}])
    with pytest.raises(InputError) as error:
        read_passages(source, skip_bad_rows=True)
    for word in (f"{source}, line 2: expected a new id", f'"a", which {source}, line 1 gave', "Correct the ids"):
        assert word in str(error.value)


def test_missing_text_column(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"body": "x", "id": 1}])
    with pytest.raises(InputError) as error:
        read_passages(source)
    for word in (source, 'a column "text", found "body", "id"', "--columns text=COLUMN"):
        assert word in str(error.value)


def test_no_usable_row(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"text": ""}])
    with pytest.raises(InputError, match="p.jsonl: expected at least one row with text, found none. Check"):
        read_passages(source, skip_bad_rows=True)
    (tmp_path / "p.csv").write_text("id,text\n")
    with pytest.raises(InputError, match="p.csv: expected at least one row with text"):
        read_passages(str(tmp_path / "p.csv"))


def test_contexts_are_deduplicated_in_first_seen_order():
    passages = passages_from_contexts([("t", "b"), ("u", "a"), ("other", "b")])
    assert passages.to_list() == [
        {"id": passage_id("b"), "title": "t", "text": "b"},
        {"id": passage_id("a"), "title": "u", "text": "a"},
    ]
    assert len(passages_from_contexts([])) == 0


def test_merge():
    merged = merge_passages([table(("1", "t", "x"), ("2", "", "y")), table(("2", "late", "y"), ("0", "", "x"))])
    assert merged.to_list() == table(("1", "t", "x"), ("2", "", "y"), ("0", "", "x")).to_list()
    assert merged.features == features()
    with pytest.raises(InputError, match='two under "1": "x" and "z".*Give one of them another id'):
        merge_passages([table(("1", "", "x")), table(("1", "", "z"))])


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.text(max_size=2), min_size=1))
def test_rows_are_kept_or_reported(tmp_path_factory, texts):
    source = jsonl(tmp_path_factory.mktemp("h") / "p.jsonl", [{"text": text} for text in texts])
    expected = list(dict.fromkeys(text for text in texts if text.strip()))
    if not expected:
        with pytest.raises(InputError, match="at least one row"):
            read_passages(source, skip_bad_rows=True)
        return
    passages, report = read_passages(source, skip_bad_rows=True)
    assert passages["text"][:] == expected
    assert (0 if report is None else int(report.split(": ")[1].split()[0])) == len(texts) - len(expected)
