"""One writer at a time: a lock beside what is written, which the operating system releases when its process ends.

Left out: several processes of one run, of which only the main one holds the lock (training/output_dir.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import writing

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
