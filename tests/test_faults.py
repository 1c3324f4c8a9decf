"""Runs with a full disk, damaged files, non-finite losses, too little memory, or lost processes."""

import json
import os
import resource
import signal

import pytest
import torch
from accelerate import Accelerator
from kill_run import differences, left
from safetensors.torch import load_file
from short_run import STEPS, at_step, checkpoints, rows

from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.index_file import NEEDED, made_by
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.run import train
from cozyrag.runtime.atomic_files import damage
from cozyrag.runtime.signals import Interrupted
from cozyrag.training import generator_phase
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.micro_batches import Cut, load_of
from cozyrag.training.setup import peers_lost
from cozyrag.training.trainer import Phase, PhaseCallback, StepReport, run_phase

NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# ---- the disk


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint_and_the_run_resumes(
    short_run,
    undisturbed,
    tmp_path,
    monkeypatch,
):
    out = tmp_path / "out"
    arguments = [*short_run, "--output_dir", str(out), "--save_steps", "1"]
    try:
        with monkeypatch.context() as patched:
            at_step(patched, 2, lambda: limit_files(100_000))
            with pytest.raises(InputError, match="disk is full.*retriever-000002 needs about \\d MB.*resumes there"):
                train(arguments)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert checkpoints(out) == ["round-001-1-retriever-000000", "round-001-1-retriever-000001"]
    assert [damage(path) for path in (out / "checkpoints").iterdir()] == [None, None]
    train(arguments)
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_checkpoint_that_does_not_fit_is_not_begun(generator_path, retriever_path, tmp_path, monkeypatch):
    checkpoints = Checkpoints(Accelerator(cpu=True), tmp_path, limit=2, facts={})
    models = Generator.load(str(generator_path)), Retriever.load(str(retriever_path))
    checkpoints.save(Progress(), *models)
    monkeypatch.setattr("cozyrag.runtime.atomic_files._free", lambda path: 1000)
    with pytest.raises(InputError, match=r"generator-000000 needs about \d+ MB, 0 MB are free"):
        checkpoints.save(Progress(1, "generator"), *models)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000-2-evaluation-000000"]
    assert checkpoints.newest()[0].name == "round-000-2-evaluation-000000"


def test_an_output_that_cannot_be_written_is_refused(short_run):
    with pytest.raises(InputError, match="/sys/cozyrag.* not allowed|/sys cannot"):
        train([*short_run, "--output_dir", "/sys/cozyrag"])


# ---- damaged files


@pytest.mark.parametrize("role", ["generator", "retriever"])
def test_truncated_weights_are_one_clear_error(role, generator_path, retriever_path, tmp_path):
    source = {"generator": generator_path, "retriever": retriever_path}[role]
    for path in source.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[: -100 if path.suffix == ".safetensors" else None])
    with pytest.raises(InputError, match=f"--{role}.*could not be loaded.*does not fit into the file"):
        {"generator": Generator, "retriever": Retriever}[role].load(str(tmp_path))


@pytest.fixture
def finished(short_run, tmp_path):
    """(settings, output folder) of a run that only evaluated."""
    arguments = [*short_run, "--output_dir", str(tmp_path / "out"), "--rounds", "0"]
    train(arguments)
    return arguments, tmp_path / "out"


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.slow
def test_a_damaged_index_is_refused_by_readers_and_made_again_by_a_resumed_run(finished, capsys):
    arguments, out = finished
    fingerprint = made_by(out / "index")
    for name in NEEDED:
        whole = (out / "index" / name).read_bytes()
        cut(out / "index" / name)
        with pytest.raises(InputError, match=rf"{name}.*Copy the whole folder again"):
            PassageIndex.load(out / "index", fingerprint=fingerprint)
        (out / "index" / name).write_bytes(whole)
    vectors = (out / "index" / "vectors.safetensors").read_bytes()
    cut(out / "index" / "vectors.safetensors")
    capsys.readouterr()
    train([*arguments[:-1], "1", "--resume", "--generator_steps", "0", "--retriever_steps", "0"][:-4] + ["--resume"])
    assert "vectors.safetensors" in (screen := capsys.readouterr().out) and "indexed again" in screen
    assert (out / "index" / "vectors.safetensors").stat().st_size == len(vectors)


