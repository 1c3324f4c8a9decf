"""Calibrated certainty: fitted by hand-made truths, kept only where it helps, saved, loaded, used as a threshold."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny

from benchmarks.quality import calibration as methods
from cozyrag import cli
from cozyrag.errors import InputError
from cozyrag.evaluation import calibration
from cozyrag.evaluation.calibration import Calibration, calibrated, certainty_of, coverage_table, sentence
from cozyrag.pipeline import CozyRAG

ASKED = [row["question"] for row in tiny.corpus()[1][:6]]
SHIFT = Calibration(0.5, -1.0, 200)


def rows(count, seed=0, *, truth=SHIFT):
    """Evaluated rows whose answers are right as often as `truth` says."""
    draws = np.random.default_rng(seed)
    scores = draws.uniform(0.3, 0.999, count)
    right = draws.random(count) < truth(scores)
    return [
        {"prediction": "x", "score": float(score), "em": float(each)} for score, each in zip(scores, right, strict=True)
    ]


def test_platt_scaling_finds_the_truth_and_halves_the_error_on_other_questions():
    made, facts = calibrated(rows(4000))
    assert made.slope == pytest.approx(0.5, abs=0.08) and made.intercept == pytest.approx(-1, abs=0.15)
    assert facts["before"] > 0.25 and facts["after"] < 0.04 and made.questions == 4000
    scores, correct = calibration.certainties(rows(4000, seed=1))
    assert calibration.calibration_error(made(scores), correct) < 0.04 < calibration.calibration_error(scores, correct)
    assert f"error {facts['before']:.3f} before, {facts['after']:.3f} after" in sentence(facts, made)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "found 0, 0 of them right"),
        (rows(99), "at least 100 answers"),
        ([row | {"em": 1.0} for row in rows(200)], "found 200, 200 of them right"),
        ([row | {"em": float(n < 9)} for n, row in enumerate(rows(200))], "found 200, 9 of them right"),
        ([row | {"prediction": ""} for row in rows(200)], "found 0"),
        ([row | {"em": float(n % 2)} for n, row in enumerate(sorted(rows(200), key=lambda r: r["score"]))], None),
        ([row | {"em": float(row["score"] < 0.6)} for row in rows(300)], "would not improve"),
    ],
    ids=["none", "few", "all right", "9 right", "silent", "even", "reversed"],
)
def test_what_does_not_suffice_leaves_certainty_as_it_is_and_says_so(given, message):
    made, facts = calibrated(given)
    if message is None:  # certainty tells nothing, and the calibrated one says so
        assert made is None or abs(float(made(np.array([0.99]))[0]) - 0.5) < 0.25
    else:
        assert made is None and message in sentence(facts, made)


def test_a_well_calibrated_generator_is_left_or_hardly_changed():
    made, _ = calibrated(rows(2000, truth=Calibration(1.0, 0.0, 1)))
    scores = np.linspace(0.35, 0.95, 7)
    assert made is None or np.abs(made(scores) - scores).max() < 0.06


def test_certainty_by_hand_and_that_of_an_empty_answer_stays():
    assert SHIFT(np.array([0.5]))[0] == pytest.approx(1 / (1 + np.e))
    assert np.isfinite(SHIFT(np.array([0.0, 1.0]))).all() and 0 <= SHIFT(np.array([0.0]))[0] < SHIFT(np.array([1.0]))[0]
    assert certainty_of(SHIFT, ["a", ""], [0.5, 0.8]) == [pytest.approx(1 / (1 + np.e)), 0.8]
    assert certainty_of(None, ["a"], [0.7]) == [0.7] and certainty_of(SHIFT, [], []) == []


def test_coverage_by_hand():
    lines = coverage_table(np.array([0.2, 0.6, 0.8, 0.95]), np.array([0.0, 1.0, 0.0, 1.0])).splitlines()
    assert lines[2:] == [
        "| 0.0 | 100.0 | 50.0 |", "| 0.3 | 75.0 | 66.7 |", "| 0.5 | 75.0 | 66.7 |", "| 0.7 | 50.0 | 50.0 |",
        "| 0.9 | 25.0 | 100.0 |",
    ]  # fmt: skip


# ---- in a pair


@pytest.fixture
def folder(pair_folder, tmp_path):
    """A calibrated copy of the tiny pair."""
    copy = Path(shutil.copytree(pair_folder, tmp_path / "pair"))
    write(copy, asdict(SHIFT))
    return copy


def write(folder, value):
    facts = json.loads((folder / "cozyrag.json").read_text())
    (folder / "cozyrag.json").write_text(json.dumps(facts | {"calibration": value}))


def test_a_calibrated_pair_answers_the_same_with_other_certainties_and_an_older_one_as_before(folder, pair_folder):
    raw, pair = CozyRAG.from_pretrained(pair_folder), CozyRAG.from_pretrained(folder)
    assert raw.calibration is None and pair.calibration == SHIFT
    for before, after in zip(raw.answers(ASKED), pair.answers(ASKED), strict=True):
        assert before.text == after.text
        expected = float(SHIFT(np.array([before.score]))[0]) if before.text else before.score
        assert after.score == pytest.approx(expected)


def test_less_certain_answers_are_withheld_and_the_threshold_can_be_set_afterwards(folder):
    pair = CozyRAG.from_pretrained(folder, min_certainty=1.0)
    assert {answer.text for answer in pair.answers(ASKED)} == {""}
    pair.min_certainty = None
    answers = pair.answers(ASKED)
    assert any(answer.text for answer in answers)
    pair.min_certainty = sorted(answer.score for answer in answers)[3]
    for free, held in zip(answers, pair.answers(ASKED), strict=True):
        assert held.score == free.score and held.text == (free.text if free.score >= pair.min_certainty else "")


@pytest.mark.parametrize("least", [-0.1, 1.1, float("nan"), "0.5", True, [0.5]])
def test_a_threshold_that_is_no_share_is_one_sentence(folder, least):
    with pytest.raises(InputError, match="min_certainty: expected a number from 0 to 1"):
        CozyRAG.from_pretrained(folder, min_certainty=least)
    pair = CozyRAG.from_pretrained(folder)
    pair.min_certainty = least
    with pytest.raises(InputError, match="min_certainty: expected a number from 0 to 1"):
        pair.answers(ASKED)


@pytest.mark.parametrize(
    "value",
    [3, [], {}, {"slope": 1.0}, {"slope": "1", "intercept": 0, "questions": 1}, asdict(SHIFT) | {"slope": 0},
     asdict(SHIFT) | {"slope": float("nan")}, asdict(SHIFT) | {"intercept": None}],
    ids=range(8),
)  # fmt: skip
def test_a_calibration_that_makes_no_sense_is_refused_naming_the_file(folder, value):
    write(folder, value)
    with pytest.raises(InputError, match="cozyrag.json: expected the calibration as three numbers"):
        CozyRAG.from_pretrained(folder)


# ---- evaluating, saving


def test_evaluate_scores_the_rows_with_certainty_and_gold_passages(folder, corpus_files, capsys):
    pair = CozyRAG.from_pretrained(folder)
    asked = tiny.corpus()[1][:8]
    found = pair.evaluate(asked, baselines=True)
    assert (found.questions, found.passages, len(found.rows)) == (8, 40, 8)
    assert set(found.scores) == {
        "em",
        "f1",
        "answer_in_context",
        "recall@1",
        "recall@5",
        "recall@20",
        "mrr@10",
        "ndcg@10",
    }
    assert set(found.baselines) == {"closed book", "gold context"}
    assert found.baselines["gold context"]["answer_in_context"]["mean"] == 100.0
    wanted = [answer.score for answer in pair.answers([row["question"] for row in asked])]
    assert [row["certainty"] for row in found.rows] == pytest.approx(wanted, rel=1e-3)
    assert "8 questions, 40 passages" in str(found) and "answer in context" in str(found)
    renamed = [{"q": row["question"], "answers": row["answers"]} for row in asked]
    assert pair.evaluate(renamed, columns={"question": "q"}, limit=3).questions == 3


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (None, {}, "questions: expected a path"),
        ([{"question": "a?"}], {}, "questions, line 1|questions"),
        ([{"question": "", "answer": "b"}], {}, "questions, line 1: empty question"),
        ("missing.tsv", {}, "Expected a file at"),
        (tiny.corpus()[1][:2], {"limit": 0}, "limit: expected a whole number of at least 1"),
        (tiny.corpus()[1][:2], {"limit": "3"}, "limit: expected a whole number"),
        (tiny.corpus()[1][:2], {"columns": {"questoin": "q"}}, "columns: expected names among"),
        (tiny.corpus()[1][:2], {"columns": ["question=q"]}, "columns: expected names among"),
        (tiny.corpus()[1][:2], {"batch_size": 0}, "batch_size: expected a whole number"),
        (tiny.corpus()[1][:2], {"batch_size": "8"}, "batch_size: expected a whole number"),
    ],
    ids=range(10),
)
def test_what_cannot_be_evaluated_is_one_sentence(pair_folder, given, options, message):
    with pytest.raises(InputError, match=message):
        CozyRAG.from_pretrained(pair_folder).evaluate(given, **options)


def test_a_saved_copy_is_the_same_pair_with_its_present_settings(folder, tmp_path):
    pair = CozyRAG.from_pretrained(folder)
    pair.top_k = 2
    pair.save_pretrained(tmp_path / "copy")
    again = CozyRAG.from_pretrained(tmp_path / "copy")
    assert (again.top_k, again.calibration) == (2, SHIFT)
    assert again.answers(ASKED) == pair.answers(ASKED)
    for path in (folder / "generator").iterdir():
        assert (tmp_path / "copy" / "generator" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="Expected a new or empty folder for the pair"):
        pair.save_pretrained(tmp_path / "copy")
    made = CozyRAG(
        pair.generator, pair.retriever, pair.index, mode="dense", weights={"vectors": 1.0, "sentence_words": 0.0},
        stemmer="none", top_k=2, decoding=pair.decoding,
    )  # fmt: skip
    with pytest.raises(InputError, match="found one made in memory"):
        made.save_pretrained(tmp_path / "third")


def test_the_command_prints_and_writes_what_evaluate_returns(folder, corpus_files, tmp_path, monkeypatch, capsys):
    questions, out = str(corpus_files["eval_questions"]), tmp_path / "scores.json"
    words = ["cozyrag", "evaluate", str(folder), "--questions", questions, "--limit", "6", "--output", str(out)]
    monkeypatch.setattr("sys.argv", words)
    cli.main()
    found = CozyRAG.from_pretrained(folder).evaluate(questions, limit=6)
    shown = capsys.readouterr().out
    assert str(found) in shown and "scores.questions.jsonl" in shown
    assert json.loads(out.read_text()) == json.loads(json.dumps(found.summary()))
    written = [json.loads(line) for line in (tmp_path / "scores.questions.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(found.rows))


def test_ask_says_that_it_does_not_know(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cozyrag", "ask", str(folder), "--min_certainty", "1", ASKED[0]])
    cli.main()
    assert capsys.readouterr().out.startswith("I do not know   (certainty 0.")


def test_methods_are_compared_on_other_questions(tmp_path, monkeypatch, capsys):
    files = [tmp_path / "fit.jsonl", tmp_path / "test.jsonl"]
    for seed, path in enumerate(files):
        tiny.write_jsonl(path, rows(400, seed))
    monkeypatch.setattr("sys.argv", ["calibration", "--fit", str(files[0]), "--test", str(files[1])])
    methods.main()
    cells = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    errors = {name.strip(): float(cell.split()[0]) for name, cell in cells[1:5]}
    assert errors["Platt scaling (used)"] < errors["temperature scaling"] < errors["confidence of the generator"]
