"""Do no harm: what is kept and what is taken back, as a rule and in a whole run."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import cozyrag.training.rounds
from cozyrag.models.generator import Generator, Written
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.index_file import made_by
from cozyrag.run import train
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.training.rollback import Verdict, decide
from cozyrag.training.round_cache import Answers


def scores(ones, of=100):
    return np.array([1.0] * ones + [0.0] * (of - ones))


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (50, 60, True),
        (60, 50, False),
        (50, 50, True),
        (100, 100, True),
        (0, 0, True),
        (100, 99, True),
        (100, 98, False),
        (0, 1, True),
    ],
)
def test_a_model_is_kept_unless_the_questions_say_it_got_worse(before, after, kept):
    assert decide(scores(before), scores(after)).kept is kept


def test_questions_are_compared_in_pairs():
    before, after = scores(50), scores(50)[::-1].copy()  # the same mean, every question turned over
    assert 0.3 < decide(before, after).worse < 0.7
    clear = decide(scores(50), np.maximum(scores(50), scores(10)[::-1]))
    assert clear.worse == 0 and clear.interval[0] > 0


def test_the_verdict_tells_numbers_in_percent_and_the_sentence_says_them():
    verdict = decide(scores(60), scores(40))
    assert (verdict.before, verdict.after) == (60.0, 40.0)
    assert verdict.interval[0] < -20 < verdict.interval[1] < 0
    assert verdict.sentence("retriever", "recall@5").startswith(
        "retriever taken back to what it was before this phase: recall@5 60.0 -> 40.0 ("
    )
    assert decide(scores(40), scores(60)).sentence("generator", "f1").startswith("generator kept: f1 40.0 -> 60.0 (+")


# ---- in a run whose training is replaced by damage ----


def spoil(model):
    """Stands in for a phase of one step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return 1


def nothing(*arguments, **options):
    return 0


@pytest.fixture
def run(corpus_files, generator_path, retriever_path, tmp_path, monkeypatch):
    """run(gate): a round that spoils the retriever; gives the output folder and the gate's rows."""

    def go(gate, *more):
        files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
        models = ["--generator", str(generator_path), "--retriever", str(retriever_path)]
        small = [
            "--rounds",
            "1",
            "--retrieval",
            "dense",
            "--context_tokens",
            "64",
            "--answer_tokens",
            "4",
            "--threads",
            "1",
        ]
        train([*files, *models, *small, "--output_dir", str(tmp_path / "out"), "--rollback", gate, *more])
        rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        return tmp_path / "out", [row for row in rows if row["kind"] == "rollback"]

    return go


def test_a_spoiled_retriever_is_taken_back_with_its_index(run, monkeypatch, retriever_path):
    monkeypatch.setattr(cozyrag.training.rounds, "train_generator", nothing)
    monkeypatch.setattr(
        cozyrag.training.rounds, "train_retriever", lambda a, retriever, *rest, **options: spoil(retriever.model)
    )
    folder, rows = run("on")
    [verdict] = [row for row in rows if row["model"] == "retriever"]
    assert verdict["kept"] is False and verdict["after"] < verdict["before"] and verdict["metric"] == "recall@5"
    saved = Retriever.load(str(folder / "retriever"))
    assert weights_fingerprint(saved.model) == weights_fingerprint(Retriever.load(str(retriever_path)).model)
    assert made_by(folder / "index") == saved.fingerprint()
    summaries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in summaries if row["kind"] == "evaluation")
    assert before["recall@5"] == after["recall@5"]


def test_without_the_gate_it_stays(run, monkeypatch, retriever_path):
    monkeypatch.setattr(cozyrag.training.rounds, "train_generator", nothing)
    monkeypatch.setattr(
        cozyrag.training.rounds, "train_retriever", lambda a, retriever, *rest, **options: spoil(retriever.model)
    )
    folder, rows = run("off")
    assert rows == []
    saved = Retriever.load(str(folder / "retriever"))
    assert weights_fingerprint(saved.model) != weights_fingerprint(Retriever.load(str(retriever_path)).model)


def test_a_generator_that_took_no_step_is_not_examined_again(run, monkeypatch):
    looked, real = [], cozyrag.training.rounds.evaluate
    monkeypatch.setattr(
        cozyrag.training.rounds, "evaluate_pair", lambda *given, **options: looked.append(1) or real(*given, **options)
    )
    _, rows = run("on", "--generator_steps", "0", "--retriever_steps", "1")
    assert len(looked) == 2 and [row["model"] for row in rows] == ["retriever"]  # before the round and after it


@pytest.fixture
def asked(monkeypatch):
    """How many questions each evaluation of the run puts to the generator."""
    counts, write = [], Generator.write
    monkeypatch.setattr(Generator, "write", lambda self, texts, *rest, **options: counts.append(len(texts)) or write(self, texts, *rest, **options))  # fmt: skip
    return counts


def test_answers_of_the_same_weights_to_the_same_prompts_are_written_once(run, asked, monkeypatch):
    """Before, after the generator's phase, and no more: the retriever stays, so the last evaluation knows every answer."""
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    run("on", "--generator_steps", "1")
    assert asked == [16, 16]


def test_answers_of_a_generator_that_was_rolled_back_are_known(run, asked, monkeypatch):
    monkeypatch.setattr(
        cozyrag.training.rounds, "train_generator", lambda a, generator, *rest, **options: spoil(generator.model)
    )
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    monkeypatch.setattr(
        cozyrag.training.rounds, "judge", lambda before, after: Verdict(False, 1.0, 0.0, (0.0, 0.0), 1.0)
    )
    run("on", "--rounds", "2")
    assert asked == [16, 16]  # the second round spoils it in the same way


def test_a_resumed_run_finds_its_answers_again(run, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    run("on", "--generator_steps", "1")
    again = Answers(Accelerator(cpu=True), next((tmp_path / "out" / "answers").iterdir()))
    assert len(again) == 16 and all(isinstance(each, Written) for each in again.values())
    again.path.write_text("{")
    assert len(Answers(Accelerator(cpu=True), again.path)) == 0  # a damaged file is none


def test_a_spoiled_generator_is_taken_back(run, monkeypatch, generator_path):
    untouched = weights_fingerprint(Generator.load(str(generator_path)).model)
    real = cozyrag.training.rounds.evaluate

    def evaluate_pair(accelerator, generator, contexts, **options):
        """The real examination, except that the untouched generator answers everything right."""
        if weights_fingerprint(generator.model) == untouched:
            right = dict(zip(contexts["question"][:], (answers[0] for answers in contexts["answers"][:]), strict=True))
            given = lambda asked, *rest, **more: [Written(right[text], 1.0, 0.0) for text in asked]  # noqa: E731
            monkeypatch.setattr(generator, "write", given)
        elif "write" in vars(generator):
            monkeypatch.delattr(generator, "write")
        return real(accelerator, generator, contexts, **options)

    monkeypatch.setattr(cozyrag.training.rounds, "evaluate_pair", evaluate_pair)
    monkeypatch.setattr(
        cozyrag.training.rounds, "train_generator", lambda a, generator, *rest, **options: spoil(generator.model)
    )
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    folder, rows = run("on")
    [verdict] = [row for row in rows if row["model"] == "generator"]
    assert (verdict["kept"], verdict["before"], verdict["metric"]) == (False, 100.0, "f1")
    assert weights_fingerprint(Generator.load(str(folder / "generator")).model) == untouched
