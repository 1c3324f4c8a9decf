"""Killed processes: at random moments, one of two, and a launcher that gets SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from short_run import checkpoints, rows
from test_train_script import MACHINE

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_bit_equal():
    command = [sys.executable, str(ROOT / "tests" / "kill_run.py"), "--kills", "2", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "2 of 2 kills resumed bit-equal" in done.stdout, done.stdout + done.stderr[-2000:]


def launched(arguments, log):
    """Launch a run of two processes, as a user does."""
    config = ["--config_file", str(ROOT / "accelerate_configs/cpu_ddp.yaml"), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, str(ROOT / "train.py"), *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")}
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=clean | MACHINE | {"PYTHONPATH": str(ROOT)})


def wait_for(launcher, happened, seconds=300):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until and launcher.poll() is None, "the launcher ended, or the time is over"
        time.sleep(0.01)


def rank(launcher, number):
    """The process of that rank."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(number):
            return child
    raise AssertionError(f"no process with rank {number}")


def begun(out, phase):
    return lambda: any(phase in path.name and path.name[-1].isdigit() for path in out.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_run_resumes_after_one_process_is_killed_and_after_sigterm(short_run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    more = "--save_steps 1 --generator_steps 40 --generator_epochs 2".split()
    arguments = [*short_run, "--output_dir", str(out), *more]
    launcher = launched(arguments, log)
    wait_for(launcher, begun(out, "generator-00000"))
    rank(launcher, 1).kill()
    clock = time.monotonic()
    assert launcher.wait(60) != 0
    assert time.monotonic() - clock < 60
    text = log.read_text().replace(" ", "")
    assert "Anotherprocessofthisrun" in text or "Signal9" in text or "exitcode:-9" in text

    launcher = launched(arguments, log)
    wait_for(launcher, lambda: log.read_text().count("Resuming from") == 1)
    before = checkpoints(out)[-1]
    wait_for(launcher, lambda: checkpoints(out)[-1] > before)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) != 0
    saved = [name for name in checkpoints(out) if name[-1].isdigit()][-1]
    assert f"Interrupted; {saved} is saved" in log.read_text()

    assert launched(arguments, log).wait(300) == 0
    assert (out / "finished.json").exists() and f"Resuming from {saved}." in log.read_text()
    steps = [row["step"] for row in rows(out, "step") if row["phase"] == "generator"]
    assert steps == list(range(2, 17, 2))
