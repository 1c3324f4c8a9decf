"""Going on: after a signal, a damaged checkpoint, other settings; on the same folder, once at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from kill_run import differences, left
from short_run import at_step, checkpoints, rows, send

import cozyrag.run
import cozyrag.training.callbacks
import cozyrag.training.rounds
from cozyrag.cli import entry_point
from cozyrag.errors import InputError
from cozyrag.run import train
from cozyrag.runtime.signals import Interrupted, Interrupts
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.output_dir import FREE_TO_CHANGE, SAFE_TO_CHANGE, check_changes

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("number", "function", "saved"),
    [
        (signal.SIGTERM, "generator_step", "round-001-0-generator-000003"),
        (signal.SIGINT, "retriever_step", "round-001-1-retriever-000003"),
    ],
)
def test_a_signal_saves_the_step_and_the_same_command_goes_on_to_the_same_end(
    number, function, saved, short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    out, before = tmp_path / "out", signal.getsignal(number)
    with monkeypatch.context() as patched:
        at_step(patched, 3, send(number), function)
        with pytest.raises(SystemExit) as ended:
            entry_point(lambda: train([*short_run, "--output_dir", str(out)]))
    assert ended.value.code == 128 + number and signal.getsignal(number) is before
    assert f"Interrupted; {saved} is saved in {out}. Give the same command again" in capsys.readouterr().err
    assert checkpoints(out)[-1] == saved
    train([*short_run, "--output_dir", str(out)])
    assert f"Going on from {saved}." in capsys.readouterr().out
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_signal_outside_the_steps_ends_at_once(short_run, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(cozyrag.training.rounds, "evaluate_pair", lambda *rest, **options: send(signal.SIGTERM)())
        with pytest.raises(Interrupted) as ended:
            train([*short_run, "--output_dir", str(out)])
    assert "nothing was saved yet" in ended.value.message
    train([*short_run, "--output_dir", str(out)])
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_run_ended_while_its_report_was_made_is_not_finished_yet(
    short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(cozyrag.run, "report_at_end", lambda *rest, **options: send(signal.SIGTERM)())
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(out)])
    train([*short_run, "--output_dir", str(out)])
    assert f"Going on from {checkpoints(out)[-1]}." in capsys.readouterr().out
    assert (out / "report.html").exists() and differences(undisturbed, left(out, rounds=1)) == []


def test_signals_that_are_held_come_at_the_end_or_when_patience_is_over(monkeypatch):
    interrupts, seen = Interrupts(), []
    with interrupts.watched(), pytest.raises(Interrupted) as ended:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does that was itself interrupted
            seen.append("went on")
    assert seen == ["went on"] and ended.value.number == signal.SIGINT
    monkeypatch.setattr("cozyrag.runtime.signals.PATIENCE", 0.05)
    stuck = Interrupts()
    with stuck.watched(), pytest.raises(Interrupted), stuck.held():
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            pass
    assert time.monotonic() < until


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = [*short_run, "--output_dir", str(out), "--save_steps", "1"]
    with monkeypatch.context() as patched:
        at_step(patched, 3, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(arguments)
    assert checkpoints(out) == ["round-001-1-retriever-000002", "round-001-1-retriever-000003"]
    weights = out / "checkpoints" / "round-001-1-retriever-000003" / "retriever" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    harm_tables(out)
    train(arguments)
    screen = capsys.readouterr().out
    assert "Checkpoint round-001-1-retriever-000003 is damaged (retriever/model.safetensors has" in screen
    assert "Going on from round-001-1-retriever-000002." in screen
    assert "The kept table round-001 is damaged" in screen and "The kept feedback" in screen
    assert differences(undisturbed, left(out, rounds=1)) == []


def harm_tables(out):
    """Damage the contexts table and the likelihoods of a round whose retriever has already moved."""
    (table,) = (out / "contexts" / "round-001").glob("*.arrow")
    (likelihoods,) = (out / "feedback").glob("*.safetensors")
    for path in (table, likelihoods):
        content = bytearray(path.read_bytes())
        content[-8] ^= 1
        path.write_bytes(bytes(content))


def test_a_run_whose_checkpoints_are_all_damaged_says_so(short_run, tmp_path):
    out = tmp_path / "out"
    train([*short_run, "--output_dir", str(out), "--rounds", "0"])
    for path in (out / "checkpoints").glob("*/progress.json"):
        path.write_text("{}")
    with pytest.raises(InputError, match="progress.json has 2 bytes.*no other.*--overwrite_output_dir"):
        train([*short_run, "--output_dir", str(out), "--rounds", "0", "--resume"])


@pytest.fixture(scope="module")
def interrupted(short_run, tmp_path_factory):
    """Output folder of a run that was ended in its generator phase."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, send(signal.SIGTERM), "generator_step")
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--seed", "1"], r"seed \(was 42, now 1\).*Give the old ones"),
        (["--seed", "1", "--allow_changed_settings"], r"seed \(was 42, now 1\)"),
        (["--threads", "2"], r"threads \(was 1, now 2\).*--resume_anyway"),
        (["--threads", "2", "--seed", "1"], r"for seed \(was 42, now 1\)\."),
    ],
)
def test_other_settings_are_refused_and_named(changed, told, short_run, interrupted):
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=told):
        train([*short_run, "--output_dir", str(interrupted), *changed])
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*") if path.is_file()} == before


