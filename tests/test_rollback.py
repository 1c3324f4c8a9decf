"""Rollback: the decision to keep a model, and models that are rolled back in a run."""

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
from cozyrag.training.rollback import Decision, decide
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
def test_a_model_is_kept_unless_it_is_worse_on_the_questions(before, after, kept):
    assert decide(scores(before), scores(after)).kept is kept


def test_questions_are_compared_in_pairs():
    before, after = scores(50), scores(50)[::-1].copy()  # the same mean, every question changed
    assert 0.3 < decide(before, after).worse < 0.7
    clear = decide(scores(50), np.maximum(scores(50), scores(10)[::-1]))
    assert clear.worse == 0 and clear.interval[0] > 0


def test_the_decision_and_its_sentence_are_in_percent():
    decision = decide(scores(60), scores(40))
    assert (decision.before, decision.after) == (60.0, 40.0)
    assert decision.interval[0] < -20 < decision.interval[1] < 0
    assert decision.sentence("retriever", "recall@5").startswith("retriever rolled back: recall@5 60.0 -> 40.0 (")
    assert decide(scores(40), scores(60)).sentence("generator", "f1").startswith("generator kept: f1 40.0 -> 60.0 (+")


# ---- runs whose training is replaced by damage


def spoil(accelerator, trained, *rest, **options):
    """Replaces a phase of one step."""
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return 1


def nothing(*arguments, **options):
    return 0


@pytest.fixture
def run(corpus_files, generator_path, retriever_path, tmp_path, monkeypatch):
    """run(rollback, ...): a round; returns the output folder and the rows of rollback in metrics.jsonl."""

    def go(rollback, *more):
        files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
        models = ["--generator", str(generator_path), "--retriever", str(retriever_path)]
        small = "--rounds 1 --retrieval dense --context_tokens 64 --answer_tokens 4 --threads 1".split()
        train([*files, *models, *small, "--output_dir", str(tmp_path / "out"), "--rollback", rollback, *more])
        rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        return tmp_path / "out", [row for row in rows if row["kind"] == "rollback"]

    return go


def test_a_spoiled_retriever_is_rolled_back_with_its_index(run, monkeypatch, retriever_path):
    monkeypatch.setattr(cozyrag.training.rounds, "train_generator", nothing)
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", spoil)
    folder, rows = run("on")
    [decision] = [row for row in rows if row["model"] == "retriever"]
    assert decision["kept"] is False and decision["after"] < decision["before"] and decision["metric"] == "recall@5"
    saved = Retriever.load(str(folder / "retriever"))
    assert weights_fingerprint(saved.model) == weights_fingerprint(Retriever.load(str(retriever_path)).model)
    assert made_by(folder / "index") == saved.fingerprint()
    summaries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (row for row in summaries if row["kind"] == "evaluation")
    assert before["recall@5"] == after["recall@5"]


def test_without_rollback_it_is_kept(run, monkeypatch, retriever_path):
    monkeypatch.setattr(cozyrag.training.rounds, "train_generator", nothing)
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", spoil)
    folder, rows = run("off")
    assert rows == []
    saved = Retriever.load(str(folder / "retriever"))
    assert weights_fingerprint(saved.model) != weights_fingerprint(Retriever.load(str(retriever_path)).model)


def test_a_generator_without_steps_is_not_evaluated_again(run, monkeypatch):
    calls, real = [], cozyrag.training.rounds.evaluate_pair
    monkeypatch.setattr(
        cozyrag.training.rounds, "evaluate_pair", lambda *given, **options: calls.append(1) or real(*given, **options)
    )
    _, rows = run("on", "--generator_steps", "0", "--retriever_steps", "1")
    assert len(calls) == 2 and [row["model"] for row in rows] == ["retriever"]  # before the round and after it


@pytest.fixture
def asked(monkeypatch):
    """The numbers of questions that the generator answers in each evaluation."""
    counts, real = [], Generator.write

    def write(self, texts, *rest, **options):
        counts.append(len(texts))
        return real(self, texts, *rest, **options)

    monkeypatch.setattr(Generator, "write", write)
    return counts


def test_answers_of_the_same_weights_to_the_same_prompts_are_generated_once(run, asked, monkeypatch):
    """At the start and after the generator phase; the retriever is unchanged, so the last evaluation reads them."""
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    run("on", "--generator_steps", "1")
    assert asked == [16, 16]


def test_answers_of_a_generator_that_was_rolled_back_are_read_again(run, asked, monkeypatch):
    monkeypatch.setattr(cozyrag.training.rounds, "train_generator", spoil)
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    monkeypatch.setattr(
        cozyrag.training.rounds, "decide", lambda before, after: Decision(False, 1.0, 0.0, (0.0, 0.0), 1.0)
    )
    run("on", "--rounds", "2")
    assert asked == [16, 16]  # the second round spoils it in the same way


def test_a_resumed_run_reads_its_answers(run, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    run("on", "--generator_steps", "1")
    again = Answers(Accelerator(cpu=True), next((tmp_path / "out" / "answers").iterdir()))
    assert len(again) == 16 and all(isinstance(each, Written) for each in again.values())
    again.path.write_text("{")
    assert len(Answers(Accelerator(cpu=True), again.path)) == 0  # a damaged file is ignored


def test_a_spoiled_generator_is_rolled_back(run, monkeypatch, generator_path):
    untuned = weights_fingerprint(Generator.load(str(generator_path)).model)
    real = cozyrag.training.rounds.evaluate_pair

    def evaluate_pair(accelerator, generator, contexts, **options):
        """The real evaluation, except that the untuned generator answers every question correctly."""
        if weights_fingerprint(generator.model) == untuned:
            correct = {row["question"]: Written(row["answers"][0], 1.0, 0.0) for row in contexts}
            monkeypatch.setattr(generator, "write", lambda asked, *rest, **more: [correct[text] for text in asked])
        elif "write" in vars(generator):
            monkeypatch.delattr(generator, "write")
        return real(accelerator, generator, contexts, **options)

    monkeypatch.setattr(cozyrag.training.rounds, "evaluate_pair", evaluate_pair)
    monkeypatch.setattr(cozyrag.training.rounds, "train_generator", spoil)
    monkeypatch.setattr(cozyrag.training.rounds, "train_retriever", nothing)
    folder, rows = run("on")
    [decision] = [row for row in rows if row["model"] == "generator"]
    assert (decision["kept"], decision["before"], decision["metric"]) == (False, 100.0, "f1")
    assert weights_fingerprint(Generator.load(str(folder / "generator")).model) == untuned
