"""Resuming: after a signal, with a damaged checkpoint, with changed settings; and the lock of the output folder."""

import json
import os
import shutil
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
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.run import train
from cozyrag.runtime import hardware
from cozyrag.runtime.hardware import changed_rounding
from cozyrag.runtime.signals import Interrupted, Interrupts
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.output_dir import FREE_TO_CHANGE, SAFE_TO_CHANGE, check_changes, settings_before

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("number", "function", "saved"),
    [
        (signal.SIGTERM, "generator_step", "round-001-0-generator-000003"),
        (signal.SIGINT, "retriever_step", "round-001-1-retriever-000003"),
    ],
)
def test_a_signal_saves_the_step_and_the_resumed_run_ends_bit_equal(
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
    assert f"Resuming from {saved}." in capsys.readouterr().out
    assert differences(undisturbed, left(out, rounds=1)) == []


@pytest.mark.parametrize(
    ("number", "function", "saved"),
    [
        (3, "generator_step", "round-001-0-generator-000002 is saved in"),
        (2, "retriever_step", "round-001-1-retriever-000001 is saved in"),
        (1, "retriever_step", "round-001-1-retriever-000000 is saved in"),
        (1, "generator_step", "round-001-0-generator-000000 is saved in"),
    ],
)
def test_a_step_that_takes_too_long_is_given_up_and_the_one_before_it_is_saved(
    number, function, saved, short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pass
        pytest.fail("the step was not given up")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("cozyrag.runtime.signals.STEP_PATIENCE", 0.05)
        patched.setattr("cozyrag.runtime.signals.PATIENCE", 600.0)
        at_step(patched, number, hang, function)
        with pytest.raises(SystemExit) as ended:
            entry_point(lambda: train([*short_run, "--output_dir", str(out)]))
    assert ended.value.code == 128 + signal.SIGTERM and saved in capsys.readouterr().err
    train([*short_run, "--output_dir", str(out)])
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_signal_while_trackers_start_ends_the_run_and_the_same_command_begins_it(
    short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = [*short_run, "--output_dir", str(out)]
    with monkeypatch.context() as patched:

        def begin(*rest, **options):
            send(signal.SIGTERM)()
            begun.append(1)

        begun = []
        patched.setattr("cozyrag.run.start_trackers", begin)
        with pytest.raises(SystemExit) as ended:
            entry_point(lambda: train(arguments))
    assert ended.value.code == 128 + signal.SIGTERM and begun == [1]
    assert "no checkpoint was saved yet" in capsys.readouterr().err
    train(arguments)
    assert differences(undisturbed, left(out, rounds=1)) == []


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_like_sigterm_unless_nohup_ignores_it(ignored):
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    interrupts = Interrupts()
    try:
        with interrupts.watched():
            if ignored:
                with interrupts.held():
                    os.kill(os.getpid(), signal.SIGHUP)
                assert interrupts.received is None
            else:
                with pytest.raises(Interrupted) as ended, interrupts.held():
                    os.kill(os.getpid(), signal.SIGHUP)
                assert ended.value.number == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_between_phases_ends_at_once(short_run, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(cozyrag.training.rounds, "evaluate_pair", lambda *rest, **options: send(signal.SIGTERM)())
        with pytest.raises(Interrupted) as ended:
            train([*short_run, "--output_dir", str(out)])
    assert "no checkpoint was saved yet" in ended.value.message
    train([*short_run, "--output_dir", str(out)])
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_run_that_ends_before_its_report_is_not_finished(short_run, undisturbed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(cozyrag.run, "report_at_end", lambda *rest, **options: send(signal.SIGTERM)())
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(out)])
    train([*short_run, "--output_dir", str(out)])
    assert f"Resuming from {checkpoints(out)[-1]}." in capsys.readouterr().out
    assert (out / "report.html").exists() and differences(undisturbed, left(out, rounds=1)) == []


def test_held_signals_are_raised_at_the_end_or_after_the_patience(monkeypatch):
    interrupts, seen = Interrupts(), []
    with interrupts.watched(), pytest.raises(Interrupted) as ended:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # as from a launcher that was interrupted too
            seen.append("continued")
    assert seen == ["continued"] and ended.value.number == signal.SIGINT
    monkeypatch.setattr("cozyrag.runtime.signals.STEP_PATIENCE", 0.05)
    monkeypatch.setattr("cozyrag.runtime.signals.PATIENCE", 0.1)
    stuck = Interrupts()
    with stuck.watched(), pytest.raises(Interrupted), stuck.held():
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            pass
    assert time.monotonic() < until


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
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
    damage_tables(out)
    train(arguments)
    screen = capsys.readouterr().out
    assert "Checkpoint round-001-1-retriever-000003 is damaged (retriever/model.safetensors has" in screen
    assert "Resuming from round-001-1-retriever-000002." in screen
    assert "The kept table round-001 is damaged" in screen and "The LM feedback in" in screen
    assert differences(undisturbed, left(out, rounds=1)) == []


def damage_tables(out):
    """Damage the contexts table and the likelihoods of a round whose retriever phase has begun."""
    (table,) = (out / "contexts" / "round-001").glob("*.arrow")
    (likelihoods,) = (out / "feedback").glob("*.safetensors")
    for path in (table, likelihoods):
        content = bytearray(path.read_bytes())
        content[-8] ^= 1
        path.write_bytes(bytes(content))


def test_a_run_without_an_undamaged_checkpoint_is_refused(short_run, tmp_path):
    out = tmp_path / "out"
    train([*short_run, "--output_dir", str(out), "--rounds", "0"])
    for path in (out / "checkpoints").glob("*/progress.json"):
        path.write_text("{}")
    with pytest.raises(InputError, match="progress.json has 2 bytes.*no other.*--overwrite_output_dir"):
        train([*short_run, "--output_dir", str(out), "--rounds", "0", "--resume"])


@pytest.fixture(scope="module")
def interrupted(short_run, tmp_path_factory):
    """Output folder of a run that was interrupted in its generator phase."""
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, send(signal.SIGTERM), "generator_step")
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(folder)])
    return folder


