"""The self-test: its result for a healthy pair, each fault is found, and the models are unchanged after."""

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from tiny import corpus, make_retriever

from cozyrag import cli, run
from cozyrag.config import parse_settings
from cozyrag.data.corpus import Corpus
from cozyrag.data.passages import read_passages
from cozyrag.data.questions import features
from cozyrag.errors import InputError
from cozyrag.models import penalties
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import encode_examples
from cozyrag.models.retriever import Retriever
from cozyrag.models.token_losses import PenalizedLosses, TokenLosses
from cozyrag.pair_file import describe_pair
from cozyrag.preflight import loss_check
from cozyrag.preflight.loss_check import Term, check_terms, findings_line, findings_table, small_batch
from cozyrag.preflight.pair_check import check_pair
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.runtime.distributed import refuse
from cozyrag.training import training_pairs
from cozyrag.training.generator_phase import generator_step
from cozyrag.training.micro_batches import Cut
from cozyrag.training.retriever_phase import retriever_step
from cozyrag.training.training_pairs import TrainingPair, retriever_batch

PENALTIES = ["--repeat_penalty", "0.1", "--keyword_penalty", "0.1", "--short_penalty", "0.1"]
POOLER = "0.model.pooler.dense.weight"


@pytest.fixture
def generator(generator_path):
    return Generator.load(str(generator_path))


@pytest.fixture
def retriever(retriever_path):
    return Retriever.load(str(retriever_path), max_tokens=64)


def tables(questions=None, passages=None):
    own_passages, own_questions = corpus(12)
    rows = own_questions if questions is None else questions
    table = Dataset.from_dict({name: [row.get(name, []) for row in rows] for name in features()}, features=features())
    return Corpus(table, table, Dataset.from_list(passages or own_passages))


def settings(*arguments):
    return parse_settings(["--questions", "my.tsv", *arguments])


def check(generator, retriever, *arguments, corpus=None):
    """Findings by the name of their term."""
    findings = check_terms(generator, retriever, corpus or tables(), settings(*arguments))
    return {finding.term.name: finding for finding in findings}


def weight(model, name):
    return dict(model.named_parameters())[name]


def sabotage_contrastive(monkeypatch, spoil):
    """Let `spoil` change the contrastive loss."""
    real = training_pairs.contrastive_loss
    monkeypatch.setattr(training_pairs, "contrastive_loss", lambda *given, **options: spoil(real(*given, **options)))


# ---- a healthy pair


def test_every_active_term_of_a_healthy_pair_moves_its_model_and_comes_down(generator, retriever):
    everything = [
        *PENALTIES,
        "--repeat_ngram",
        "1",
        "--short_tokens",
        "9",
        "--sentence_weight",
        "1",
        "--feedback_weight",
        "0.5",
    ]
    found = check(generator, retriever, *everything)
    assert [(finding.term.name, finding.term.model) for finding in found.values()] == [
        ("cross-entropy", "generator"),
        ("penalty on repeats", "generator"),
        ("penalty on keywords", "generator"),
        ("penalty on shortness", "generator"),
        ("contrastive loss", "retriever"),
        ("sentence loss", "retriever"),
        ("generator feedback", "retriever"),
    ]
    for finding in found.values():
        size = {"generator": 28, "retriever": 21}[finding.term.model]
        assert (finding.moved, finding.tensors, finding.still, finding.foreign) == (size, size, (), ())
        assert finding.lowered is True and finding.verdict == "ok" and finding.fault is None
        assert 0 < finding.value < 100 and 0 < finding.norm < 100
    assert POOLER in dict(retriever.model.named_parameters())  # so that 21 is all but the pooler's two


def gradient_norm(model):
    return math.hypot(*(p.grad.norm().item() for p in model.parameters() if p.grad is not None))


