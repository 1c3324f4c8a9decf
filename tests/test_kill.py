"""Real processes that are killed: at random moments, one of two, and a launcher that is asked to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from short_run import checkpoints, rows

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_few_kills_at_random_moments_end_bit_equal():
    told = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_run.py"), "--kills", "2", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert told.returncode == 0 and "2 of 2 kills resumed bit-equal" in told.stdout, told.stdout + told.stderr[-2000:]


def launched(arguments, log):
    """Start two processes as users do."""
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs/cpu_ddp.yaml"),
    ]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "RANK", "WORLD_SIZE")}
    machine = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    with log.open("a") as file:
        return subprocess.Popen(
            [*start, "--main_process_port", "0", str(ROOT / "train.py"), *arguments],
            stdout=file,
            stderr=file,
            env=clean | machine,
        )


def wait_for(launcher, happened, seconds=300):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until and launcher.poll() is None, "it ended, or took too long"
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
def test_two_processes_one_killed_and_the_launcher_asked_to_end(short_run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [
        *short_run,
        "--output_dir",
        str(out),
        "--save_steps",
        "1",
        "--generator_steps",
        "40",
        "--generator_epochs",
        "2",
    ]
    launcher = launched(arguments, log)
    wait_for(launcher, begun(out, "generator-00000"))
    rank(launcher, 1).kill()
    clock = time.monotonic()
    assert launcher.wait(60) != 0
    assert time.monotonic() - clock < 60
    text = log.read_text()
    assert (
        "Another process of this run has ended" in text or "Signal 9" in text or "exitcode: -9" in text.replace(" ", "")
    )

    launcher = launched(arguments, log)
    wait_for(launcher, lambda: log.read_text().count("Going on from") == 1)
    before = checkpoints(out)[-1]
    wait_for(launcher, lambda: checkpoints(out)[-1] > before)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) != 0
    saved = [name for name in checkpoints(out) if name[-1].isdigit()][-1]
    assert f"Interrupted; {saved} is saved" in log.read_text()

    assert launched(arguments, log).wait(300) == 0
    assert (out / "finished.json").exists() and f"Going on from {saved}." in log.read_text()
    steps = [row["step"] for row in rows(out, "step") if row["phase"] == "generator"]
    assert steps == list(range(2, 17, 2))