def test_other_data_are_refused(short_run, interrupted, corpus_files):
    before = corpus_files["eval_questions"].read_text()
    corpus_files["eval_questions"].write_text(before.replace("colour", "hue"))
    try:
        with pytest.raises(InputError, match=r"data \(was '"):
            train([*short_run, "--output_dir", str(interrupted), "--allow_changed_settings"])
    finally:
        corpus_files["eval_questions"].write_text(before)


def test_what_may_change_is_let_through():
    before = {"seed": 1, "hub_model_id": None} | dict.fromkeys(FREE_TO_CHANGE | SAFE_TO_CHANGE, 1)
    check_changes(before, before | dict.fromkeys(FREE_TO_CHANGE, 2) | {"hub_model_id": "me/mine"}, False)
    check_changes(before, before | dict.fromkeys(SAFE_TO_CHANGE, 2), True)
    with pytest.raises(InputError, match="processes"):
        check_changes(before, before | {"processes": 2}, False)
    assert not FREE_TO_CHANGE & SAFE_TO_CHANGE


def test_a_finished_run_is_left_alone_and_more_rounds_need_resume(short_run, interrupted, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*short_run, "--output_dir", str(out), "--generator_steps", "1", "--retriever_steps", "0"]
    train([*arguments, "--rounds", "0"])
    with pytest.raises(InputError, match="holds a finished run"):
        train([*arguments, "--rounds", "0"])
    for path in (out / "checkpoints").iterdir():
        path.rename(out / path.name)
    for more in ([], ["--resume"]):
        with pytest.raises(InputError, match="nothing was touched"):
            train([*arguments, "--rounds", "0", *more])
    (path,) = out.glob("round-*")
    path.rename(out / "checkpoints" / path.name)
    train([*arguments, "--rounds", "1", "--resume"])
    assert [row["round"] for row in rows(out, "evaluation")] == [0, 1]


def test_minutes_call_for_a_checkpoint_and_the_wall_clock_does_not(short_run, tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(cozyrag.training.callbacks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 * (len(saved) - 1))  # jumps by decades, backwards too
    real = cozyrag.training.callbacks.Checkpoints.save
    monkeypatch.setattr(
        cozyrag.training.callbacks.Checkpoints,
        "save",
        lambda self, progress, *models: (saved.append(progress.name), real(self, progress, *models)),
    )

    class Slow(cozyrag.training.callbacks.RunCallback):
        def after_step(self, report):
            clock[0] += 4 * 60
            super().after_step(report)

    monkeypatch.setattr(cozyrag.training.rounds, "RunCallback", Slow)
    train([*short_run, "--output_dir", str(tmp_path / "out"), "--save_total_limit", "3"])
    inside = [name for name in saved if not name.endswith("000000")]
    assert inside == ["round-001-0-generator-000003"]  # 12 minutes; the phase ends before the next ten are over
    assert len(checkpoints(tmp_path / "out")) == 3


def test_the_package_never_asks_the_wall_clock():
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "cozyrag").glob("*.py"))]
    assert not [word for word in ("time.time(", "datetime.now", "utcnow(") for text in sources if word in text]


HOLD = """
import sys, time
from pathlib import Path
from accelerate import Accelerator
from cozyrag.training.output_dir import locked

with locked(Accelerator(cpu=True), Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_two_runs_on_one_folder_and_a_lock_that_outlives_its_holder(short_run, tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing into"):
            train([*short_run, "--output_dir", str(out), "--rounds", "0"])
    finally:
        holder.kill()
        holder.wait()
    assert (out / ".lock").exists()  # it was killed and could not clear up
    train([*short_run, "--output_dir", str(out), "--rounds", "0"])
    assert not (out / ".lock").exists() and (out / "finished.json").exists()


def test_the_folder_of_a_run_that_cannot_begin_goes_again(short_run, tmp_path):
    with pytest.raises(InputError, match="no-such"):
        train([*short_run, "--output_dir", str(tmp_path / "out"), "--generator", "no-such/model"])
    assert list(tmp_path.iterdir()) == []


def test_progress_keeps_what_the_next_phase_needs():
    progress = Progress(1, "generator", 7, [{"kind": "x"}], 7, [[1.0, {}, 0.1]], {"a": 1.0}, 2, {"generator": 4})
    progress.cuts = {"generator": {"micro_batches": 1, "tokens": 600, "room": 900}}
    kept = {"micro_batches": {"generator": 4}, "cuts": progress.cuts}
    assert progress.following(1, "retriever") == Progress(1, "retriever", steps_so_far=7, **kept)


def test_a_resumed_run_keeps_its_micro_batches_whatever_is_free_by_then(
    short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_step(patched, 3, send(signal.SIGTERM), "generator_step")
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(out)])
    assert "generator: micro-batches of up to 1,200 tokens (about 0.0 GB of activations)" in capsys.readouterr().out
    monkeypatch.setattr("cozyrag.training.generator_phase.room_for_training", lambda device: 1.0)
    monkeypatch.setattr("cozyrag.training.retriever_phase.room_for_training", lambda device: 1.0)
    train([*short_run, "--output_dir", str(out)])
    assert "generator: micro-batches of up to 1,200 tokens" in capsys.readouterr().out
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_checkpoint_from_before_micro_batches_were_chosen_is_read(tmp_path):
    kept = {"round": 1, "phase": "retriever", "step": 2, "micro_batches": {"generator": 4}, "facts": {}}
    (tmp_path / "progress.json").write_text(json.dumps(kept))
    found = Checkpoints(Accelerator(cpu=True), tmp_path, limit=2, facts={}).read(tmp_path, allow_changes=False)
    assert found.cuts == {} and found.micro_batches == {"generator": 4}