def test_value_and_gradient_are_those_of_a_training_step(generator, retriever):
    found, batch, accelerator = check(generator, retriever), small_batch(tables()), Accelerator(cpu=True)
    tokenizer = generator.tokenizer
    examples = encode_examples(
        tokenizer,
        questions=batch.questions,
        contexts=batch.contexts,
        answers=batch.answers,
        context_tokens=128,
        max_length=generator.max_length,
    )
    (loss,) = generator_step(
        accelerator, TokenLosses(generator.model), examples, pad_id=tokenizer.pad_token_id, cut=Cut()
    )
    assert found["cross-entropy"].value == pytest.approx(loss, rel=1e-5)
    assert found["cross-entropy"].norm == pytest.approx(gradient_norm(generator.model), rel=1e-4)
    pairs = [
        TrainingPair(question, [], positive, range(len(batch.passages.ids)))
        for question, positive in zip(batch.questions, batch.positives, strict=True)
    ]
    step = retriever_batch(pairs, batch.passages, settings().training)
    told = retriever_step(accelerator, retriever, step, cut=Cut())
    assert found["contrastive loss"].value == pytest.approx(told["loss"], rel=1e-5)
    assert found["contrastive loss"].norm == pytest.approx(gradient_norm(retriever.model), rel=1e-4)


def test_a_term_is_alone_the_others_do_not_add_to_its_gradient(generator, retriever):
    alone = check(generator, retriever)["cross-entropy"]
    among = check(generator, retriever, *PENALTIES, "--short_tokens", "9")["cross-entropy"]
    assert (among.value, among.norm) == (pytest.approx(alone.value), pytest.approx(alone.norm))


def test_the_length_of_very_small_gradients_does_not_vanish(generator, retriever, monkeypatch):
    vector = weight(generator.model, "transformer.ln_f.weight")  # ones
    term = Term("tiny", "--off 0", "generator", lambda: 1e-21 * vector.sum())
    monkeypatch.setattr(loss_check, "active_terms", lambda *given: [term])
    finding = check(generator, retriever)["tiny"]
    assert finding.norm == pytest.approx(1e-21 * math.sqrt(32)) and finding.moved == 1 and finding.lowered


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["cross-entropy", "contrastive loss"]),
        (["--generator_steps", "0"], ["contrastive loss"]),
        (["--generator_epochs", "0"], ["contrastive loss"]),
        (["--retriever_steps", "0"], ["cross-entropy"]),
        (["--retriever_epochs", "0"], ["cross-entropy"]),
        (["--keyword_penalty", "1"], ["cross-entropy", "penalty on keywords", "contrastive loss"]),
        (["--keyword_penalty", "1", "--generator_steps", "0"], ["contrastive loss"]),
        (["--sentence_weight", "1"], ["cross-entropy", "contrastive loss", "sentence loss"]),
        (["--sentence_weight", "1", "--contrastive_weight", "0"], ["cross-entropy", "sentence loss"]),
        (["--feedback_weight", "1"], ["cross-entropy", "contrastive loss", "generator feedback"]),
        (["--feedback_weight", "1", "--contrastive_weight", "0"], ["cross-entropy", "generator feedback"]),
        (["--feedback_weight", "1", "--retriever_steps", "0"], ["cross-entropy"]),
        (["--rounds", "0"], []),
    ],
)
def test_what_is_switched_off_is_left_out(generator, retriever, arguments, names):
    assert list(check(generator, retriever, *arguments)) == names


def test_without_answers_only_the_retriever_is_checked_and_without_questions_nothing(generator, retriever):
    unanswered = tables([row | {"answers": []} for row in corpus(12)[1]])
    assert list(check(generator, retriever, corpus=unanswered)) == ["contrastive loss"]
    silent = check(generator, retriever, "--no_answer", "--feedback_weight", "1", corpus=unanswered)
    assert [finding.verdict for finding in silent.values()] == ["ok", "ok", "zero on this batch"]
    assert check(generator, retriever, corpus=tables([])) == {}


def test_the_batch_is_small_answered_and_on_gold_passages_where_they_are_known():
    passages, questions = corpus(12)
    questions[3]["answers"], questions[5]["passage_id"] = [], None
    questions[6]["answers"] = ["a very long answer", "no"]
    batch = small_batch(tables(questions))
    assert len(batch.questions) == loss_check.QUESTIONS and batch.questions[0] == questions[6]["question"]
    assert batch.answers[0] == "a very long answer"
    gold = {row["question"]: row["passage_id"] for row in questions}
    for question, context, place in zip(batch.questions, batch.contexts, batch.positives, strict=True):
        passage = next(row for row in passages if row["id"] == gold[question])
        assert (
            passage["text"].startswith(context) and batch.passages.to_read()[place] == f"{passage['title']}\n{context}"
        )
    assert len(set(batch.passages.to_read())) == len(batch.passages.ids) >= 3


