"""Evaluation of a pair: a generator with fixed answers, and numbers computed by hand for eight questions.

The accelerator, the metrics and the table are real; a comment explains each question.
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import cozyrag.evaluation.evaluation
from cozyrag.evaluation.evaluation import VERDICTS as VERDICTS_KNOWN
from cozyrag.evaluation.evaluation import (
    choose_threshold,
    evaluate_pair,
    few_questions,
    prompt_key,
    retrieval_table,
    summarize,
    table,
)
from cozyrag.evaluation.metrics import bootstrap_interval
from cozyrag.models.generator import Decoding, Written
from cozyrag.retrieval.contexts import CONTEXT_FEATURES

# (answers, prediction, rank of the positive or None, answer in context), top_k is 4
CASES = [
    (["Red Fox"], "the red fox!", 1, True),  # EM 1, F1 1
    (["blue river bank"], "blue river", 3, True),  # F1: precision 1, recall 2/3 -> 0.8
    (["1815", "year 1816"], "1816", 6, False),  # F1: the better reference, precision 1, recall 1/2 -> 2/3
    (["stone"], "", 4, False),  # in the top 4, but not in the context
    ([], "", None, False),  # has no answer, and none is given
    (["correct"], "wrong", None, False),
    (["tower"], "wrong", 21, False),
    (["lamp"], "wrong", 11, False),  # beyond the cutoff of MRR@10, within recall@20
]
VERDICTS = [
    "correct", "reader error", "retrieval miss", "context miss",
    "correct", "retrieval miss", "retrieval miss", "retrieval miss",
]  # fmt: skip
SUMMARY = {
    "questions": 8,
    "em": 100 * 2 / 8,
    "f1": 100 * (1 + 0.8 + 2 / 3 + 1) / 8,
    "recall@1": 100 * 1 / 8,
    "recall@5": 100 * 3 / 8,
    "recall@20": 100 * 5 / 8,
    "mrr@10": 100 * (1 + 1 / 3 + 1 / 6 + 1 / 4) / 8,
    "answer_in_context": 100 * 2 / 8,
    # one relevant passage: 1 / log2(rank + 1) for the ranks 1, 3, 6 and 4
    "ndcg@10": 100 * (1 + 1 / math.log2(4) + 1 / math.log2(7) + 1 / math.log2(5)) / 8,
}
OPTIONS = {"top_k": 4, "decoding": Decoding(context_tokens=50, answer_tokens=7), "batch_size": 3}


def contexts_of(cases):
    found, count = list(range(100, 130)), len(cases)
    columns = {
        "id": [f"q{number}" for number in range(count)],
        "question": [f"Question {number}?" for number in range(count)],
        "answers": [answers for answers, _, _, _ in cases],
        "passage_id": [None] * count,
        "rows": [found] * count,
        "scores": [[0.5] * 30] * count,
        "context": [f"Context {number}." for number in range(count)],
        "answer_in_context": [held for _, _, _, held in cases],
        "noised": [False] * count,
        "gold_row": [-1] * count,
        "positive": [-1 if rank is None else found[rank - 1] for _, _, rank, _ in cases],
        "negatives": [[]] * count,
    }
    return Dataset.from_dict(columns, features=CONTEXT_FEATURES)


class FixedAnswers:
    """Answers question N as in the cases, and records its prompts, batch by batch."""

    def __init__(self, cases=CASES):
        self.cases, self.asked = cases, []

    reading = staticmethod(nullcontext)

    def write(self, questions, contexts, **options):
        self.asked.append(list(zip(questions, contexts, strict=True)))
        self.options = options
        return [Written(self.cases[int(question.split()[1][:-1])][1], 0.75, 0.25) for question in questions]


def evaluated(cases=CASES, **options):
    generator = FixedAnswers()
    return generator, *evaluate_pair(Accelerator(cpu=True), generator, contexts_of(cases), **(OPTIONS | options))


def test_summary_by_hand():
    _, summary, _ = evaluated()
    assert {name: value for name, value in summary.items() if "interval" not in name} == pytest.approx(
        SUMMARY, abs=0.0051
    )
    assert list(summary) == ["questions", "em", "em_interval", "f1", "f1_interval", *list(SUMMARY)[3:]]


def test_intervals_are_those_of_em_and_f1_in_percent():
    _, summary, rows = evaluated()
    for name in ("em", "f1"):
        low, high = bootstrap_interval(np.array([row[name] for row in rows]))
        assert summary[f"{name}_interval"] == pytest.approx([100 * low, 100 * high], abs=0.0051)
        assert summary[f"{name}_interval"][0] < summary[name] < summary[f"{name}_interval"][1]
    assert evaluated(CASES[:1])[1]["em_interval"] == [100.0, 100.0]


def test_rows_by_hand():
    _, _, rows = evaluated()
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(8)]
    assert [row["prediction"] for row in rows] == [prediction for _, prediction, _, _ in CASES]
    assert [row["em"] for row in rows] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert [row["f1"] for row in rows] == pytest.approx([1, 0.8, 2 / 3, 0, 1, 0, 0, 0])
    assert [row["mrr@10"] for row in rows] == pytest.approx([1, 1 / 3, 1 / 6, 1 / 4, 0, 0, 0, 0])
    assert [[row[f"recall@{depth}"] for depth in (1, 5, 20)] for row in rows] == [
        [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1],
    ]  # fmt: skip
    assert rows[1] == {
        "id": "q1", "question": "Question 1?", "answers": ["blue river bank"], "prediction": "blue river",
        "score": 0.75, "silence": 0.25, "em": 0.0, "f1": pytest.approx(0.8), "recall@1": 0.0,
        "recall@5": 1.0, "recall@20": 1.0, "mrr@10": pytest.approx(1 / 3), "ndcg@10": pytest.approx(1 / 2),
        "answer_in_context": 1.0, "context": "Context 1.", "verdict": "reader error",
    }  # fmt: skip


def test_verdicts_by_hand():
    assert [row["verdict"] for row in evaluated()[2]] == VERDICTS


@pytest.mark.parametrize(("top_k", "verdict"), [(5, "retrieval miss"), (6, "context miss")])
def test_a_passage_is_found_among_the_top_k(top_k, verdict):
    assert evaluated(top_k=top_k)[2][2]["verdict"] == verdict


def test_the_generator_gets_contexts_and_limits():
    generator, _, _ = evaluated()
    asked = sorted(pair for batch in generator.asked for pair in batch)
    assert asked == [(f"Question {number}?", f"Context {number}.") for number in range(8)]
    assert [len(batch) for batch in generator.asked] == [3, 3, 2]
    assert generator.options == {
        "context_tokens": 50,
        "max_new_tokens": 7,
        "min_new_tokens": 0,
        "no_repeat_ngram_size": 0,
        "extractive": False,
        "batch_size": 3,
    }


def test_batches_have_similar_lengths_and_do_not_depend_on_the_number_of_processes(monkeypatch):
    """The second of two processes computes every second batch of one process, and gets all answers."""

    class Second:
        process_index, num_processes = 1, 2

    table = contexts_of(CASES)
    longer = table[:] | {"context": ["x" * (number * 5 % 8) for number in range(8)]}
    table = Dataset.from_dict(longer, features=CONTEXT_FEATURES)
    alone = FixedAnswers()
    result = evaluate_pair(Accelerator(cpu=True), alone, table, **OPTIONS)
    lengths = [[len(context) for _, context in batch] for batch in alone.asked]
    assert [length for batch in lengths for length in batch] == sorted(range(8), reverse=True)
    first = [(prompt_key(*each), Written(CASES[at][1], 0.75, 0.25)) for at, each in enumerate(prompts_of(table))]
    monkeypatch.setattr(cozyrag.evaluation.evaluation, "gather_object", lambda mine: [*first, *mine])
    second = FixedAnswers()
    assert evaluate_pair(Second(), second, table, **OPTIONS) == result
    assert second.asked == alone.asked[1::2]


def prompts_of(table):
    return list(zip(table["question"], table["context"], strict=True))


def test_known_answers_are_reused():
    """Only new prompts go through the generator, and each of them once."""
    table, known, generator = contexts_of(CASES), {}, FixedAnswers()
    first = evaluate_pair(Accelerator(cpu=True), generator, table, known=known, **OPTIONS)
    assert len(known) == 8 and len(generator.asked) == 3
    assert evaluate_pair(Accelerator(cpu=True), generator, table, known=known, **OPTIONS) == first
    assert len(generator.asked) == 3  # no new pass
    changed = [
        f"Another context {number}." if number in (2, 5) else text for number, text in enumerate(table["context"])
    ]
    other = Dataset.from_dict(table[:] | {"context": changed}, features=CONTEXT_FEATURES)
    _, rows = evaluate_pair(Accelerator(cpu=True), generator, other, known=known, **OPTIONS)
    assert sorted(generator.asked[3]) == [("Question 2?", "Another context 2."), ("Question 5?", "Another context 5.")]
    assert len(generator.asked) == 4 and [row["context"] for row in rows] == changed
    twice = Dataset.from_dict({name: column + column for name, column in table[:].items()}, features=CONTEXT_FEATURES)
    generator = FixedAnswers()
    assert len(evaluate_pair(Accelerator(cpu=True), generator, twice, **OPTIONS)[1]) == 16
    assert sum(map(len, generator.asked)) == 8


def test_thresholds_apply_to_the_same_answers():
    known, generator = {}, FixedAnswers()
    for threshold, expected in ((0.3, "the red fox!"), (0.2, "")):
        options = OPTIONS | {"known": known, "no_answer_threshold": threshold}
        _, rows = evaluate_pair(Accelerator(cpu=True), generator, contexts_of(CASES), **options)
        assert rows[0]["prediction"] == expected
    assert len(generator.asked) == 3 and generator.options["min_new_tokens"] == 1


def test_the_summary_is_computed_from_the_rows():
    rows = evaluated()[2]
    assert summarize(rows) == evaluated()[1]
    assert summarize(rows[:1])["f1"] == 100.0
    assert summarize(rows[:2])["f1"] == 90.0
    assert summarize(rows[:3])["f1"] == 82.22


def test_each_search_is_scored_by_its_own_rank():
    ranks = [{"dense": 1, "sparse": 0, "hybrid": None}, {"dense": 6, "sparse": 2, "hybrid": None}]
    table = contexts_of(CASES[:2]).add_column("ranks", ranks)
    summary, rows = evaluate_pair(Accelerator(cpu=True), FixedAnswers(), table, **OPTIONS)
    assert [row["dense_recall@1"] for row in rows] == [1.0, 0.0] and [row["dense_recall@5"] for row in rows] == [
        1.0,
        0.0,
    ]
    assert rows[1]["dense_mrr@10"] == pytest.approx(1 / 6) and rows[1]["dense_recall@20"] == 1.0
    assert [row["sparse_mrr@10"] for row in rows] == [0.0, 0.5]
    assert rows[1]["sparse_ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert not [name for row in (*rows, summary) for name in row if name.startswith("hybrid")]
    assert (summary["dense_recall@1"], summary["sparse_recall@5"]) == (50.0, 50.0)
    assert summary["dense_recall@1_interval"] == [0.0, 100.0] and "sparse_recall@1_interval" not in summary
    _, plain = evaluate_pair(Accelerator(cpu=True), FixedAnswers(), contexts_of(CASES[:2]), **OPTIONS)
    assert [{name: row[name] for name in plain[0]} for row in rows] == plain  # the pair's scores are as before


def test_table_of_the_searches_by_hand():
    def summary(**values):
        return {
            f"{name}_recall@{depth}": value
            for name, given in values.items()
            for depth, value in zip((1, 5), given, strict=True)
        }

    before, after = (summary(dense=(d, 80.0), sparse=(70.0, 90.0), hybrid=(95.0, 99.96)) for d in (60.04, 65.0))
    assert retrieval_table([("before", before), ("after", after)]).split("\n") == [
        "| recall | dense@1 | dense@5 | sparse@1 | sparse@5 | hybrid@1 | hybrid@5 |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| before | 60.0 | 80.0 | 70.0 | 90.0 | 95.0 | 100.0 |",
        "| after | 65.0 | 80.0 | 70.0 | 90.0 | 95.0 | 100.0 |",
        "| change | +5.0 | +0.0 | +0.0 | +0.0 | +0.0 | +0.0 |",
        "",
        "dense: the retriever's vectors alone; sparse: BM25 alone; hybrid: both, which is how the pair searches.",
    ]
    two = retrieval_table([("before", summary(dense=(1.0, 2.0), sparse=(3.0, 4.0)))])
    assert "change" not in two and two.endswith("sparse: BM25 alone, which is how the pair searches.")
    assert retrieval_table([("older", {"recall@1": 1.0}), ("before", before)]).count("\n") == 4
    assert max(map(len, two.split("\n"))) <= 105


def test_one_search_or_an_older_run_has_no_such_table():
    assert retrieval_table([("before", {"dense_recall@1": 1.0, "dense_recall@5": 2.0})]) == ""
    assert retrieval_table([("before", {"recall@1": 1.0})]) == retrieval_table([]) == ""


@pytest.mark.parametrize(
    ("questions", "reach", "moves"), [(1, 50, "100"), (5, 44, "20"), (16, 24, "6.25"), (49, 14, "2.04")]
)
def test_few_questions_are_said_to_be_few(questions, reach, moves):
    sentence = few_questions(questions)
    assert f"up to {reach} points to each side, and one question moves them by {moves}" in sentence
    assert sentence.startswith(f"{questions} validation question{'s are' if questions > 1 else ' is'} few")
    assert few_questions(50) == few_questions(10_000) == ""


def test_the_reach_of_few_questions_is_that_of_the_bootstrap():
    half = np.array([0.0, 1.0] * 8)
    low, high = bootstrap_interval(half)
    assert (high - low) / 2 * 100 == pytest.approx(24, abs=2)


def test_table_by_hand():
    def summary(**values):
        shown = dict.fromkeys(cozyrag.evaluation.evaluation.SHOWN, 0.0) | values
        return shown | {"questions": 8, "em_interval": [10.04, 30.06], "f1_interval": [11.0, 31.26]}

    before, after = summary(em=10.04, f1=20.0), summary(em=12.5, f1=19.94, **{"mrr@10": 100.0})
    heads = [
        "| | em | f1 | recall@1 | recall@5 | recall@20 | mrr@10 | answer_in_context |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    foot = ["", "Percent of 8 questions; 95 % intervals of the last line: EM 10.0 to 30.1, F1 11.0 to 31.3."]
    line = "| before | 10.0 | 20.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |"
    assert table([("before", before)]).split("\n") == [*heads, line, *foot]
    assert table([("before", before), ("between", before), ("after", after)]).split("\n") == [
        *heads,
        line,
        line.replace("before", "between"),
        "| after | 12.5 | 19.9 | 0.0 | 0.0 | 0.0 | 100.0 | 0.0 |",
        "| change | +2.5 | -0.1 | +0.0 | +0.0 | +0.0 | +100.0 | +0.0 |",
        *foot,
    ]


# ---- no-answer threshold ----


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.3, 0.3, 0.7, 1.0]),
            st.sampled_from([0.0, 0.5, 1.0]),
            st.booleans(),
            st.sampled_from([0.5, 1.0]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_threshold_is_the_best_of_all(rows):
    """Against all thresholds one by one, with the rule of the generator: empty above, else the answer."""
    nothing, gain, answerable, weights = (np.array(column) for column in zip(*rows, strict=True))
    gain = np.where(answerable, gain, 0.0)

    def score(threshold):
        silent = nothing > threshold
        return float(np.sum(weights * np.where(silent, ~answerable, gain)) / np.sum(weights))

    threshold, best = choose_threshold(nothing, gain, answerable, weights)
    assert best == pytest.approx(score(threshold))
    assert best == pytest.approx(max(score(t) for t in [*np.linspace(0, 1, 41), *nothing, -0.0]))


def test_without_unanswerable_questions_it_always_answers():
    chosen = choose_threshold(np.array([0.9, 0.2]), np.array([0.0, 1.0]), np.array([True, True]), np.ones(2))
    assert chosen == (1.0, 0.5)


def test_verdicts_of_empty_answers_and_unanswerable_questions():
    cases = [(["Red Fox"], "", 1, True), ([], "wrong", None, False), ([], "", None, False)]
    _, rows = evaluate_pair(Accelerator(cpu=True), FixedAnswers(cases), contexts_of(cases), **OPTIONS)
    assert [row["verdict"] for row in rows] == ["abstained", "answered an unanswerable question", "correct"]


def test_a_correct_answer_in_another_form_is_a_format_mismatch():
    cases = [
        (["co-operation"], "co operation", 1, True),
        (["U.S. Navy"], "u. s. navy", None, False),
        (["1815"], "in 1815", 1, True),
    ]
    _, rows = evaluate_pair(Accelerator(cpu=True), FixedAnswers(cases), contexts_of(cases), **OPTIONS)
    assert [row["em"] for row in rows] == [0, 0, 0]
    assert [row["verdict"] for row in rows] == ["format mismatch", "format mismatch", "reader error"]
    assert {row["verdict"] for row in rows} <= set(VERDICTS_KNOWN)


def test_rows_of_an_older_version_are_summarized_without_missing_metrics():
    rows = [{name: value for name, value in row.items() if name != "ndcg@10"} for row in evaluated()[2]]
    assert summarize(rows) == {name: value for name, value in evaluated()[1].items() if name != "ndcg@10"}


@pytest.mark.parametrize(
    ("prediction", "source"),
    [
        ("the Fox", "A fox is red."),
        ("RED", "A fox is red."),
        ("re", "(not in the context)"),
        ("", "(not in the context)"),
    ],
)
def test_an_answer_is_in_the_context_by_the_rule_for_matching(prediction, source):
    row = {"question": "q", "prediction": prediction, "answers": ["fox"], "verdict": "correct", "f1": 1.0}
    shown = cozyrag.evaluation.evaluation.examples([row | {"context": "T: One. A fox is red.\nU: Two."}])
    assert shown.endswith(f"source: {source}")
