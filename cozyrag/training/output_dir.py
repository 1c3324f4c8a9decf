"""The output folder of a run: what it may hold, and whether the run in it is finished, to be resumed or to be replaced.

Left out: checkpoints (checkpointing.py), how files are written (atomic_files.py).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator

from cozyrag.config import DEFAULTS
from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import NEXT, OLD, PARTIAL, flush, is_partial_of, write_json, write_text
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.distributed import main_decides
from cozyrag.runtime.folder_lock import LOCK, held
from cozyrag.runtime.old_names import EVALUATIONS, OLD_EVALUATIONS, current_settings, evaluation_files
from cozyrag.runtime.precision import asked_at_launch

GIVEN = "given"  # questions and passages that `cozyrag.train` was given as rows: written first, and never cleared
SETTINGS = "settings.json"
FINISHED = "finished.json"  # written last, after a push
OURS = (
    "checkpoints", "contexts", "feedback", "answers", EVALUATIONS, OLD_EVALUATIONS, "audit.json", "generator",
    "retriever", "reranker", "index", "pushing", "trackers", "skipped-steps", "report.html", "plots", "cozyrag.json",
    "metrics.jsonl", SETTINGS, FINISHED, "README.md", NEXT, OLD,
)  # fmt: skip
LOST_SETTINGS = "Without it the run cannot be resumed: start again with --overwrite_output_dir."
# Settings that affect neither losses nor weights: a resumed run may change them.
FREE_TO_CHANGE = {
    "resume", "allow_changed_settings", "overwrite_output_dir", "output_dir", "plan", "save_steps", "save_minutes",
    "save_total_limit", "logging_steps", "report_to", "project_name", "run_name", "push_to_hub", "hub_model_id",
    "hub_private", "hub_strategy", "model_license", "data_license", "rounds", "max_skipped_steps",
}  # fmt: skip
# Settings that affect only the rounding of sums: a resumed run may change them with --allow_changed_settings.
SAFE_TO_CHANGE = {
    "threads", "encode_batch_size", "answer_batch_size", "gradient_accumulation_steps", "generator_sharding", "use_cpu",
    "processes",
}  # fmt: skip


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, oldest first, without those being written."""
    return sorted(path for path in folder.glob("checkpoints/round-*") if not path.name.endswith(PARTIAL))


def check_output(folder: Path, settings: Mapping) -> bool:
    """Whether to resume the run in the folder. Only reads.

    Raises:
        InputError: the folder holds other files, or a run that cannot be resumed.
    """
    place = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir: expected a folder, {place} is a file. Give another name.")
    _check_writable(folder)
    content = (
        sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, GIVEN)) if folder.is_dir() else []
    )
    if settings["overwrite_output_dir"]:
        _check_foreign_files(folder, content)
        return False
    begun = (folder / SETTINGS).exists()
    if begun and _nothing_saved(folder):
        return True
    saved = complete_checkpoints(folder)
    if settings["resume"] and not saved:
        raise InputError(
            f"--resume: expected a checkpoint in {place / 'checkpoints'}, found none; nothing was changed. "
            "Start without --resume, in another folder if this one holds other files."
        )
    if settings["resume"] or (begun and saved and not (folder / FINISHED).exists()):
        before = settings_before(folder)
        precision = settings["mixed_precision"] or before["mixed_precision"]  # by default that of the run
        check_changes(before, {**settings, "mixed_precision": precision}, settings["allow_changed_settings"])
        return True
    if content:
        held = "a finished run" if begun else f"{content[0]!r}{' and more' if len(content) > 1 else ''}"
        raise InputError(
            f"--output_dir: expected a new or empty folder, {place} holds {held}; nothing was changed. "
            "Give another folder, --resume to continue that run, or --overwrite_output_dir to replace it."
        )
    return False


def settings_before(folder: Path) -> dict:
    """The flat settings of the run in the folder; those that its version did not have are at their defaults.

    Earlier versions did not store a precision that was not set: it was that of `accelerate launch`, or else float32.
    """
    before = DEFAULTS | current_settings(read_object(folder / SETTINGS, LOST_SETTINGS))
    precision = before.get("mixed_precision") or asked_at_launch(os.environ) or "no"
    return before | {"mixed_precision": precision}


def _nothing_saved(folder: Path) -> bool:
    """Whether the run in the folder ended before its first checkpoint, so that starting again loses nothing."""
    saved = (folder / FINISHED).exists() or complete_checkpoints(folder)
    return not saved and set(evaluation_files(folder)) <= {0}


def check_changes(before: Mapping, now: Mapping, allow_changes: bool) -> None:
    """Raise InputError if settings differ from those of the interrupted run and may not; the message names them.

    Args:
        allow_changes: of the settings in SAFE_TO_CHANGE.
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
    ways = "Give the old values, another --output_dir, or --overwrite_output_dir to start again"
    if not grave:
        ways += ", or --allow_changed_settings: only the rounding changes, so the result is not equal to the last bit"
    raise InputError(f"Expected the settings of the interrupted run, found changes in {listed}. {ways}.")


def _check_writable(folder: Path) -> None:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"--output_dir: expected a writable folder, {existing.absolute()} cannot be written. "
            "Change its permissions or give another folder."
        )


def _check_foreign_files(folder: Path, content: list[str]) -> None:
    foreign = [name for name in content if not _is_ours(name)]
    if foreign:
        raise InputError(
            f"--overwrite_output_dir deletes the files of an earlier run, but {folder.absolute()} also holds "
            f"{foreign[0]!r}, which no run wrote; nothing was changed. Move it away or give another --output_dir."
        )


def write_given(files: Mapping[Path, str], *, begun: bool) -> None:
    """Write the rows that a run was given instead of files. Raises InputError if a `begun` run had others."""
    for path, text in files.items():
        if begun and path.exists() and path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"Expected the {path.stem} that the interrupted run was given, which {path.absolute()} holds, found "
                "others. Give the same rows, another output_dir, or overwrite_output_dir=True to start again."
            )
        write_text(path, text)


def clear_output(folder: Path) -> None:
    """Delete the files of an earlier run, and no others."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _is_ours(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    """Whether a run or a command about it writes a file or folder of this name."""
    return name.removesuffix(LOCK) in OURS or is_partial_of(name, OURS)


@contextlib.contextmanager
def locked(accelerator: Accelerator, folder: Path, option: str = "--output_dir") -> Iterator[None]:
    """Lock the folder against other runs. It is created if missing, and removed if nothing was written to it.

    The operating system releases the lock when the process ends. Raises InputError if another run holds it.
    """
    fresh = not folder.exists()
    what = f"{option}: another run is writing into {folder.absolute()}"
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process and fresh:
            stack.callback(_remove_if_empty, folder)
        main_decides(accelerator, lambda: stack.enter_context(held(folder / LOCK, what)))
        yield


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def mark_finished(folder: Path, rounds: int) -> None:
    """Mark the run in the folder as finished."""
    flush(folder / "metrics.jsonl")
    write_json(folder / FINISHED, {"rounds": rounds})
