"""Experiment trackers: MLflow, Weights & Biases, TensorBoard and Trackio, through Accelerate, usable without a network.

They receive only the settings and numbers of a run, never the environment or a token. Left out: metrics.jsonl
(run_log.py).
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import write_json

RUN_IDS = "runs.json"


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
    """
    if not names or not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _set_environment(names, folder)
    accelerator.project_configuration.logging_dir = str(folder)  # the folder of Accelerate's TensorBoard tracker
    config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    options = _options(run_name, folder, resumed_at)
    accelerator.init_trackers(
        project, config=config, init_kwargs={name: options[name] for name in names if name in options}
    )
    ids = {}
    if "mlflow" in names:
        ids["mlflow"] = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
    if "wandb" in names:
        ids["wandb"] = accelerator.get_tracker("wandb", unwrap=True).id
    write_json(folder / RUN_IDS, ids)


def _set_environment(names: Sequence[str], folder: Path) -> None:
    """The defaults of the trackers' own variables."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "mlflow" in names:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
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
            "settings": {"x_disable_meta": True, "console": "off"},  # no command line, host or screen output
        },
        "trackio": {"name": run_name, "resume": "never" if resumed_at is None else "allow", "embed": False},
    }
    if resumed_at is not None:
        path = folder / RUN_IDS
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        options["tensorboard"] = {"purge_step": resumed_at + 1}
        if "mlflow" in ids:
            options["mlflow"]["run_id"] = ids["mlflow"]
        if "wandb" in ids:
            options["wandb"] |= {"id": ids["wandb"], "resume": "allow"}
    return options


def log_numbers(accelerator: Accelerator, numbers: Mapping, *, step: int, prefix: str) -> None:
    """Log numbers to the trackers as `prefix/name`, as plain floats (MLflow drops NumPy's); "@" becomes "_at_"."""
    flat = {
        f"{prefix}/{name.replace('@', '_at_')}": float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float))
    }
    accelerator.log(flat, step=step)
