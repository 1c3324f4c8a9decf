"""Trackers get settings and numbers but no environment, and write below their folder: the real packages, no network."""

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import forked
import numpy as np
import pytest
import yaml
from accelerate import PartialState, tracking
from short_run import at_step, rows, send

from cozyrag.config import parse_settings
from cozyrag.config_checks import TRACKERS
from cozyrag.errors import InputError
from cozyrag.training.tracking import _told, end_trackers, log_numbers, start_trackers, wanted_trackers

SECRETS = {
    "HF_TOKEN": "hf_SECRETtoken",
    "AWS_SECRET_ACCESS_KEY": "aws_SECRETkey",
    "MLFLOW_TRACKING_TOKEN": "mlflow_SECRETtoken",
    "MY_PASSWORD": "my_SECRETword",
}
SETTINGS = parse_settings(["--questions", "my.tsv", "--rounds", "3", "--retriever_learning_rate", "7e-6"]).to_dict()
KEPT = {
    name: str(value) if value is None or isinstance(value, list) else value for name, value in SETTINGS.items()
}  # as trackers receive them
WANDB = {"x_disable_meta": True, "console": "off", "finish_timeout": 120, "finish_timeout_raises": True}
OURS = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_DISABLE_TELEMETRY",
    "TRACKIO_DIR",
    "WANDB_MODE",
    "WANDB_API_KEY",
    "WANDB_SILENT",
)
RUN = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from cozyrag.training.tracking import log_numbers, start_trackers, wanted_trackers

out, names = Path("out"), wanted_trackers(sys.argv[1:])
accelerator = Accelerator(cpu=True, log_with=names, project_dir=str(out))
settings = json.load(sys.stdin)
given = {"project": "my-project", "run_name": "my-run", "folder": out / "trackers", "settings": settings}
start_trackers(accelerator, names, **given)
log_numbers(accelerator, {"loss": 1.5, "recall@5": 62.5, "em_interval": [1.0, 2.0]}, step=3, prefix="generator")
accelerator.end_training()
"""
AGAIN = """
accelerator = Accelerator(cpu=True, log_with=names, project_dir=str(out))
start_trackers(accelerator, names, **given | {"settings": settings | {"rounds": 5, "resume": True}}, resumed_at=3)
log_numbers(accelerator, {"loss": 1.0}, step=4, prefix="generator")
accelerator.end_training()
"""


@pytest.fixture
def environment():
    """os.environ without the trackers' own variables, restored after the test."""
    before = dict(os.environ)
    for name in OURS:
        os.environ.pop(name, None)
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tracked(tmp_path):
    """tracked(name): run a script with this tracker in a process of its own; returns its output folder and its words.

    Its home, temporary and working folders are in tmp_path, and its environment holds secrets.
    """

    def run(name, script=RUN, code=0, **more):
        for folder in ("home", "tmp", "work"):
            (tmp_path / folder).mkdir()
        plain = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1])}
        plain |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        folders = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
        given = {"cwd": tmp_path / "work", "input": json.dumps(SETTINGS), "env": plain | folders | SECRETS | more}
        done = subprocess.run(
            [sys.executable, "-c", script, name], capture_output=True, text=True, timeout=300, **given
        )
        assert done.returncode == code, done.stderr
        return tmp_path / "work" / "out", done

    return run


class Recorder:
    """Replaces an Accelerator and records the calls of the trackers."""

    def __init__(self, is_main_process=True):
        self.is_main_process = is_main_process
        self.project_configuration = SimpleNamespace(logging_dir="elsewhere")
        self.started, self.logged, self.stored, self.name = [], [], [], "recorder"
        self.trackers = [self]

    def store_init_configuration(self, config):
        self.stored.append(config)

    def get_tracker(self, name, unwrap):
        assert unwrap
        return SimpleNamespace(id=f"id of {name}", info=SimpleNamespace(run_id=f"id of {name}"))

    def init_trackers(self, project, config, init_kwargs):
        self.started.append((project, config, init_kwargs))

    def log(self, numbers, step):
        self.logged.append((numbers, step))


def start(recorder, names, folder, settings=(), **more):
    start_trackers(recorder, names, project="p", run_name="r", folder=folder, settings=dict(settings), **more)


