"""The training questions kept for fitting the fusion weights: none that the retriever is trained on."""

import pytest
from datasets import Dataset

from cozyrag.config import parse_settings
from cozyrag.training.run_retrieval import WEIGHT_QUESTIONS, fusion_questions

OWN = ["--questions", "q.jsonl", "--passages", "p.jsonl"]
MANY = 20 * WEIGHT_QUESTIONS


def asked(count, *arguments):
    questions = Dataset.from_dict({"id": [f"q{number}" for number in range(count)]})
    return fusion_questions(questions, parse_settings([*OWN, *arguments]))["id"][:]


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ([], {0: 0, 9: 0, 10: 1, 995: 99, MANY: WEIGHT_QUESTIONS}),
        (["--retriever_steps", "0"], {0: 0, 9: 9, 995: 995, MANY: WEIGHT_QUESTIONS}),
        (["--rounds", "0"], {9: 9}),
        (["--retriever_epochs", "0"], {9: 9}),
        (["--retrieval", "dense"], {MANY: 0}),
        (["--retrieval", "bm25"], {MANY: 0}),
    ],
)
def test_a_tenth_is_kept_for_fitting_if_the_retriever_is_trained(arguments, counts):
    for count, kept in counts.items():
        assert len(asked(count, *arguments)) == kept


def test_the_kept_questions_depend_on_the_seed_only():
    assert asked(200) == asked(200) and len(set(asked(200))) == 20
    assert asked(200) != asked(200, "--seed", "7")
