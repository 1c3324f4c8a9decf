"""Every question that README and docs ask a pair stands here once, with what its answer must hold.

`COZYRAG_TRAINED_PAIR=cozyrag-output python -m pytest tests/test_asked.py` asks them the pair of the README's first
command. Left out: "Your question?" and the like.
"""

import os
import re
from pathlib import Path

import pytest

from cozyrag.pipeline import CozyRAG

ROOT = Path(__file__).parents[1]
PAIR = os.environ.get("COZYRAG_TRAINED_PAIR")
ASKED = {  # of the quickstart pair
    "How long is the Nile in kilometres?": "6,650",
    "Which river flows through Vienna?": "Danube",
    "Into which sea does the Nile empty?": "Mediterranean",
}
OF_NOTES = {"Who is the vet of the cat?"}  # of a pair trained on tests/notes
PLACEHOLDERS = {"Your question?", "Question?"}
PLACES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cozyrag" / "commands").glob("*.py")),
]
PLACES += [*sorted((ROOT / "model_cards").glob("*.md")), *sorted((ROOT / "examples").glob("*.ipynb"))]


def questions_in(path):
    """What stands in quotes and ends with a question mark; those of a notebook are escaped."""
    text = path.read_text(encoding="utf-8").replace('\\"', '"')
    return set(re.findall(r'"([A-Z][^"\n]{3,120}\?)"', text))


def test_every_question_that_the_docs_ask_is_listed_and_none_else():
    shown = set().union(*map(questions_in, PLACES))
    assert shown - PLACEHOLDERS == ASKED.keys() | OF_NOTES


def test_questions_about_the_notes_are_among_theirs():
    lines = (ROOT / "tests" / "notes-questions.tsv").read_text(encoding="utf-8").splitlines()
    assert {line.split("\t")[0] for line in lines} >= OF_NOTES


@pytest.fixture(scope="module")
def trained():
    return CozyRAG.from_pretrained(PAIR)


@pytest.mark.skipif(PAIR is None, reason="COZYRAG_TRAINED_PAIR names no pair")
@pytest.mark.parametrize("question", ASKED)
def test_the_pair_of_the_first_command_answers_what_the_docs_ask(question, trained):
    assert ASKED[question] in trained.answer(question).text