# ---- the choice of trackers


@pytest.mark.parametrize(
    ("given", "names"),
    [(["none"], []), ([], []), (["none", "wandb"], ["wandb"]), (list(TRACKERS), list(TRACKERS))],
)
def test_none_is_no_tracker(given, names, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda given: given)
    assert wanted_trackers(given) == names


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_its_remedy(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda given: None if given == name else given)
    with pytest.raises(InputError) as caught:
        wanted_trackers(list(TRACKERS))
    assert f"--report_to {name}" in str(caught.value) and f'pip install "cozyrag[{name}]"' in str(caught.value)


@pytest.mark.parametrize(("names", "main"), [([], True), (["mlflow", "wandb"], False)])
def test_without_trackers_or_beside_the_main_process_nothing_is_changed(names, main, tmp_path, environment):
    recorder, before = Recorder(main), dict(environment)
    start(recorder, names, tmp_path / "trackers")
    assert recorder.started == [] and dict(environment) == before and not (tmp_path / "trackers").exists()


# ---- what they receive


def test_settings_are_plain_values(tmp_path, environment):
    recorder = Recorder()
    settings = parse_settings(["--questions", "my.tsv", "--report_to", "mlflow", "wandb"]).to_dict()
    start(recorder, ["mlflow", "wandb"], tmp_path, settings)
    [(project, config, options)] = recorder.started
    assert project == "p" and set(config) == set(settings)
    assert {type(value) for value in config.values()} <= {int, float, str, bool}
    values = [config[name] for name in ("rounds", "use_cpu", "threads", "report_to")]
    assert values == [2, False, "None", "['mlflow', 'wandb']"]
    assert options == {
        "mlflow": {"run_name": "r", "logging_dir": str(tmp_path / "mlflow-artifacts")},
        "wandb": {"name": "r", "dir": str(tmp_path), "settings": WANDB},
    }


def test_a_resumed_run_continues_its_tracker_runs(tmp_path, environment):
    for resumed_at in (None, 7):
        recorder = Recorder()
        start(recorder, list(TRACKERS), tmp_path, resumed_at=resumed_at)
    [(_, _, options)] = recorder.started
    assert options["mlflow"]["run_id"] == "id of mlflow" and options["tensorboard"] == {"purge_step": 8}
    expected = {"name": "r", "dir": str(tmp_path), "settings": WANDB}
    assert options["wandb"] == expected | {"id": "id of wandb", "resume": "allow"}


def test_trackio_writes_below_its_folder_and_resumes_by_name(tmp_path, environment, monkeypatch):
    """Through Accelerate's own tracker, with a package that records what it is called with."""
    calls = []
    run = SimpleNamespace(log=lambda values, **more: calls.append(("log", values)), finish=lambda: calls.append("end"))
    fake = ModuleType("trackio")
    fake.init = lambda **given: calls.append(("init", given, os.environ["TRACKIO_DIR"])) or run
    fake.config, fake.log, fake.finish = {}, run.log, run.finish
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr("accelerate.tracking.is_trackio_available", lambda: True)
    tracker = tracking.TrackioTracker.__new__(tracking.TrackioTracker)
    for resumed_at, resume in ((None, "never"), (7, "allow")):
        recorder = Recorder()
        start(recorder, ["trackio"], tmp_path, resumed_at=resumed_at)
        [(project, _, options)] = recorder.started
        tracker.run_name, tracker.init_kwargs = project, options["trackio"]
        PartialState()
        tracker.start()
        given = {"project": "p", "name": "r", "resume": resume, "embed": False}
        assert calls.pop() == ("init", given, str(tmp_path / "trackio"))


def test_other_trackers_get_no_options_and_variables(tmp_path, environment):
    recorder = Recorder()
    start(recorder, ["tensorboard"], tmp_path)
    assert recorder.started == [("p", {}, {})] and recorder.project_configuration.logging_dir == str(tmp_path)
    assert not {"MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_SILENT"} & set(environment)


