"""Faults of the machine, not of a file's content: permission, a full disk, no memory, a broken or read-only device.

Told as what they are, with a remedy: a file that may not be read is not damaged. Left out: the network (hub_retry.py),
and where such a fault has a better sentence of its own, as in atomic_files.py.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cozyrag.errors import InputError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
REMEDIES = {
    **dict.fromkeys(FORBIDDEN, "Change its permissions, or those of its folder, or name another place"),
    **dict.fromkeys(NO_SPACE, "Free some space, or name a place on another disk"),
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "Check the path: a file stands where a folder is expected",
    errno.EISDIR: "Check the path: a folder stands where a file is expected",
    errno.ENAMETOOLONG: "Name a place with a shorter path",
    errno.ELOOP: "Correct the links, which lead in a circle",
    errno.EMFILE: "Close other programs, or raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "Close other programs",
    errno.ENOMEM: "Close other programs",
    errno.EIO: "Check the disk or the network drive",
    errno.ESTALE: "Check the network drive",
}
# Of these no content of a file can be the cause.
ENVIRONMENT = {*FORBIDDEN, *NO_SPACE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}
NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)  # how safetensors and Arrow name it in their text


def fault_sentence(error: BaseException, path: Path | None = None) -> str | None:
    """What the operating system refused, and the remedy; None for any other error.

    `path`: what was read or written, if the error does not know.
    """
    if isinstance(error, MemoryError):
        return (
            f"There is not enough memory{f' for {path}' if path else ''}. Close other programs, or give it less to do."
        )
    code, where = code_of(error), getattr(error, "filename", None) or path
    if code not in REMEDIES or (where is None and code not in ENVIRONMENT):
        return None
    place = f"{where}: " if where is not None else ""
    return f"{place}the operating system refuses to read or write here ({os.strerror(code)}). {REMEDIES[code]}."


def is_environment(error: BaseException) -> bool:
    """Whether an error is of the machine, so that it says nothing about the content of a file."""
    return isinstance(error, MemoryError) or code_of(error) in ENVIRONMENT


@contextlib.contextmanager
def machine_faults_told(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside the context into an InputError; other errors stay as they are."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if is_environment(error):
            raise InputError(str(fault_sentence(error, path))) from error
        raise


def check_readable(paths: Iterable[Path]) -> None:
    """Raise InputError for the first file that exists and may not be read.

    Some libraries call such a file missing.
    """
    for path in paths:
        with machine_faults_told(path):
            if path.is_file():
                path.open("rb").close()


def code_of(error: BaseException) -> int:
    """The number of the error of the operating system; 0 if it has none."""
    if not isinstance(error, OSError):
        return 0
    found = NUMBER.search(str(error))
    return error.errno or (int(found[1]) if found else 0)