MACHINE = {"processor": "Xeon", "busy_cores": 4, "gpus": [], "cores": 8, "memory_gb": 16, "versions": {"torch": "2.8"}}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"processor": "EPYC"}, "processor (was Xeon, now EPYC)"),
        ({"busy_cores": 2}, "busy cores (was 4, now 2)"),
        ({"gpus": ["H100"]}, "GPUs (was [], now ['H100'])"),
        ({"versions": {"torch": "2.9", "new": "1"}}, "version of torch (was 2.8, now 2.9)"),
    ],
    ids=["processor", "threads", "gpus", "versions"],
)
def test_another_machine_is_named_in_one_sentence(now, named):
    assert changed_rounding(MACHINE, MACHINE | now).startswith(f"Note: this run began with other {named}. It will")


@pytest.mark.parametrize(
    "before", [MACHINE, MACHINE | {"cores": 4, "memory_gb": 8}, {}], ids=["same", "memory", "none"]
)
def test_nothing_is_said_of_what_does_not_change_the_rounding(before):
    assert changed_rounding(before, MACHINE) is None


@pytest.mark.parametrize("processor", [None, "Z80"], ids=["same", "another"])
def test_a_run_resumed_on_another_machine_says_so(processor, short_run, interrupted, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(interrupted, tmp_path / "out")
    if processor:
        monkeypatch.setattr(hardware, "_processor", lambda: processor)
    at_step(monkeypatch, 1, send(signal.SIGTERM), "generator_step")
    capsys.readouterr()
    with pytest.raises(Interrupted):
        train([*short_run, "--output_dir", str(out)])
    assert capsys.readouterr().out.count("this run began with other processor") == bool(processor)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", "1"], r"seed \(was 42, now 1\).*Give the old values"),
        (["--seed", "1", "--allow_changed_settings"], r"seed \(was 42, now 1\)"),
        (["--threads", "2"], r"threads \(was 1, now 2\).*--allow_changed_settings"),
        (["--threads", "2", "--seed", "1"], r"in seed \(was 42, now 1\)\."),
    ],
)
def test_changed_settings_are_refused_and_named(changed, message, short_run, interrupted):
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        train([*short_run, "--output_dir", str(interrupted), *changed])
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*") if path.is_file()} == before


def test_changed_data_is_refused(short_run, interrupted, corpus_files):
    before = corpus_files["eval_questions"].read_text()
    corpus_files["eval_questions"].write_text(before.replace("colour", "hue"))
    try:
        with pytest.raises(InputError, match=r"data \(was '"):
            train([*short_run, "--output_dir", str(interrupted), "--allow_changed_settings"])
    finally:
        corpus_files["eval_questions"].write_text(before)


def test_settings_that_may_change_are_accepted():
    before = {"seed": 1, "hub_model_id": None} | dict.fromkeys(FREE_TO_CHANGE | SAFE_TO_CHANGE, 1)
    check_changes(before, before | dict.fromkeys(FREE_TO_CHANGE, 2) | {"hub_model_id": "me/mine"}, False)
    check_changes(before, before | dict.fromkeys(SAFE_TO_CHANGE, 2), True)
    with pytest.raises(InputError, match="processes"):
        check_changes(before, before | {"processes": 2}, False)
    assert not FREE_TO_CHANGE & SAFE_TO_CHANGE


