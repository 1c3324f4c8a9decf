"""One writer at a time: a lock beside what is written, which the operating system releases when its process ends.

`new_folder` is for commands that write a whole folder at once.

Left out: several processes of one run, of which only the main one holds the lock (training/output_dir.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import replacing, writing

LOCK = ".lock"


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; a missing folder is created for it. Raises InputError if another process holds it.

    `what`: the beginning of the message, which names the option and what the other process writes.
    """
    lock = FileLock(path, blocking=False)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{what}, whose files two would corrupt. Wait until it ends, or give another place."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release, so that no other process can have opened it
        lock.release()


@contextlib.contextmanager
def new_folder(folder: Path, what: str, *, needed: int = 0, kept: bool = True) -> Iterator[Path]:
    """A folder to fill, as of `replacing`, for a command whose FOLDER must be new or empty; locked until it is there.

    Args:
        what: what the folder is for. needed, kept: as of `replacing`.

    Raises:
        InputError: the folder holds something, or another process is writing it.
    """
    with held(folder.with_name(folder.name + LOCK), f"Another process is writing {folder.absolute()}"):
        check_new(folder, what)
        with replacing(folder, needed=needed, kept=kept) as coming:
            yield coming


def check_new(folder: Path, what: str) -> None:
    """Raise InputError if a folder holds something; also to be called before work that takes long."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"Expected a new or empty folder for {what}, found {folder.absolute()} in use; nothing was changed. "
            "Give another name."
        )