def test_without_gold_passages_any_will_do_and_questions_on_one_passage_get_others_to_tell_it_from(
    generator, retriever
):
    unknown = [row | {"passage_id": None} for row in corpus(12)[1]]
    assert len(set(small_batch(tables(unknown)).positives)) == loss_check.QUESTIONS
    found = check(generator, retriever, corpus=tables(corpus(12)[1][-2:]))
    assert found["contrastive loss"].value > 0.01 and found["contrastive loss"].verdict == "ok"


# ---- zero is no fault


def test_a_penalty_with_nothing_to_do_has_no_occasion(generator, retriever):
    one_word = [row | {"answers": ["1"]} for row in corpus(12)[1]]
    found = check(generator, retriever, "--repeat_penalty", "1", "--repeat_ngram", "9", corpus=tables(one_word))
    repeats = found["penalty on repeats"]
    assert (repeats.value, repeats.moved, repeats.lowered) == (0, 0, None)
    assert repeats.fault is None and repeats.verdict == "zero on this batch"
    refuse(finding.fault for finding in found.values())
    assert "penalty on repeats is zero on this batch" in findings_line(list(found.values()), 1)


def test_one_passage_alone_gives_the_contrastive_loss_no_occasion(generator, retriever):
    passages, questions = corpus(1)
    finding = check(generator, retriever, corpus=tables(questions, passages))["contrastive loss"]
    assert finding.value == 0 and finding.verdict == "zero on this batch"


# ---- sabotage


def test_a_detached_cross_entropy_is_caught(generator, retriever, monkeypatch):
    real = TokenLosses.forward
    monkeypatch.setattr(TokenLosses, "forward", lambda self, *given, **batch: real(self, *given, **batch).detach())
    finding = check(generator, retriever)["cross-entropy"]
    assert (finding.moved, finding.tensors) == (0, 28) and finding.verdict == "FAULT"
    assert all(word in finding.fault for word in ("cross-entropy", "move the generator", "28", "--generator_steps 0"))
    assert check(generator, retriever)["contrastive loss"].fault is None


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_contrastive_loss_that_is_a_constant_is_caught(generator, retriever, monkeypatch, constant):
    sabotage_contrastive(monkeypatch, lambda loss: torch.tensor(constant))
    finding = check(generator, retriever)["contrastive loss"]
    assert finding.moved == 0 and "--retriever_steps 0" in finding.fault


@pytest.mark.parametrize(
    ("function", "term", "switch"),
    [
        ("keyword_mass", "penalty on keywords", "--keyword_penalty 0"),
        ("expected_shortfall", "penalty on shortness", "--short_penalty 0"),
    ],
)
def test_a_penalty_that_is_not_zero_and_has_no_gradient_is_caught(
    generator, retriever, monkeypatch, function, term, switch
):
    real = vars(penalties)[function]
    monkeypatch.setattr(penalties, function, lambda *given: real(*given).detach())
    faults = {name: finding.fault for name, finding in check(generator, retriever, *PENALTIES).items() if finding.fault}
    assert list(faults) == [term] and faults[term].endswith(f"or {switch}.")


@pytest.mark.parametrize("role", ["generator", "retriever"])
def test_a_frozen_model_is_caught(generator, retriever, role):
    {"generator": generator, "retriever": retriever}[role].model.requires_grad_(False)
    found = check(generator, retriever)
    faults = [finding for finding in found.values() if finding.fault]
    assert [finding.term.model for finding in faults] == [role]
    assert (faults[0].moved, faults[0].tensors) == (0, 0) and "Unfreeze" in faults[0].fault


def test_a_pooler_that_gets_a_gradient_is_caught(generator, retriever, monkeypatch):
    pooler = weight(retriever.model, POOLER)
    sabotage_contrastive(monkeypatch, lambda loss: loss + pooler.sum())
    assert check(generator, retriever)["contrastive loss"].fault is None  # frozen, it cannot get one
    pooler.requires_grad_(True)
    finding = check(generator, retriever)["contrastive loss"]
    assert finding.foreign == (f"retriever: {POOLER}",) and (finding.moved, finding.tensors) == (21, 21)
    assert POOLER in finding.fault and finding.verdict == "FAULT"
    assert POOLER in findings_table([finding]).splitlines()[-1]


