"""The set that comes with the package: large enough, clean, answerable from its own passages, and split by article."""

import json
import re
from collections import Counter, defaultdict

import pytest

from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.passages import read_passages
from cozyrag.data.questions import read_questions
from cozyrag.evaluation.metrics import normalize_answer
from cozyrag.runtime.assets import QUICKSTART, QUICKSTART_FOLDER, QUICKSTART_SETTINGS

SPLITS = ("train", "validation", "test")


def rows(name):
    return [json.loads(line) for line in (QUICKSTART_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


PASSAGES = rows("passages")
QUESTIONS = {split: rows(split) for split in SPLITS}
ALL = [row for split in SPLITS for row in QUESTIONS[split]]
TEXTS = {row["id"]: row["text"] for row in PASSAGES}


def repeated(values):
    return [value for value, count in Counter(values).items() if count > 1]


def test_it_is_large_enough():
    assert len(PASSAGES) >= 150 and len(ALL) >= 1800
    assert len(QUESTIONS["train"]) > len(QUESTIONS["test"]) > 100 and len(QUESTIONS["validation"]) > 100


def test_passages_have_80_to_200_words():
    assert {row["id"]: len(row["text"].split()) for row in PASSAGES if not 80 <= len(row["text"].split()) <= 200} == {}


def test_passages_are_clean():
    for row in PASSAGES:
        assert set(row) >= {"id", "title", "text"} and all(
            isinstance(value, str) and value == " ".join(value.split()) != "" for value in row.values()
        ), row["id"]
        assert row["text"].endswith((".", "!", "?")), row["id"]
        assert not re.search(r"<[a-z/]+>|\[\d+\]|&\w+;|https?:|\ufffd", row["text"]), row["id"]


@pytest.mark.parametrize("column", ["id", "title", "text"])
def test_no_two_passages_share(column):
    assert repeated(row[column] for row in PASSAGES) == []


def test_question_ids_are_unique_over_all_splits():
    assert repeated(row["id"] for row in ALL) == []


def test_no_question_is_asked_twice():
    assert repeated(normalize_answer(row["question"]) for row in ALL) == []


def test_questions_are_clean():
    for row in ALL:
        assert set(row) == {"id", "question", "answers", "passage_id"}, row["id"]
        assert row["question"] == " ".join(row["question"].split()) and row["question"].endswith("?"), row["id"]
        assert row["answers"] and len(set(row["answers"])) == len(row["answers"]), row["id"]


def test_every_answer_stands_verbatim_in_its_gold_passage():
    assert [
        (row["id"], answer) for row in ALL for answer in row["answers"] if answer not in TEXTS[row["passage_id"]]
    ] == []


def test_the_measure_that_looks_for_answers_finds_them_all_but_a_few_possessives():
    """SQuAD's normaliser makes one word of "Harrison's"; anything else that hides an answer is a fault of the set."""
    forms = {key: matching_form(text) for key, text in TEXTS.items()}
    hidden = [
        (row["passage_id"], answer)
        for row in ALL
        for answer in row["answers"]
        if not contains_answer(forms[row["passage_id"]], [answer])
    ]
    assert all(f"{answer}'s" in TEXTS[key] for key, answer in hidden), hidden
    assert len(hidden) < len(ALL) / 100


def test_no_answer_is_whispered_by_its_question():
    """An answer of several words in the question itself would teach copying; single words may be part of a choice."""
    told = [
        row["id"]
        for row in ALL
        if len(row["answers"][0].split()) > 2 and contains_answer(matching_form(row["question"]), row["answers"])
    ]
    assert told == []


def test_splits_share_no_article():
    articles = {split: {row["passage_id"] for row in QUESTIONS[split]} for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not articles[one] & articles[other]
    assert set().union(*articles.values()) == set(TEXTS)


def test_every_passage_has_several_questions():
    asked = defaultdict(int)
    for row in ALL:
        asked[row["passage_id"]] += 1
    assert min(asked.values()) >= 5


@pytest.mark.parametrize("split", SPLITS)
def test_the_readers_take_every_row(split):
    questions = read_questions(str(QUICKSTART_FOLDER / f"{split}.jsonl"))
    assert (
        [dict(row) for row in questions.table] == [row | {"negative_ids": []} for row in QUESTIONS[split]]
        and questions.report is None
        and questions.passages is None
    )


def test_the_reader_takes_every_passage():
    table, report = read_passages(QUICKSTART["passages"])
    names = ("id", "title", "text")
    assert report is None and len(table) == len(PASSAGES)
    for row, given in zip(table, PASSAGES, strict=True):
        assert {name: row[name] for name in names} == {name: given[name] for name in names}
        assert json.loads(row["metadata"]) == {"topic": given["topic"]}


def test_the_names_of_the_package_lead_to_the_files():
    assert {name: path.rsplit("/", 1)[-1] for name, path in QUICKSTART.items()} == {
        "questions": "train.jsonl",
        "eval_questions": "validation.jsonl",
        "passages": "passages.jsonl",
    }
    assert QUICKSTART_SETTINGS.is_file()
