"""What a run keeps in its output folder, and how it goes on from there.

A checkpoint folder is complete: progress, both models as ordinary checkpoints, and inside a phase the optimizer's
state. It is written beside its final name and renamed when it is whole, so a folder under its final name is a whole
one. Left out: what the models are (generator.py, retriever.py) and when to save (rounds.py).
"""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator

from cozyrag.config import Settings
from cozyrag.errors import InputError
from cozyrag.generator import Generator
from cozyrag.retriever import Retriever

PHASES = ("generator", "retriever", "examine")
OURS = (
    "checkpoints",
    "contexts",
    "feedback",
    "examined",
    "audit.json",
    "generator",
    "retriever",
    "index",
    "pushing",
    "trackers",
    "cozyrag.json",
    "metrics.jsonl",
    "settings.json",
    "report.html",
    "plots",
    "README.md",
)
FREE_TO_CHANGE = {  # settings that do not touch the course of training
    "resume", "overwrite_output_dir", "output_dir", "save_steps", "save_total_limit", "logging_steps", "report_to", "project_name", "run_name",
    "push_to_hub", "hub_model_id", "hub_private", "hub_strategy", "model_license", "data_license", "plan", "threads", "encode_batch_size", "answer_batch_size", "rounds",
}  # fmt: skip


@dataclass
class Progress:
    """What is to be done next: `phase` of `round`, of which `step` optimizer steps are taken. Round 0 only examines."""

    round: int = 0
    phase: str = "examine"
    step: int = 0
    metrics: list[dict] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Folder name; names sort in the order of the run."""
        return f"round-{self.round:03d}-{PHASES.index(self.phase)}-{self.phase}-{self.step:06d}"


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write into a folder that holds something, unless asked. Reads only. Raises InputError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir: expected a folder, {folder.absolute()} is a file. Give another name.")
    content = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if resume and not _complete_checkpoints(folder):
        raise InputError(
            f"--resume: expected a checkpoint under {folder.absolute() / 'checkpoints'}, found none. Start without --resume."
        )
    if content and not resume and not overwrite:
        raise InputError(
            f"--output_dir: expected a new or empty folder, {folder.absolute()} holds {content[0]!r}{' and more' if len(content) > 1 else ''}; "
            "nothing was touched. Give another folder, --resume to go on with that run, or --overwrite_output_dir to replace it."
        )
    strangers = [name for name in content if name not in OURS]
    if overwrite and strangers:
        raise InputError(
            f"--overwrite_output_dir deletes what a run left behind, but {folder.absolute()} also holds {strangers[0]!r}, which no run wrote; "
            "nothing was touched. Move it away or give another --output_dir."
        )


def clear_output(folder: Path) -> None:
    """Delete what an earlier run left, and nothing else."""
    for name in OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _complete_checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoints/round-*") if not path.name.endswith(".partial"))


class Checkpoints:
    """Checkpoints of one run under OUTPUT/checkpoints, newest last, at most `limit` of them."""

    def __init__(self, accelerator: Accelerator, folder: Path, settings: Settings):
        self.accelerator = accelerator
        self.folder = folder
        self.settings = settings
        self.limit = settings.output.save_total_limit
        # Models travel as ordinary checkpoints; Accelerate keeps optimizer, schedule, scaler and random states.
        accelerator.register_save_state_pre_hook(lambda models, weights, _folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        complete = _complete_checkpoints(self.folder)
        return complete[-1] if complete else None

    def read(self, checkpoint: Path) -> Progress:
        """Progress of a checkpoint. Raises InputError if it was made under settings that lead elsewhere."""
        saved = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        before, now = saved.pop("settings"), self.settings.to_dict()
        changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
        if changed:
            listed = ", ".join(f"{name} (was {before.get(name)!r}, now {now[name]!r})" for name in changed)
            raise InputError(
                f"--resume: expected the settings of the interrupted run, found other ones for {listed}. Give the old ones or start anew."
            )
        return Progress(**saved)

    def save(self, progress: Progress, generator: Generator, retriever: Retriever) -> None:
        """Write a checkpoint on every process's behalf and drop the oldest beyond the limit."""
        final = self.folder / "checkpoints" / progress.name
        partial = final.with_name(final.name + ".partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            generator.save(partial / "generator")
            retriever.save(partial / "retriever")
            state = asdict(progress) | {"settings": self.settings.to_dict()}
            (partial / "progress.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if progress.step:
            with contextlib.redirect_stdout(None):
                self.accelerator.save_state(str(partial / "state"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in _complete_checkpoints(self.folder)[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def restore_optimizer(self, checkpoint: Path) -> None:
        """Load optimizer, schedule and scaler of an interrupted phase into what is prepared now."""
        self.accelerator.load_state(str(checkpoint / "state"))


def write_json(path: Path, content: dict) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """All rows, one JSON object a line, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.replace(path)
