"""Experiment trackers: MLflow, Weights & Biases, TensorBoard and Trackio, through Accelerate, usable without a network.

They receive only the settings and numbers of a run, never the environment or a token, and a password in the address of
a server is neither printed nor written. A tracker that fails later is left out, and the run goes on: its numbers are in
metrics.jsonl too. Left out: metrics.jsonl (run_log.py).
"""

import importlib.util
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.terminal import one_line, say_above_bars

RUN_IDS = "runs.json"
WAITED = 120  # seconds that a finished run waits for the server of W&B, which by default it would do for hours


def wanted_trackers(report_to: Sequence[str]) -> list[str]:
    """The trackers in --report_to, without "none". Raises InputError if the package of one is not installed."""
    names = [name for name in report_to if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--report_to {name}: expected the package {name}, which is not installed. "
                f'Run `pip install "cozyrag[{name}]"` or omit this tracker.'
            )
    return names


def start_trackers(
    accelerator: Accelerator,
    names: Sequence[str],
    *,
    project: str,
    run_name: str,
    folder: Path,
    settings: Mapping,
    resumed_at: int | None = None,
) -> None:
    """Start the trackers on the main process; their local files are below `folder`.

    A resumed run continues its tracker runs, whose ids are in `folder`/runs.json: `resumed_at` is its last optimizer
    step, and TensorBoard drops what was written after it.

    MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_API_KEY and TRACKIO_DIR are respected; by default MLflow and Trackio write
    local databases and W&B works offline (`wandb sync` uploads it later).

    Raises InputError if a tracker cannot be started, as when its server is down.
    """
    if not names or not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _set_environment(names, folder)
    accelerator.project_configuration.logging_dir = str(folder)  # the folder of Accelerate's TensorBoard tracker
    config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    options = _options(run_name, folder, resumed_at)
    given = {name: options[name] for name in names if name in options}
    try:
        accelerator.init_trackers(project, config=config if resumed_at is None else None, init_kwargs=given)
        for tracker in accelerator.trackers if resumed_at is not None else ():
            _store_again(tracker, config)
    except Exception as error:  # each library has its own errors, of its server or its files
        raise InputError(
            f"--report_to {' '.join(names)}: a tracker could not be started ({_told(error)}). Check its server and its "
            "address, or omit it; the numbers are in metrics.jsonl as well."
        ) from None  # the causes may hold a password
    ids = {}
    if "mlflow" in names:
        ids["mlflow"] = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
    if "wandb" in names:
        ids["wandb"] = accelerator.get_tracker("wandb", unwrap=True).id
    write_json(folder / RUN_IDS, ids)


def _set_environment(names: Sequence[str], folder: Path) -> None:
    """The defaults of the trackers' own variables."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds of a server that takes but does not answer
    if "mlflow" in names:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        _move_password(os.environ)
    if "wandb" in names:
        os.environ.setdefault("WANDB_SILENT", "true")
        if "WANDB_API_KEY" not in os.environ:
            os.environ.setdefault("WANDB_MODE", "offline")
    if "trackio" in names:
        os.environ.setdefault("TRACKIO_DIR", str(folder.absolute() / "trackio"))  # read when it is imported


def _options(run_name: str, folder: Path, resumed_at: int | None) -> dict[str, dict]:
    """The arguments of each tracker."""
    options: dict[str, dict] = {
        "mlflow": {"run_name": run_name, "logging_dir": str(folder / "mlflow-artifacts")},
        "wandb": {
            "name": run_name,
            "dir": str(folder),
            "settings": {
                "x_disable_meta": True,  # no command line and host
                "console": "off",
                "finish_timeout": WAITED,
                "finish_timeout_raises": True,
            },
        },
        "trackio": {"name": run_name, "resume": "never" if resumed_at is None else "allow", "embed": False},
    }
    if resumed_at is not None:
        ids = _run_ids(folder / RUN_IDS)
        options["tensorboard"] = {"purge_step": resumed_at + 1}
        if "mlflow" in ids:
            options["mlflow"]["run_id"] = ids["mlflow"]
        if "wandb" in ids:
            options["wandb"] |= {"id": ids["wandb"], "resume": "allow"}
    return options


def _run_ids(path: Path) -> dict[str, str]:
    """The ids of the tracker runs so far; empty, and a note, if the file is damaged."""
    try:
        return read_object(path, "The trackers begin new runs.") if path.exists() else {}
    except InputError as error:
        say_above_bars(f"Note: {one_line(error)}")
        return {}


def log_numbers(accelerator: Accelerator, numbers: Mapping, *, step: int, prefix: str) -> None:
    """Log numbers to the trackers as `prefix/name`, as plain floats (MLflow drops NumPy's); "@" becomes "_at_"."""
    flat = {
        f"{prefix}/{name.replace('@', '_at_')}": float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float))
    }
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(flat, step=step)
        except Exception as error:  # as in `start_trackers`
            accelerator.trackers.remove(tracker)
            _note_failure(tracker, error)


def end_trackers(accelerator: Accelerator) -> None:
    """Close the trackers."""
    while accelerator.trackers:
        tracker = accelerator.trackers.pop()
        try:
            tracker.finish()
        except Exception as error:  # as in `start_trackers`
            _note_failure(tracker, error)


def _note_failure(tracker: GeneralTracker, error: Exception) -> None:
    say_above_bars(
        f"Note: the tracker {tracker.name} failed ({_told(error)}), and gets nothing more; metrics.jsonl has all "
        "numbers. A resumed run tries again."
    )


def _told(error: Exception) -> str:
    """An error for a message, without a password in an address."""
    text = re.sub(r"(://(?:[^/\s:@]*:(?=\S*@))?)\S*@", r"\1***@", str(error))  # a password may hold "@" and "/"
    return one_line(f"{type(error).__name__}: {text[:300]}")


def _move_password(environment: MutableMapping[str, str]) -> None:
    """Take name and password out of MLflow's address into its variables for them: it prints and stores the address."""
    place = urlsplit(environment["MLFLOW_TRACKING_URI"])
    if place.scheme not in ("http", "https") or "@" not in place.netloc:
        return
    for part, value in (("USERNAME", place.username), ("PASSWORD", place.password)):
        if value:
            environment.setdefault(f"MLFLOW_TRACKING_{part}", unquote(value))
    environment["MLFLOW_TRACKING_URI"] = place._replace(netloc=place.netloc.rpartition("@")[2]).geturl()


def _store_again(tracker: GeneralTracker, config: Mapping) -> None:
    """Store the settings of a resumed run. MLflow refuses other values than before, so those become tags."""
    if tracker.name != "mlflow":
        tracker.store_init_configuration(dict(config))
        return
    import mlflow

    known = mlflow.get_run(tracker.tracker.info.run_id).data.params
    tracker.store_init_configuration({name: value for name, value in config.items() if name not in known})
    changed = {name: str(value) for name, value in config.items() if known.get(name, str(value)) != str(value)}
    mlflow.set_tags({f"resumed.{name}": value for name, value in changed.items()})