def test_a_finished_run_is_refused_and_more_rounds_need_resume(short_run, interrupted, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*short_run, "--output_dir", str(out), "--generator_steps", "1", "--retriever_steps", "0"]
    train([*arguments, "--rounds", "0"])
    with pytest.raises(InputError, match="holds a finished run"):
        train([*arguments, "--rounds", "0"])
    for path in (out / "checkpoints").iterdir():
        path.rename(out / path.name)
    for more in ([], ["--resume"]):
        with pytest.raises(InputError, match="nothing was changed"):
            train([*arguments, "--rounds", "0", *more])
    (path,) = out.glob("round-*")
    path.rename(out / "checkpoints" / path.name)
    train([*arguments, "--rounds", "1", "--resume"])
    assert [row["round"] for row in rows(out, "evaluation")] == [0, 1]


def test_checkpoints_follow_the_monotonic_clock(short_run, tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(cozyrag.training.callbacks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 * (len(saved) - 1))  # jumps by decades, also backwards
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


def test_the_package_never_reads_the_wall_clock():
    # OpenAI's clients are told when an answer was made; no run sees it.
    paths = [path for path in sorted((ROOT / "cozyrag").rglob("*.py")) if path.parent.name != "serving"]
    sources = [path.read_text(encoding="utf-8") for path in paths]
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


def test_a_folder_has_one_run_and_the_lock_of_a_killed_one_is_released(short_run, tmp_path):
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
    assert (out / ".lock").exists()  # left by the killed process
    train([*short_run, "--output_dir", str(out), "--rounds", "0"])
    assert not (out / ".lock").exists() and (out / "finished.json").exists()


def test_the_folder_of_a_run_that_cannot_start_is_removed(short_run, tmp_path):
    with pytest.raises(InputError, match="no-such"):
        train([*short_run, "--output_dir", str(tmp_path / "out"), "--generator", "no-such/model"])
    assert list(tmp_path.iterdir()) == []


def test_the_progress_of_the_next_phase():
    progress = Progress(1, "generator", 7, [{"kind": "x"}], 7, [[1.0, {}, 0.1]], {"a": 1.0}, 2, {"generator": 4})
    progress.cuts = {"generator": {"micro_batches": 1, "tokens": 600, "room": 900}}
    kept = {"micro_batches": {"generator": 4}, "cuts": progress.cuts}
    assert progress.following(1, "retriever") == Progress(1, "retriever", steps_so_far=7, **kept)


def test_a_resumed_run_keeps_its_micro_batches_whatever_memory_is_free(
    short_run, undisturbed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_step(patched, 3, send(signal.SIGTERM), "generator_step")
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(out)])
    assert "generator: micro-batches of up to 1,200 tokens (about 0.0 GB of activations)" in capsys.readouterr().out
    monkeypatch.setattr("cozyrag.training.generator_phase.room_for_training", lambda device: 1.0)
    monkeypatch.setattr("cozyrag.training.trainer.room_for_training", lambda device: 1.0)
    train([*short_run, "--output_dir", str(out)])
    assert "generator: micro-batches of up to 1,200 tokens" in capsys.readouterr().out
    assert differences(undisturbed, left(out, rounds=1)) == []


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    kept = {
        "round": 1,
        "phase": "retriever",
        "step": 2,
        "pieces": {"generator": 4},
        "metrics": [],
        "spent": {},
        "facts": {},
    }
    (tmp_path / "progress.json").write_text(json.dumps(kept))
    found = Checkpoints(Accelerator(cpu=True), tmp_path, limit=2, facts={}).read(tmp_path, allow_changes=False)
    assert found.cuts == {} and found.micro_batches == {"generator": 4}


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default(tmp_path):
    now = parse_settings(["--questions", "my.tsv", "--top_k", "3"]).to_dict()
    earlier = {name: value for name, value in now.items() if name not in ("reranker", "rerank_passages")}
    (tmp_path / "settings.json").write_text(json.dumps(earlier))
    before = settings_before(tmp_path)
    assert before["rerank_passages"] == 20 and before["top_k"] == 3
    check_changes(before, now | {"mixed_precision": before["mixed_precision"]}, False)
    with pytest.raises(InputError, match=r"rerank_passages \(was 20, now 9\)"):
        check_changes(before, now | {"mixed_precision": before["mixed_precision"], "rerank_passages": 9}, False)
