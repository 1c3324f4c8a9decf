"""Files of a run that a power cut emptied, halved or zeroed: a command goes on, or names the file and a remedy."""

import shutil
import signal

import evaluated
import pytest
from short_run import at_step, send

from cozyrag import cli
from cozyrag.errors import InputError
from cozyrag.reporting.html_report import write_report
from cozyrag.reporting.run_reader import FinishedRun
from cozyrag.run import train
from cozyrag.runtime.signals import Interrupted

CUTS = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "zeroed-end": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
}
FILES = ("settings.json", "metrics.jsonl", "evaluations/round-000.jsonl", "evaluations/round-001.jsonl")


def cut(path, how):
    path.write_bytes(CUTS[how](path.read_bytes()))


def ends_well(command, path):
    """Whether the command ends, or is refused by an error that names the file and what to do."""
    try:
        command()
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert any(word in str(error) for word in ("delete it", "Copy", "--overwrite_output_dir")), error


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", FILES)
def test_report_and_comparison_of_a_finished_run(name, how, tmp_path):
    rows = [evaluated.row(number, em=number % 2) for number in range(6)]
    run = evaluated.write_run(tmp_path / "run", [rows, rows])
    other = evaluated.write_run(tmp_path / "other", [rows, rows])
    cut(run / name, how)
    ends_well(lambda: write_report(FinishedRun.read(run)), run / name)
    ends_well(lambda: cli.run("compare", [str(run), str(other)]), run / name)
    ends_well(lambda: cli.run("compare", [str(other), str(run)]), run / name)


@pytest.fixture(scope="module")
def interrupted(short_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, send(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train([*short_run, "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize("how", CUTS)
def test_settings_that_were_cut(how, short_run, interrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    cut(out / "settings.json", how)
    for command, words in ((train, [*short_run, "--output_dir", str(out)]), (audit, [str(out)])):
        with pytest.raises(InputError, match=r"settings\.json is not valid JSON"):
            command(words)
        ends_well(lambda command=command, words=words: command(words), out / "settings.json")


def audit(words):
    cli.run("audit", words)


@pytest.mark.parametrize("how", [*CUTS, "missing"])
def test_the_evaluation_to_compare_with_is_refused_before_training(how, short_run, interrupted, tmp_path, monkeypatch):
    out = shutil.copytree(interrupted, tmp_path / "out")
    path = out / "evaluations" / "round-000.jsonl"
    path.unlink() if how == "missing" else cut(path, how)
    at_step(monkeypatch, 1, lambda: pytest.fail("trained"))
    with pytest.raises(InputError, match="--overwrite_output_dir") as refused:
        train([*short_run, "--output_dir", str(out)])
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("how", ["empty", "half", "zeroed"])
def test_a_run_resumes_although_all_that_it_can_make_again_was_cut(how, short_run, interrupted, tmp_path):
    out = shutil.copytree(interrupted, tmp_path / "out")
    first = min((out / "checkpoints").iterdir())
    needed = [out / "settings.json", out / "evaluations", out / "generator", out / "retriever", first]
    for path in out.rglob("*"):
        if path.is_file() and not any(each in (path, *path.parents) for each in needed):
            cut(path, how)
    train([*short_run, "--output_dir", str(out)])
    assert (out / "finished.json").exists()
