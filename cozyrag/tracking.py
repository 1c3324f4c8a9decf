"""Experiment trackers: MLflow, Weights & Biases and TensorBoard, through Accelerate, all able to work without a network.

Only the run's own settings and numbers are handed over, never the environment and never a token. Left out: the
metrics.jsonl in the output folder, which is always written.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from cozyrag.errors import InputError


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
    accelerator: Accelerator, names: Sequence[str], *, project: str, run_name: str, folder: Path, settings: Mapping
) -> None:
    """Open the trackers on the main process; what they keep on disk stays under `folder`.

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
    accelerator.project_configuration.logging_dir = str(folder)  # where Accelerate lets TensorBoard write
    plain = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()
    }
    accelerator.init_trackers(
        project, config=plain, init_kwargs={name: options[name] for name in names if name in options}
    )


def log_numbers(accelerator: Accelerator, numbers: Mapping, *, step: int, prefix: str) -> None:
    """Hand numbers to the trackers, as plain floats (MLflow drops NumPy's), under `prefix/name`; "@" becomes "_at_"."""
    flat = {
        f"{prefix}/{name.replace('@', '_at_')}": float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float))
    }
    accelerator.log(flat, step=step)