def test_by_default_they_need_no_network(tmp_path, environment):
    start(Recorder(), ["mlflow", "wandb"], tmp_path)
    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert environment["WANDB_MODE"] == "offline" and environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize(
    "given", [{"MLFLOW_TRACKING_URI": "http://mine"}, {"WANDB_MODE": "online"}, {"WANDB_MODE": "disabled"}]
)
def test_variables_of_the_user_are_respected(given, tmp_path, environment):
    environment.update(given)
    start(Recorder(), ["mlflow", "wandb"], tmp_path)
    assert {name: environment[name] for name in given} == given


def test_with_an_api_key_wandb_stays_online(tmp_path, environment):
    environment["WANDB_API_KEY"] = "key"
    start(Recorder(), ["wandb"], tmp_path)
    assert "WANDB_MODE" not in environment


def test_numbers_are_plain_floats_under_a_prefix():
    recorder = Recorder()
    numbers = {"loss": np.float64(0.5), "recall@1": 3, "em_interval": [0.1, 0.2], "kind": "evaluation"}
    log_numbers(recorder, numbers, step=7, prefix="evaluation")
    [(numbers, step)] = recorder.logged
    assert numbers == {"evaluation/loss": 0.5, "evaluation/recall_at_1": 3.0} and step == 7
    assert {type(value) for value in numbers.values()} == {float}


# ---- trackers that fail


class Failing(Recorder):
    """Its server is down; the address in the error holds a password."""

    error = OSError("no answer from https://me:SECRET@host/api, nor from http://me:SECRET@host")

    def init_trackers(self, project, config, init_kwargs):
        raise self.error

    def log(self, numbers, step):
        raise self.error

    def finish(self):
        raise self.error


def test_a_tracker_that_cannot_be_started_is_one_sentence_without_password(tmp_path, environment):
    with pytest.raises(InputError, match="--report_to mlflow: .*OSError.*me:\\*\\*\\*@host/api.*omit it") as caught:
        start(Failing(), ["mlflow"], tmp_path)
    assert "SECRET" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "address",
    ["http://me:SEC@RET@host/a", "http://me:SEC/RET@host", "http://SECRET@host", "postgresql://me:SECRET@h/db"],
)
def test_no_form_of_an_address_shows_its_password(address):
    told = _told(OSError(f"no answer from {address}, really"))
    assert "SEC" not in told and "RET" not in told and "***@h" in told and told.endswith("really")
    assert "http://host:5000/a" in _told(OSError("no answer from http://host:5000/a"))


def test_a_tracker_that_fails_later_is_noted_once_and_the_others_go_on(capsys):
    failing, good = Failing(), Recorder()
    together = SimpleNamespace(trackers=[failing, good])
    for step in (1, 2):
        log_numbers(together, {"loss": 1.0}, step=step, prefix="generator")
    told = capsys.readouterr().out
    assert told.count("the tracker recorder failed") == 1 and "SECRET" not in told
    assert [step for _, step in good.logged] == [1, 2] and together.trackers == [good]
    together.trackers = [Failing()]
    end_trackers(together)
    assert "SECRET" not in (told := capsys.readouterr().out) and told.count("\n") == 1 and not together.trackers