def test_a_retriever_loss_that_reaches_the_generator_is_caught(generator, retriever, monkeypatch):
    sabotage_contrastive(monkeypatch, lambda loss: loss + weight(generator.model, "transformer.ln_f.bias").sum())
    finding = check(generator, retriever)["contrastive loss"]
    assert finding.foreign == ("generator: transformer.ln_f.bias",) and "ln_f.bias" in finding.fault


def test_a_generator_loss_that_reaches_the_retriever_instead_is_caught(generator, retriever, monkeypatch):
    away = next(parameter for parameter in retriever.model.parameters() if parameter.requires_grad)
    monkeypatch.setattr(TokenLosses, "forward", lambda self, **batch: away.sum().unsqueeze(0))
    finding = check(generator, retriever)["cross-entropy"]
    assert len(finding.foreign) == 1 and finding.moved == 0 and "retriever: " in finding.fault


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["generator", "retriever"])
def test_weights_that_are_no_numbers_are_caught(generator, retriever, role, bad):
    model = {"generator": generator, "retriever": retriever}[role].model
    with torch.no_grad():
        [parameter for parameter in model.parameters() if parameter.requires_grad][-1].fill_(bad)
    found = check(generator, retriever)
    faults = [finding for finding in found.values() if finding.fault]
    assert [finding.term.model for finding in faults] == [role]
    assert "NaN or infinity" in faults[0].fault and faults[0].lowered is None
    json.dumps(faults[0].row(), allow_nan=False)


def test_a_number_whose_gradient_is_none_is_caught(generator, retriever, monkeypatch):
    bias = weight(retriever.model, "0.model.embeddings.LayerNorm.bias")
    sabotage_contrastive(monkeypatch, lambda loss: loss + (0 * bias.sum()).sqrt())
    finding = check(generator, retriever)["contrastive loss"]
    assert math.isfinite(finding.value) and finding.broken == ("retriever: 0.model.embeddings.LayerNorm.bias",)
    assert "LayerNorm.bias" in finding.fault


def test_a_feedback_that_is_detached_or_reaches_the_generator_is_caught(generator, retriever, monkeypatch):
    real, spoil = training_pairs.feedback_loss, []
    monkeypatch.setattr(training_pairs, "feedback_loss", lambda *given, **options: spoil[-1](real(*given, **options)))
    spoil.append(lambda loss: loss.detach())
    finding = check(generator, retriever, "--feedback_weight", "1")["generator feedback"]
    assert finding.moved == 0 and finding.fault.endswith("or --feedback_weight 0.")
    spoil.append(lambda loss: loss + weight(generator.model, "transformer.ln_f.bias").sum())
    finding = check(generator, retriever, "--feedback_weight", "1")["generator feedback"]
    assert finding.foreign == ("generator: transformer.ln_f.bias",) and finding.fault


def test_the_feedback_is_the_generators_on_each_question_and_two_passages(generator, retriever, monkeypatch):
    real, seen = training_pairs.feedback_loss, []
    monkeypatch.setattr(
        training_pairs, "feedback_loss", lambda *given, **options: seen.append(options) or real(*given, **options)
    )
    check(generator, retriever, "--feedback_weight", "1")
    batch, options = small_batch(tables()), seen[0]
    assert options["candidates"].shape == options["likelihoods"].shape == (4, 2)
    assert options["candidates"][:, 0].tolist() == batch.positives
    for row, places in enumerate(options["candidates"].tolist()):
        for place, likelihood in zip(places, options["likelihoods"][row].tolist(), strict=True):
            (expected,) = generator.log_likelihoods(
                [batch.questions[row]], [batch.passages.to_read()[place]], [batch.answers[row]], context_tokens=128
            )
            assert likelihood == pytest.approx(expected, abs=1e-4)


# ---- told, but no fault


def test_a_gradient_that_points_up_is_told(generator, retriever, monkeypatch):
    sabotage_contrastive(monkeypatch, lambda loss: 2 * loss.detach() - loss)
    finding = check(generator, retriever)["contrastive loss"]
    assert finding.lowered is False and finding.fault is None and finding.verdict == "step does not lower it"
    assert "a small step does not lower it" in findings_line([finding], 1)