def test_a_pair_of_two_rounds_is_refused(finished):
    out = finished[1]
    model = Generator.load(str(out / "generator"))
    with torch.no_grad():
        next(model.model.parameters()).add_(1)
    model.save(out / "generator")
    with pytest.raises(InputError, match="model.safetensors what was written together.*found other contents"):
        CozyRAG.from_pretrained(out)
    (out / "pair.next").mkdir()
    with pytest.raises(InputError, match="interrupted while it replaced the old pair"):
        CozyRAG.from_pretrained(out)


# ---- non-finite losses


def spoil(monkeypatch, spoilt, function="generator_step"):
    """Set the loss and gradients of these steps, counted from 1, to NaN."""
    real, calls = getattr(STEPS[function], function), []

    def step(accelerator, module, *rest, **options):
        losses = real(accelerator, module, *rest, **options)
        calls.append(1)
        if len(calls) in spoilt:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            losses[0] = float("nan")
        return losses

    monkeypatch.setattr(STEPS[function], function, step)


def test_a_step_with_nan_is_skipped_counted_and_logged(short_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    spoil(monkeypatch, {2, 4})
    train([*short_run, "--output_dir", str(out), "--max_skipped_steps", "2", "--retriever_steps", "0"])
    assert [(row["step"], row["in_a_row"], row["loss"]) for row in rows(out, "skipped step")] == [
        (2, 1, "nan"),
        (4, 1, "nan"),
    ]
    steps = [row for row in rows(out, "step") if row["phase"] == "generator"]
    assert [row["step"] for row in steps] == [2, 4, 5] and all(row["loss"] > 0 for row in steps)
    weights = Generator.load(str(out / "generator")).model.state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (out / "skipped-steps").exists()


def test_skipped_steps_in_a_row_stop_the_run_and_save_the_batch(short_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    spoil(monkeypatch, {2, 3})
    with pytest.raises(InputError, match="2 steps of the generator in a row.*--generator_learning_rate"):
        train([*short_run, "--output_dir", str(out), "--max_skipped_steps", "2"])
    (batch,) = (out / "skipped-steps").iterdir()
    content = json.loads(batch.read_text())
    assert batch.name == "round-001-generator-000003.json" and content["loss"] == "nan" and len(content["rows"]) == 8
    assert "\nQuestion: " in content["rows"][0]["text"]


class Notes(PhaseCallback):
    """Keeps its calls."""

    def __init__(self):
        self.reports, self.skipped, self.cut = [], [], []

    def after_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def skipped_step(self, report, gradient_norm, rows):
        self.skipped.append((report.step, gradient_norm, rows()))

    def out_of_memory(self, cut):
        self.cut.append(cut.tokens or cut.micro_batches)


def phase(take_step, *, accelerator=None, rows=4, steps=3, cut=Cut(), **others):  # noqa: B008
    """Run a phase over one weight; (the weight after each step, the calls of the callback)."""
    from cozyrag.config import TrainingSettings

    weight, notes, values = torch.nn.Parameter(torch.ones(2, 2)), Notes(), []
    real = notes.after_step
    notes.after_step = lambda report: (values.append(weight.detach().clone()), real(report))[1]
    run_phase(
        accelerator or Accelerator(cpu=True, step_scheduler_with_optimizer=False),
        Phase(
            "generator",
            [weight],
            [range(rows * number, rows * (number + 1)) for number in range(steps)],
            0.1,
            lambda rows, cut: take_step(weight, rows[0] // len(rows), cut),
            **others,
        ),
        cut,
        settings=TrainingSettings(warmup_ratio=0.0),
        round_number=1,
        callback=notes,
    )
    return values, notes


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_no_weight_although_the_loss_is_finite(gradient):
    def take_step(weight, number, cut):
        weight.grad = torch.full_like(weight, gradient if number == 1 else 1.0)
        return {"loss": 1.0}

    values, notes = phase(take_step, show=lambda rows: [{"first": rows[0]}])
    assert torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    assert [report.skipped for report in notes.reports] == [False, True, False]
    assert [(step, rows) for step, _, rows in notes.skipped] == [(2, [{"first": 4}])]
    assert notes.reports[2].learning_rate < notes.reports[1].learning_rate  # the schedule continues


# ---- memory


@pytest.mark.parametrize(
    "error", [RuntimeError(NO_MEMORY), torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()]
)
def test_out_of_memory_cuts_the_step_and_keeps_its_rows(error):
    tried = []

    def take_step(weight, number, cut):
        tried.append((number, cut.micro_batches))
        assert weight.grad is None or not weight.grad.any()  # nothing is left of the attempt that failed
        weight.grad = torch.ones_like(weight)
        if cut.micro_batches < 4 and number == 1:
            raise error
        return {"loss": 1.0}

    _, notes = phase(take_step)
    assert tried == [(0, 1), (1, 1), (1, 2), (1, 4), (2, 4)] and notes.cut == [2, 4]


def test_other_errors_are_not_treated_as_out_of_memory():
    def take_step(weight, number, cut):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        phase(take_step)


def test_the_error_names_the_remedy_for_single_rows_and_for_several_processes(monkeypatch):
    def take_step(weight, number, cut):
        raise RuntimeError(NO_MEMORY)

    with pytest.raises(RuntimeError, match="one row at a time.*--context_tokens"):
        phase(take_step)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    with pytest.raises(RuntimeError, match="--gradient_accumulation_steps 2 and --allow_changed_settings"):
        phase(take_step, accelerator=accelerator)


def test_out_of_memory_halves_the_tokens_then_recomputes_then_ends():
    """Rows of 100 tokens; only micro-batches of one row with recomputed activations fit, in step 2 not even those."""
    tried = []

    def take_step(weight, number, cut):
        tried.append((number, cut.tokens, cut.recomputes(100)))
        weight.grad = torch.ones_like(weight)
        if not cut.recomputes(100) or number == 2:
            raise RuntimeError(NO_MEMORY)
        return {"loss": 1.0}

    cutting = {"cut": Cut(tokens=1200, room=5000), "load": lambda number, cut: load_of([100] * 4, cut)}
    with pytest.raises(RuntimeError, match="one row at a time"):
        phase(take_step, **cutting)
    assert tried == [(0, 1200, False), (0, 200, False), (0, 100, False), (0, 50, True), (1, 50, True), (2, 50, True)]


def test_with_several_processes_the_error_names_twice_the_micro_batches_that_a_step_had(monkeypatch):
    def take_step(weight, number, cut):
        raise RuntimeError(NO_MEMORY)

    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    load = lambda number, cut: load_of([100] * 12, cut, processes=2)  # noqa: E731
    with pytest.raises(RuntimeError, match="--gradient_accumulation_steps 6 and --allow_changed_settings"):
        phase(take_step, accelerator=accelerator, cut=Cut(tokens=250, room=5000), load=load)


@pytest.mark.slow
@pytest.mark.parametrize("given", [["--gradient_accumulation_steps", "1"], []], ids=["a number", "automatic"])
def test_a_run_short_of_memory_ends_as_one_with_smaller_micro_batches_and_keeps_them_when_resumed(
    given, short_run, tmp_path, monkeypatch
):
    real = generator_phase.generator_step

    def hungry(accelerator, module, examples, *, cut, **options):
        if load_of([len(each.input_ids) for each in examples], cut).micro_batches < 4:
            raise RuntimeError(NO_MEMORY)
        return real(accelerator, module, examples, cut=cut, **options)

    small = [*short_run, "--retriever_steps", "0"]
    train([*small, "--output_dir", str(tmp_path / "four"), "--gradient_accumulation_steps", "4"])
    small += given
    with monkeypatch.context() as patched:
        patched.setattr(generator_phase, "generator_step", hungry)
        at_step(patched, 5, lambda: os.kill(os.getpid(), signal.SIGTERM), "generator_step")
        with pytest.raises(Interrupted):
            train([*small, "--output_dir", str(tmp_path / "out")])
    train([*small, "--output_dir", str(tmp_path / "out")])  # enough memory now: the earlier cut is remembered
    cuts = rows(tmp_path / "out", "out of memory")
    assert [row["micro_batches"] for row in cuts] == [2, 4] if given else [row["tokens"] for row in cuts][0] < 300
    four, cut = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("four", "out"))
    for name, weight in four.items():
        torch.testing.assert_close(cut[name], weight, atol=0 if given else 1e-5, rtol=0)


# ---- other processes


def test_a_lost_process_is_one_clear_error():
    with pytest.raises(
        InputError, match="Another process of this run has ended.*Connection closed by peer.*last checkpoint"
    ):
        with peers_lost():
            raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(RuntimeError, match="something else"), peers_lost():
        raise RuntimeError("something else")
