"""The output folder of a run: what may stand there, whose it is, and whether the run in it has come to its end.

Left out: checkpoints (checkpointing.py) and how files are written (atomic_files.py).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import NEXT, OLD, PARTIAL, write_json, writing
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.old_names import EVALUATIONS, OLD_EVALUATIONS, current_settings, evaluation_files
from cozyrag.runtime.precision import asked_at_launch

LOCK = ".lock"
SETTINGS = "settings.json"
FINISHED = "finished.json"  # written last of all, pushing included
OURS = (
    "checkpoints",
    "contexts",
    "feedback",
    "answers",
    EVALUATIONS,
    OLD_EVALUATIONS,
    "audit.json",
    "generator",
    "retriever",
    "index",
    "pushing",
    "trackers",
    "skipped-steps",
    "report.html",
    "plots",
    "cozyrag.json",
    "metrics.jsonl",
    SETTINGS,
    FINISHED,
    "README.md",
    NEXT,
    OLD,
)
# Settings that touch neither losses nor weights: a resumed run may have others without a word.
FREE_TO_CHANGE = {
    "resume", "allow_changed_settings", "overwrite_output_dir", "output_dir", "plan", "save_steps", "save_minutes", "save_total_limit", "logging_steps",
    "report_to", "project_name", "run_name", "push_to_hub", "hub_model_id", "hub_private", "hub_strategy", "model_license", "data_license", "rounds", "max_skipped_steps",
}  # fmt: skip
# Settings that change the rounding of sums and nothing else: with --allow_changed_settings, and the end is no longer bit-equal.
SAFE_TO_CHANGE = {
    "threads", "encode_batch_size", "answer_batch_size", "gradient_accumulation_steps", "generator_sharding", "use_cpu", "processes",
}  # fmt: skip


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first; those being written have another name."""
    return sorted(path for path in folder.glob("checkpoints/round-*") if not path.name.endswith(PARTIAL))


def check_output(folder: Path, settings: Mapping) -> bool:
    """Whether to go on with the run that the folder holds. Reads only.

    Raises:
        InputError: the folder holds something that this run may not touch, or a run that it cannot go on with.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir: expected a folder, {folder.absolute()} is a file. Give another name.")
    _check_leave(folder)
    content = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []
    if settings["overwrite_output_dir"]:
        _check_foreign_files(folder, content)
        return False
    begun = (folder / SETTINGS).exists()
    if begun and _nothing_saved(folder):
        return True
    saved = complete_checkpoints(folder)
    if settings["resume"] and not saved:
        raise InputError(
            f"--resume: expected a checkpoint under {folder.absolute() / 'checkpoints'}, found none; nothing was touched. Start without --resume, in "
            "another folder if this one holds something."
        )
    if settings["resume"] or (begun and saved and not (folder / FINISHED).exists()):
        before = settings_before(folder)
        asked = settings["mixed_precision"] or before["mixed_precision"]  # what nobody asks for stays as it was
        check_changes(before, {**settings, "mixed_precision": asked}, settings["allow_changed_settings"])
        return True
    if content:
        held = "a finished run" if begun else f"{content[0]!r}{' and more' if len(content) > 1 else ''}"
        raise InputError(
            f"--output_dir: expected a new or empty folder, {folder.absolute()} holds {held}; nothing was touched. "
            "Give another folder, --resume to go on with that run, or --overwrite_output_dir to replace it."
        )
    return False


def settings_before(folder: Path) -> dict:
    """The settings of the run in the folder, flat, and what was measured for them.

    Runs that left the precision out once took what accelerate launch was told, else float32.
    """
    before = current_settings(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    asked = before.get("mixed_precision") or asked_at_launch(os.environ) or "no"
    return before | {"mixed_precision": asked}


def _nothing_saved(folder: Path) -> bool:
    """Whether the run in the folder was ended before its first checkpoint, so that starting anew loses nothing."""
    return (
        not (folder / FINISHED).exists() and not complete_checkpoints(folder) and set(evaluation_files(folder)) <= {0}
    )


def check_changes(before: Mapping, now: Mapping, allow_changes: bool) -> None:
    """Refuse settings that lead elsewhere than those of the interrupted run. Raises InputError that names them.

    Args:
        anyway: let those of SAFE_TO_CHANGE pass.
    """
    changed = [
        name
        for name in now
        if before.get(name) != now[name] and name not in FREE_TO_CHANGE and not name.startswith("hub_")
    ]
    grave = [name for name in changed if name not in SAFE_TO_CHANGE]
    refused = grave or ([] if allow_changes else changed)
    if not refused:
        return
    listed = ", ".join(f"{name} (was {before.get(name)!r}, now {now[name]!r})" for name in refused)
    ways = "Give the old ones, another --output_dir, or --overwrite_output_dir to start anew"
    if not grave:
        ways += ", or --allow_changed_settings: these change the rounding only, so the end will be as good but not the same to the last bit"
    raise InputError(f"Expected the settings of the interrupted run, found other ones for {listed}. {ways}.")


def _check_leave(folder: Path) -> None:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"--output_dir: expected a folder that can be written, {there.absolute()} cannot. Change its permissions or give another folder."
        )


def _check_foreign_files(folder: Path, content: list[str]) -> None:
    foreign = [name for name in content if name.removesuffix(PARTIAL) not in OURS]
    if foreign:
        raise InputError(
            f"--overwrite_output_dir deletes what a run left behind, but {folder.absolute()} also holds {foreign[0]!r}, which no run wrote; "
            "nothing was touched. Move it away or give another --output_dir."
        )


def clear_output(folder: Path) -> None:
    """Delete what an earlier run left, and nothing else."""
    for name in OURS:
        for path in (folder / name, folder / (name + PARTIAL)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder, which is made if need be and goes again if nothing was written.

    The operating system drops the lock when the process ends, however it ends. Raises InputError if another run has it.
    """
    fresh = not folder.exists()
    lock = FileLock(folder / LOCK, blocking=False)

    def acquire() -> None:
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout as error:
            raise InputError(
                f"--output_dir: another run is writing into {folder.absolute()}; two would spoil each other's files. Wait for its end or give "
                "another folder."
            ) from error

    main_decides(accelerator, acquire)
    try:
        yield
    finally:
        if accelerator.is_main_process:
            (folder / LOCK).unlink(missing_ok=True)  # before it is released: nobody else can have opened it yet
            lock.release()
            if fresh and not any(folder.iterdir()):
                folder.rmdir()


def mark_finished(folder: Path, rounds: int) -> None:
    """Note that the run in the folder has come to its end."""
    write_json(folder / FINISHED, {"rounds": rounds})