def test_a_step_that_overshoots_is_taken_again_shorter(generator, retriever, monkeypatch):
    valley = torch.nn.Parameter(torch.tensor([0.01, 100.0]))
    pair = torch.nn.Module()
    pair.valley = valley
    term = Term("valley", "--off 0", "generator", lambda: 1 + valley[0].square())
    monkeypatch.setattr(loss_check, "active_terms", lambda *given: [term])
    finding = check_terms(SimpleNamespace(model=pair), retriever, None, None)[0]
    assert finding.lowered is True  # a step of 1 % would have to be 0.5 long, and the bottom is 0.01 away
    assert torch.equal(valley, torch.tensor([0.01, 100.0]))


def test_tensors_without_a_gradient_are_named(generator, retriever):
    generator.model.spare = torch.nn.Parameter(torch.ones(3))
    finding = check(generator, retriever)["cross-entropy"]
    assert (finding.moved, finding.tensors, finding.still) == (28, 29, ("generator: spare",))
    assert finding.fault is None and "28 of 29" in findings_line([finding], 1)
    assert findings_table([finding]).splitlines()[-1] == "cross-entropy: no gradient in generator: spare"


# ---- everything is left as it was


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def random_states():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def noisy(real):
    """The same, after drawing from all three random generators."""

    def draw(*given, **options):
        return real(*given, **options) + 0 * (random.random() + np.random.rand() + torch.rand(()).item())

    return draw


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_nothing_is_changed(generator, retriever, monkeypatch, ends):
    monkeypatch.setattr(TokenLosses, "forward", noisy(TokenLosses.forward))
    if ends == "badly":  # at the step, when weights are already moved
        real, calls = training_pairs.contrastive_loss, []

        def once(*given, **options):
            calls.append(1)
            if len(calls) > 1:
                raise InputError("enough")
            return real(*given, **options)

        monkeypatch.setattr(training_pairs, "contrastive_loss", once)
    generator.model.train()
    generator.model.transformer.h[0].eval()
    mark = torch.full((32,), 7.0)
    weight(generator.model, "transformer.ln_f.bias").grad = mark.clone()
    models = (generator.model, retriever.model)
    before = [bits(model) for model in models], random_states()
    modes = [[module.training for module in model.modules()] for model in models]
    if ends == "badly":
        with pytest.raises(InputError, match="enough"):
            check(generator, retriever)
    else:
        found = check(generator, retriever)
        assert all(finding.verdict == "ok" for finding in found.values())
    assert ([bits(model) for model in models], random_states()) == before
    assert [[module.training for module in model.modules()] for model in models] == modes
    grads = {name: p.grad for model in models for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == ["transformer.ln_f.bias"] and torch.equal(grads["transformer.ln_f.bias"], mark)


def test_dropout_does_not_disturb_it(generator_path, retriever):
    sleepy = Generator.load(str(generator_path), dropout=0.9)
    sleepy.model.train()
    first, second = (check(sleepy, retriever)["cross-entropy"] for _ in range(2))
    assert first.norm == second.norm and first.lowered


# ---- in a run


@pytest.fixture
def arguments(corpus_files, generator_path, retriever_path, tmp_path):
    """Settings of a run of two steps a phase, as strings."""
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", path)]
    small = ["--generator_steps", 2, "--retriever_steps", 2, "--generator_batch_size", 4, "--retriever_batch_size", 4]
    rest = ["--rounds", 1, "--answer_tokens", 2, "--max_eval_questions", 4, "--rollback", "off", "--use_cpu"]
    models = ["--generator", generator_path, "--retriever", retriever_path, "--context_tokens", 32, "--threads", 1]
    return list(map(str, [*files, *models, *small, *rest, "--output_dir", tmp_path / "out"]))


def metrics(folder, kind):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_run_tests_itself_in_one_line_and_takes_the_same_course(arguments, tmp_path, monkeypatch, capsys):
    run.train(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if "self-test" in line]
    assert len(lines) == 1 and lines[0].startswith(
        "self-test: cross-entropy moves 28 of 28 generator tensors; contrastive loss moves 21 of 21 retriever tensors ("
    )
    (row,) = metrics(tmp_path / "out", "self-test")
    assert [(term["term"], term["verdict"], term["tensors_moved"]) for term in row["terms"]] == [
        ("cross-entropy", "ok", 28),
        ("contrastive loss", "ok", 21),
    ]
    first, second = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[:2]
    assert json.loads(first)["kind"] == "run"  # what it works on; then the test, before anything else
    assert json.loads(second)["kind"] == "self-test"
    monkeypatch.setattr(run, "self_test", lambda rounds: None)
    run.train([*arguments[:-1], str(tmp_path / "bare")])
    for name in ("generator", "retriever"):
        tested, bare = (tmp_path / run / name / "model.safetensors" for run in ("out", "bare"))
        assert tested.read_bytes() == bare.read_bytes()
    tested, bare = (metrics(tmp_path / run, "step") for run in ("out", "bare"))
    assert [row["loss"] for row in tested] == [row["loss"] for row in bare]


def test_a_run_with_a_fault_ends_before_its_first_round(arguments, tmp_path, monkeypatch):
    sabotage_contrastive(monkeypatch, lambda loss: loss.detach())
    with pytest.raises(InputError, match="contrastive loss.*--retriever_steps 0"):
        run.train(arguments)
    (row,) = metrics(tmp_path / "out", "self-test")
    assert [term["verdict"] for term in row["terms"]] == ["ok", "FAULT"]
    assert metrics(tmp_path / "out", "evaluation") == []
    run.train([*arguments[:-1], str(tmp_path / "other"), "--retriever_steps", "0"])  # the way out that was named


def test_a_resumed_run_and_one_that_only_examines_do_not_test_again(arguments, tmp_path, monkeypatch):
    run.train([*arguments, "--rounds", "0"])
    assert metrics(tmp_path / "out", "self-test") == []
    monkeypatch.setattr(run, "self_test", lambda rounds: pytest.fail("tested again"))
    run.train([*arguments, "--resume"])
    assert len(metrics(tmp_path / "out", "evaluation")) == 2


# ---- cozyrag doctor


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `cozyrag doctor ARGUMENTS`; returns (exit code, stdout, stderr)."""

    def caller(*arguments):
        monkeypatch.setattr("sys.argv", ["cozyrag", "doctor", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = cli.main() or 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return caller


def test_the_command_shows_every_term_and_writes_nothing(call, arguments, tmp_path):
    code, out, _ = call(*arguments, *PENALTIES)
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[:2] == ["term", "moves"] and len(lines) == 7
    assert lines[1].split()[:2] == ["cross-entropy", "generator"] and lines[1].endswith(
        "28 of 28       yes             ok"
    )
    assert lines[-1].startswith("Loss terms checked: 5, in ") and lines[-1].endswith("Nothing wrong.")
    assert list(tmp_path.iterdir()) == []


def test_the_command_reads_a_settings_file(call, arguments, tmp_path):
    (tmp_path / "my.yaml").write_text("retriever_steps: 0\n")
    wanted = [part for part in arguments if part != "--retriever_steps"]
    wanted.remove("2")
    code, out, _ = call(*wanted, "--config", tmp_path / "my.yaml")
    assert code == 0 and "Loss terms checked: 1," in out and "contrastive" not in out


def test_the_command_says_when_there_is_nothing_to_check(call, arguments):
    code, out, _ = call(*arguments, "--rounds", "0")
    assert code == 0 and out.startswith("No loss term is active")


def test_the_command_ends_with_2_at_a_fault_after_the_whole_table(call, arguments, monkeypatch):
    real = PenalizedLosses.forward

    def half(self, **batch):
        losses, told = real(self, **batch)
        return losses.detach(), told

    monkeypatch.setattr(PenalizedLosses, "forward", half)
    code, out, err = call(*arguments, "--short_penalty", "1")
    assert code == 2 and [line.split()[-1] for line in out.splitlines()[1:4]] == ["FAULT", "ok", "ok"]
    assert "Nothing wrong" not in out and [line for line in err.splitlines() if line.startswith("error: ")] == [
        err.splitlines()[-1]
    ]
    assert "cross-entropy" in err.splitlines()[-1]


def test_help_teaches_both_uses(call):
    code, out, _ = call("--help")
    assert code == 0
    for text in (
        "--machine | SETTINGS | OUTPUT",
        "cozyrag doctor OUTPUT",
        "--config",
        "Exit code",
        "zero on this batch",
    ):
        assert text in out


@pytest.fixture(scope="module")
def whole(generator_path, retriever_path, corpus_files, tmp_path_factory):
    """What a run leaves."""
    folder = tmp_path_factory.mktemp("doctor") / "whole"
    retriever = Retriever.load(str(retriever_path), max_tokens=64)
    table = read_passages(str(corpus_files["passages"]))[0]
    Generator.load(str(generator_path)).save(folder / "generator")
    retriever.save(folder / "retriever")
    index = PassageIndex(table, np.zeros((len(table), 1), dtype=np.float32), fingerprint="")
    vectors = retriever.encode(index.passages.to_read(), kind="document", batch_size=16)
    PassageIndex(table, vectors, fingerprint=retriever.fingerprint()).save(folder / "index")
    facts = describe_pair(
        fingerprint=retriever.fingerprint(),
        retrieval={"mode": "dense", "stemmer": "none", "weights": {"vectors": 15.0, "sentence_words": 0.0}},
        top_k=3,
        context_tokens=60,
        answer_tokens=4,
    )
    (folder / "cozyrag.json").write_text(json.dumps(facts))
    index = folder / "index" / "index.json"  # these tests reach what lies behind the hashes of the contents
    kept = {name: value for name, value in json.loads(index.read_text()).items() if name not in ("files", "checksum")}
    index.write_text(json.dumps(kept))
    return folder


@pytest.fixture
def output(whole, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A retriever of the same shape with other weights."""
    folder = make_retriever(tmp_path_factory.mktemp("stranger") / "retriever", seed=1)
    return Retriever.load(str(folder), max_tokens=64)


def edit_vectors(folder, change):
    path = folder / "index" / "vectors.safetensors"
    vectors = load_file(path)["vectors"].copy()
    changed = change(vectors)
    save_file({"vectors": vectors if changed is None else changed}, path)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_pair_passes_line_by_line(call, output):
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    code, out, _ = call(output)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5 and all(line.startswith("ok: ") for line in lines[:-1])
    expected = ["fingerprint", "40 passages, 40 vectors of 32", "32 passages encoded again", "What is", "Nothing wrong"]
    for line, words in zip(lines, expected, strict=True):
        assert words in line
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_an_index_of_another_retriever_is_caught(call, output, stranger):
    stranger.save(output / "retriever")
    code, out, err = call(output)
    assert (code, out) == (2, "") and "was made by retriever" in err.splitlines()[-1]


def test_vectors_of_another_retriever_under_the_right_label_are_caught(output, stranger, corpus_files):
    def others(vectors):
        return stranger.encode([f"row {row}" for row in range(len(vectors))], kind="document", batch_size=16)

    edit_vectors(output, others)
    with pytest.raises(InputError, match="encoded again"):
        list(check_pair(output))


@pytest.mark.parametrize("row", [0, -1])
def test_one_altered_vector_is_caught(output, row):
    def alter(vectors):
        vectors[row] = vectors[row][::-1]

    edit_vectors(output, alter)
    with pytest.raises(InputError, match=f"passage 'p{row % 40}' .row {row % 40}., encoded again"):
        list(check_pair(output))


@pytest.mark.parametrize("factor", [1.01, 0.0, math.nan])
def test_a_vector_that_is_not_of_length_1_is_caught(output, factor):
    def stretch(vectors):
        vectors[17] *= factor

    edit_vectors(output, stretch)
    with pytest.raises(InputError, match="xpected vectors of length 1.*found (1 of 40|one) "):
        list(check_pair(output))


def test_rows_that_are_missing_are_caught(call, output):
    edit_vectors(output, lambda vectors: vectors[:-1].copy())
    code, _, err = call(output)
    assert code == 2 and "expected vectors (40, 32)" in err and "found (39, 32)" in err


def test_a_cozyrag_json_of_another_run_is_caught(output):
    edit_json(output / "cozyrag.json", retriever={"folder": "retriever", "fingerprint": "0123456789abcdef"})
    with pytest.raises(InputError, match="cozyrag.json of .* names retriever 0123456789abcdef"):
        list(check_pair(output))


def test_a_generator_of_nan_is_caught(output, generator):
    with torch.no_grad():
        weight(generator.model, "transformer.wpe.weight")[20:] = math.nan  # so far in that loading does not see it
    generator.save(output / "generator")
    told = check_pair(output)
    assert len([next(told) for _ in range(3)]) == 3
    with pytest.raises(InputError, match="its weights are unusable"):
        next(told)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["'", "nowhere", "cozyrag doctor --questions FILE"]),
        (["."], ["cozyrag.json"]),
        (["one", "two"], ["'one'", "'two'"]),
        (["--genrator", "x"], ["'--genrator'", "did you mean"]),
    ],
)
def test_mistakes_end_with_one_sentence_and_exit_code_2(call, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words if word != "'")