def test_a_password_in_the_address_is_moved_out_of_it(tmp_path, environment):
    environment["MLFLOW_TRACKING_URI"] = "https://me:p%40ss@host:5000/a?b"
    start(Recorder(), ["mlflow"], tmp_path)
    assert environment["MLFLOW_TRACKING_URI"] == "https://host:5000/a?b"
    assert (environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")


@pytest.mark.parametrize("content", [b"", b"{", bytes(40), b"[]"])
def test_with_damaged_ids_the_trackers_begin_new_runs_and_say_so(content, tmp_path, environment, capsys):
    (tmp_path / "runs.json").write_bytes(content)
    recorder = Recorder()
    start(recorder, ["mlflow", "wandb"], tmp_path, resumed_at=3)
    [(_, _, options)] = recorder.started
    assert "run_id" not in options["mlflow"] and "id" not in options["wandb"]
    assert "runs.json" in (told := capsys.readouterr().out) and "begin new runs" in told


# ---- servers that go away: the real clients, and a server that answers as far as they need, then no more

GONE = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from cozyrag.training import tracking
from cozyrag.training.tracking import end_trackers, log_numbers, start_trackers

tracking.WAITED, out = 2, Path("out")
accelerator = Accelerator(cpu=True, log_with=sys.argv[1:], project_dir=str(out))
given = {"project": "p", "run_name": "r", "folder": out / "trackers", "settings": json.load(sys.stdin)}
start_trackers(accelerator, sys.argv[1:], **given)
for step in (3, 4):
    log_numbers(accelerator, {"loss": 1.5}, step=step, prefix="generator")
end_trackers(accelerator)
print("the run ends")
"""


class Leaving(BaseHTTPRequestHandler):
    """What MLflow and W&B need to begin a run; after `server.last`, or its own words, connections are only closed."""

    protocol_version = "HTTP/1.1"

    def _reply(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8", "replace")
        self.close_connection = self.server.left
        if self.server.left:
            return
        content = json.dumps(self._answer(asked)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.server.left = self.server.last in self.path + asked

    do_GET = do_POST = do_PUT = _reply

    def _answer(self, asked):
        if "UpsertBucket" in asked:
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "r", "name": "r", "displayName": "r", "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        run = {"info": {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}
        return {"experiment_id": "1", "experiments": [], "experiment": {"experiment_id": "1", "name": "p"}, "run": run}

    def log_message(self, *words):
        pass


@pytest.fixture
def leaving():
    """leaving(last): the address of a server on loopback that leaves after the request with this word."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Leaving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def begin(last):
            server.left, server.last = last == "", last
            return f"127.0.0.1:{server.server_address[1]}"

        yield begin
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
def test_mlflow_without_its_server_is_refused_at_the_start_in_a_sentence_without_password(tracked, leaving):
    _, done = tracked("mlflow", GONE, code=1, MLFLOW_TRACKING_URI=f"http://me:SECRETword@{leaving('')}")
    error = done.stderr.strip().split("\n")[-1]
    assert "InputError: --report_to mlflow: a tracker could not be started" in error and "omit it" in error
    assert "SECRETword" not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
def test_mlflow_whose_server_goes_away_is_left_out_and_the_run_ends(tracked, leaving):
    _, done = tracked("mlflow", GONE, MLFLOW_TRACKING_URI=f"http://me:SECRETword@{leaving('generator/loss')}")
    assert done.stdout.count("the tracker mlflow failed") == 1 and done.stdout.endswith("the run ends\n")
    assert "SECRETword" not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_whose_server_goes_away_does_not_keep_the_run_from_ending(tracked, leaving):
    """By itself W&B tries for hours to send the rest."""
    key = "a" * 40
    _, done = tracked("wandb", GONE, WANDB_BASE_URL=f"http://{leaving('UpsertBucket')}", WANDB_API_KEY=key)
    assert "the tracker wandb failed (TimeoutError" in done.stdout and done.stdout.endswith("the run ends\n")
    assert key not in done.stdout + done.stderr


# ---- the real packages


def holders(folder, text):
    """The files below a folder that hold the text."""
    return {path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()}


def check_place_and_secrets(tmp_path, out):
    files = {path for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert files and all((out / "trackers") in path.parents for path in files), files
    for name, secret in SECRETS.items():
        assert not holders(tmp_path, secret) and not holders(tmp_path, name)


def test_tensorboard_keeps_settings_and_numbers_below_trackers(tracked, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = tracked("tensorboard")
    check_place_and_secrets(tmp_path, out)
    events = EventAccumulator(str(out / "trackers" / "my-project")).Reload()
    assert {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "generator/loss": [(3, 1.5)],
        "generator/recall_at_5": [(3, 62.5)],
    }
    [path] = (out / "trackers").rglob("hparams.yml")
    assert yaml.safe_load(path.read_text()) == KEPT


def test_wandb_offline_keeps_settings_and_numbers_below_trackers(tracked, tmp_path):
    out, _ = tracked("wandb")
    check_place_and_secrets(tmp_path, out)
    [record] = (out / "trackers" / "wandb").glob("offline-run-*/run-*.wandb")
    raw = record.read_bytes()
    expected = (
        "my-project",
        "my-run",
        '"my.tsv"',
        "retriever_learning_rate",
        "generator/loss",
        "generator/recall_at_5",
    )
    for words in (*expected, "62.5"):
        assert words.encode() in raw, words
    log = (record.parent / "logs" / "debug.log").read_text()
    assert "config_cb" in log and str(KEPT) in log


@pytest.mark.slow
def test_mlflow_keeps_settings_and_numbers_in_a_database_below_trackers_and_of_a_resumed_run_new_ones_as_tags(
    tracked, tmp_path
):
    out, _ = tracked("mlflow", RUN + AGAIN)
    check_place_and_secrets(tmp_path, out)
    with sqlite3.connect(out / "trackers" / "mlflow.db") as database:

        def rows(query):
            return database.execute(query).fetchall()

        assert dict(rows("SELECT key, value FROM params")) == {name: str(value) for name, value in KEPT.items()}
        assert set(rows("SELECT key, value, step FROM metrics")) == {
            ("generator/loss", 1.5, 3),
            ("generator/recall_at_5", 62.5, 3),
            ("generator/loss", 1.0, 4),
        }
        tags = rows("SELECT key, value FROM tags WHERE key LIKE 'resumed.%'")
        assert sorted(tags) == [("resumed.resume", "True"), ("resumed.rounds", "5")]
        assert rows("SELECT name, status FROM runs") == [("my-run", "FINISHED")]
        assert ("my-project",) in rows("SELECT name FROM experiments")


# ---- a run that is killed, resumed, and given more rounds, with all packages that are installed

INSTALLED = [name for name in TRACKERS if importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def thrice(short_run, tmp_path_factory):
    """The output of a run with all trackers that SIGTERM ends, that resumes, and that gets a second round.

    Each time it is a process, ends as it should, and no tracker fails.
    """
    place = tmp_path_factory.mktemp("thrice")
    words = ["train", *short_run, "--output_dir", str(place / "out"), "--report_to", *(INSTALLED or ["none"])]
    for code, given in ((143, words), (0, words), (0, [*words, "--resume", "--rounds", "2"])):

        def before(code=code):
            for variable in OURS:
                os.environ.pop(variable, None)
            os.environ["HOME"] = str(place)
            if code:
                at_step(pytest.MonkeyPatch(), 3, send(signal.SIGTERM), "generator_step")

        ended = os.waitstatus_to_exitcode(os.waitpid(forked.start(given, place / "log", before), 0)[1])
        told = (place / "log").read_text()
        assert ended == code and "Traceback" not in told and "the tracker" not in told, told[-3000:]
    return place / "out"


def losses(out):
    """{step: loss} of the generator, in both rounds."""
    found = {row["steps_so_far"]: row["loss"] for row in rows(out, "step") if row["phase"] == "generator"}
    assert len(found) == 6 and max(found) > 10
    return found


def needs(name):
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed")


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard_has_every_step_of_a_run_that_was_killed_resumed_and_given_more_rounds(thrice):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = {path.parent for path in (thrice / "trackers").glob("*/events.*")}
    points = EventAccumulator(str(folder)).Reload().Scalars("generator/loss")
    assert {point.step: point.value for point in points} == pytest.approx(losses(thrice))
    assert len(points) == len(losses(thrice))


@pytest.mark.slow
@needs("wandb")
def test_wandb_continues_one_run_that_was_killed_resumed_and_given_more_rounds(thrice):
    records = sorted((thrice / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 3 and len({path.name for path in records}) == 1
    assert all(b"generator/loss" in path.read_bytes() for path in records)


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_has_every_step_of_a_run_that_was_killed_resumed_and_given_more_rounds(thrice):
    with sqlite3.connect(thrice / "trackers" / "mlflow.db") as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        found = database.execute("SELECT step, value FROM metrics WHERE key = 'generator/loss'").fetchall()
    assert dict(found) == pytest.approx(losses(thrice)) and len(found) == len(losses(thrice))


@pytest.mark.slow
@needs("trackio")
def test_trackio_has_every_step_of_a_run_that_was_killed_resumed_and_given_more_rounds(thrice):
    [path] = (thrice / "trackers" / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        stored = database.execute("SELECT step, metrics, run_name FROM metrics").fetchall()
    values = [(step, json.loads(each)) for step, each, _ in stored]
    found = [(step, each["generator/loss"]) for step, each in values if "generator/loss" in each]
    assert dict(found) == pytest.approx(losses(thrice)) and len(found) == len(losses(thrice))
    assert len({name for *_, name in stored}) == 1
