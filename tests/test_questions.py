"""Question sources: the tables they become, the errors they raise, and the selection of rows."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.data.passages import merge_passages, passage_id
from cozyrag.data.questions import features, hold_out, read_questions, take
from cozyrag.data.rows import Columns
from cozyrag.errors import InputError

DATA = Path(os.environ.get("COZYRAG_SQUAD", "no-such-folder"))  # SQuAD 1.1 as JSON lines; optional


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(golds, texts=None):
    texts = texts or [f"q{i}" for i in range(len(golds))]
    rows = [
        {"id": str(i), "question": question, "answers": ["a"], "passage_id": gold, "negative_ids": []}
        for i, (question, gold) in enumerate(zip(texts, golds, strict=True))
    ]
    return datasets.Dataset.from_list(rows, features=features())


def test_headerless_tsv(tmp_path):
    (tmp_path / "q.tsv").write_text("who?\tAda\nwhen?\t1815, 1852\n")
    read = read_questions(str(tmp_path / "q.tsv"))
    assert read.table.features == features()
    assert read.table.remove_columns("id").to_list() == [
        {"question": "who?", "answers": ["Ada"], "passage_id": None, "negative_ids": []},
        {"question": "when?", "answers": ["1815, 1852"], "passage_id": None, "negative_ids": []},
    ]
    assert (read.passages, read.report) == (None, None)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("Ada", ["Ada"]),
        (["b", " a ", "", "b", None], ["b", "a"]),
        ([{"text": "a"}, {"text": "b", "answer_start": 3}], ["a", "b"]),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
        ({"text": "a"}, ["a"]),
        (1815, ["1815"]),
        (None, []),
        ([], []),
        ({"text": []}, []),
    ],
)
@pytest.mark.parametrize("column", ["answer", "answers"])
@pytest.mark.parametrize("configured", ["answer", "answers"])
def test_layouts_of_answers(tmp_path, answers, expected, column, configured):
    source = jsonl(tmp_path / "q.jsonl", [{"question": "q", column: answers}])
    read = read_questions(source, columns=Columns(answer=configured), needs_answer=False)
    assert read.table[0]["answers"] == expected


def test_question_is_one_line(tmp_path):
    source = jsonl(tmp_path / "q.jsonl", [{"question": "  who\n\tis  Ada? ", "answer": "x"}])
    assert read_questions(source).table[0]["question"] == "who is Ada?"


def test_contexts_become_passages(tmp_path):
    rows = [
        {"id": "1", "question": "q", "answers": ["a"], "context": " c ", "title": "T", "passage_id": "unused"},
        {"id": "2", "question": "q", "answers": ["a"], "context": " c ", "title": "U"},
        {"id": "3", "question": "q", "answers": ["a"], "context": " \n", "passage_id": 12},
        {"id": "4", "question": "q", "answers": ["a"]},
    ]
    read = read_questions(jsonl(tmp_path / "q.jsonl", rows))
    assert read.table["passage_id"][:] == [passage_id(" c "), passage_id(" c "), "12", None]
    assert read.passages.to_list() == [{"id": passage_id(" c "), "title": "T", "text": " c "}]


def test_squad_json(tmp_path):
    qas = [{"id": "x", "question": "q", "answers": [{"text": "a"}]}, {"id": "y", "question": "r", "answers": []}]
    data = {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": qas}]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(data))
    read = read_questions(str(path), needs_answer=False)
    assert read.table["id"][:] == ["x", "y"]
    assert read.table["answers"][:] == [["a"], []]
    with pytest.raises(InputError, match=r"data\[0\]\.paragraphs\[0\]\.qas\[1\]: empty answer"):
        read_questions(str(path))


def test_named_columns(tmp_path):
    (tmp_path / "q.csv").write_text("FRAGE,Antwort,nr,absatz\nq,a,5,p\n")
    columns = Columns(question="frage", answer="antwort", id="nr", passage_id="absatz")
    read = read_questions(str(tmp_path / "q.csv"), columns=columns)
    expected = {"id": "5", "question": "q", "answers": ["a"], "passage_id": "p", "negative_ids": []}
    assert read.table.to_list() == [expected]


def test_generated_ids(tmp_path):
    rows = [
        {"question": "q", "answers": ["a", "b"]},
        {"question": "q", "answers": "a"},
        {"question": "q", "answer": ""},
    ]
    read = read_questions(
        jsonl(tmp_path / "q.jsonl", [*rows, rows[0], {**rows[0], "context": "c"}]), needs_answer=False
    )
    plain = hashlib.sha1(b"q\na\n").hexdigest()[:16]
    bare = hashlib.sha1(b"q\n\n").hexdigest()[:16]
    placed = hashlib.sha1(b"q\na\n" + passage_id("c").encode()).hexdigest()[:16]
    assert read.table["id"][:] == [plain, f"{plain}-2", bare, f"{plain}-3", placed]


def test_repeated_id(tmp_path):
    source = jsonl(tmp_path / "q.jsonl", [{"id": "a", "question": "q", "answer": "x"}] * 2)
    with pytest.raises(InputError) as error:
        read_questions(source, skip_bad_rows=True)
    for word in (f'{source}, line 2: expected a new id, found "a"', f"{source}, line 1 has already", "Correct the ids"):
        assert word in str(error.value)


def test_bad_rows(tmp_path):
    rows = [
        {"question": "q", "answer": "a"},
        {"question": " ", "answer": "a"},
        {"question": "q", "answer": [" "]},
        {"question": ["q"], "answer": "a"},
        {"question": "q", "answer": {"x": 1}},
        {"question": "q", "answer": "a", "context": "half \udc00"},
        {"answer": "a"},
    ]
    source = jsonl(tmp_path / "q.jsonl", rows)
    reasons = [
        "line 2: empty question",
        "line 3: empty answer",
        "line 4: question is a list, expected text",
        "line 5: answer is a dict, expected text",
        "line 6: context holds half a surrogate pair",
        "line 7: empty question",
    ]
    with pytest.raises(InputError) as error:
        read_questions(source)
    for word in (f"{source}: 6 rows cannot be used", "--skip_bad_rows", *(f"{source}, {reason}" for reason in reasons)):
        assert word in str(error.value)
    read = read_questions(source, skip_bad_rows=True)
    assert len(read.table) == 1
    assert read.report.startswith(f"{source}: 6 rows skipped")


def test_cells_of_headerless_tsv(tmp_path):
    (tmp_path / "q.tsv").write_text("who?\tAda\tand more\nwho?\tAda\n")
    with pytest.raises(InputError, match=r"q\.tsv, line 1: expected 2 cells, found 3.*--skip_bad_rows"):
        read_questions(str(tmp_path / "q.tsv"))


def test_missing_columns(tmp_path):
    source = jsonl(tmp_path / "q.jsonl", [{"frage": "q", "antwort": "a"}])
    with pytest.raises(InputError, match='q.jsonl: .*"question", found "frage", "antwort".*--columns question='):
        read_questions(source, skip_bad_rows=True)
    with pytest.raises(InputError, match='q.jsonl: .*"answers", found "frage", "antwort".*--columns answer='):
        read_questions(source, columns=Columns(question="frage"))
    assert len(read_questions(source, columns=Columns(question="frage"), needs_answer=False).table) == 1


def test_no_usable_row(tmp_path):
    source = jsonl(tmp_path / "q.jsonl", [{"question": "", "answer": ""}])
    with pytest.raises(InputError, match=r"q\.jsonl: expected at least one row with a question and an answer"):
        read_questions(source, skip_bad_rows=True)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.tuples(st.sampled_from(["", " ", "q", "r"]), st.sampled_from(["", "a", "b "])), min_size=1))
def test_rows_are_kept_or_reported(tmp_path_factory, pairs):
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    source = jsonl(tmp_path_factory.mktemp("h") / "q.jsonl", [*rows, {"question": "last", "answer": "a"}])
    read = read_questions(source, skip_bad_rows=True)
    usable = [question.strip() for question, answer in pairs if question.strip() and answer]
    assert read.table["question"][:] == [*usable, "last"]
    assert len(set(read.table["id"][:])) == len(usable) + 1
    assert (0 if read.report is None else int(read.report.split(": ")[1].split()[0])) == len(pairs) - len(usable)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=2, max_size=40), st.integers(0, 9))
def test_hold_out_splits_whole_groups(golds, seed):
    table = questions(golds)
    if len(set(golds)) == 1 and golds[0] is not None:
        with pytest.raises(InputError, match="at least two passages.*Add questions"):
            hold_out(table, share=0.3, limit=9, seed=seed)
        return
    train, held = hold_out(table, share=0.3, limit=9, seed=seed)
    ids = [[int(key) for key in side["id"][:]] for side in (train, held)]
    assert all(side == sorted(side) and side for side in ids)
    assert sorted(ids[0] + ids[1]) == list(range(len(golds)))
    assert not (set(train["passage_id"][:]) & set(held["passage_id"][:])) - {None}
    smallest = min(Counter(gold if gold else i for i, gold in enumerate(golds)).values())
    assert len(held) <= max(smallest, min(9, round(0.3 * len(golds))))
    assert held.to_list() == hold_out(table, share=0.3, limit=9, seed=seed)[1].to_list()


def test_hold_out_sizes_and_seeds():
    table = questions([None] * 100)
    assert [len(hold_out(table, share=s, limit=n, seed=0)[1]) for s, n in ((0.1, 99), (0.5, 7), (0.001, 9))] == [
        10,
        7,
        1,
    ]
    assert len(hold_out(questions([None] * 2), share=0.99, limit=9, seed=0)[0]) == 1
    assert (
        hold_out(table, share=0.1, limit=99, seed=0)[1]["id"][:]
        != hold_out(table, share=0.1, limit=99, seed=1)[1]["id"][:]
    )


def test_hold_out_keeps_equal_questions_together():
    table = questions([None] * 20, texts=["a", "b"] * 10)
    assert set(hold_out(table, share=0.1, limit=9, seed=0)[1]["question"][:]) in ({"a"}, {"b"})


@pytest.mark.parametrize(("share", "limit"), [(0.0, 1), (1.0, 1), (0.5, 0)])
def test_hold_out_refuses(share, limit):
    with pytest.raises(InputError, match=f"share {share}, limit {limit}"):
        hold_out(questions([None] * 3), share=share, limit=limit, seed=0)


def test_take():
    table = questions([None] * 50)
    assert take(table, None, 0) is table
    assert take(table, 50, 0) is table
    some = [int(key) for key in take(table, 10, 3)["id"][:]]
    assert len(set(some)) == 10
    assert some == sorted(some)
    assert some == [int(key) for key in take(table, 10, 3)["id"][:]]
    assert some != [int(key) for key in take(table, 10, 4)["id"][:]]
    with pytest.raises(InputError, match="at least 1 row, found 0"):
        take(table, 0, 0)


@pytest.mark.skipif(
    not DATA.is_dir(), reason="COZYRAG_SQUAD names no folder with squad11_train.jsonl.gz and squad11_dev.jsonl.gz"
)
def test_squad_dev_has_its_known_size():
    dev = read_questions(str(DATA / "squad11_dev.jsonl.gz"))
    assert (len(dev.table), len(dev.passages), dev.report) == (10_570, 2_067, None)
    assert len(merge_passages([dev.passages, dev.passages])) == 2_067
