"""Experiment trackers: MLflow, Weights & Biases and TensorBoard, through Accelerate, all able to work without a network.

Only the run's own settings and numbers are handed over, never the environment and never a token. Left out: the
metrics.jsonl in the output folder, which is always written.
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
    """The trackers asked for, without "none". Raises InputError if the package of one is not installed."""
    names = [name for name in report_to if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--report_to {name}: expected the package {name}, which is not installed. Run `pip install {name}` or leave it out."
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
    """Open the trackers on the main process; what they keep on disk stays under `folder`.

    A resumed run goes on in the runs it had, known by `folder`/runs.json: `resumed_at` is the last step it keeps, and
    TensorBoard drops what was written after it.

    A MLFLOW_TRACKING_URI, WANDB_MODE or WANDB_API_KEY that is set is respected; otherwise MLflow writes a local
    database and W&B works offline (`wandb sync` sends it later).
    """
    if not names or not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "mlflow" in names:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    if "wandb" in names:
        os.environ.setdefault("WANDB_SILENT", "true")
        if "WANDB_API_KEY" not in os.environ:
            os.environ.setdefault("WANDB_MODE", "offline")
    options = {
        "mlflow": {"run_name": run_name, "logging_dir": str(folder / "mlflow-artifacts")},
        "wandb": {
            "name": run_name,
            "dir": str(folder),
            "settings": {"x_disable_meta": True, "console": "off"},
        },  # no command line, no host, no screen
    }
    ids = _run_ids(folder) if resumed_at is not None else {}
    if "mlflow" in ids:
        options["mlflow"]["run_id"] = ids["mlflow"]
    if "wandb" in ids:
        options["wandb"] |= {"id": ids["wandb"], "resume": "allow"}
    if resumed_at is not None:
        options["tensorboard"] = {"purge_step": resumed_at + 1}
    accelerator.project_configuration.logging_dir = str(folder)  # where Accelerate lets TensorBoard write
    plain = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()
    }
    accelerator.init_trackers(
        project, config=plain, init_kwargs={name: options[name] for name in names if name in options}
    )
    ids = {}
    if "mlflow" in names:
        ids["mlflow"] = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
    if "wandb" in names:
        ids["wandb"] = accelerator.get_tracker("wandb", unwrap=True).id
    write_json(folder / RUN_IDS, ids)


def _run_ids(folder: Path) -> dict:
    """What the trackers call the run that was interrupted; empty where that is not known."""
    path = folder / RUN_IDS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def log_numbers(accelerator: Accelerator, numbers: Mapping, *, step: int, prefix: str) -> None:
    """Hand numbers to the trackers, as plain floats (MLflow drops NumPy's), under `prefix/name`; "@" becomes "_at_"."""
    flat = {
        f"{prefix}/{name.replace('@', '_at_')}": float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float))
    }
    accelerator.log(flat, step=step)
