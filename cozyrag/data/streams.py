"""Bytes and lines of a file that may be packed: what is read is counted, and every fault names its line.

Left out: what the lines mean (readers.py, documents.py), writing (atomic_files.py), archives other than gzip and bzip2, and encodings
other than UTF-8.
"""

import bz2
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from cozyrag.errors import InputError

PACKED = (".gz", ".bz2")


def empty_source(source: str) -> InputError:
    """The InputError for a file without anything in it."""
    return InputError(f"{source}: expected rows, but the file is empty. Check the step that wrote it, or name another.")


@dataclass(frozen=True, slots=True)
class Reading:
    """A file that is read: `source` is its name as the user gave it, `told` receives the bytes taken from the disk."""

    source: str
    path: str
    told: Callable[[int], None] | None = None


class _Counted(io.FileIO):
    """A file that tells how many bytes of it have been read, below any unpacking."""

    def __init__(self, path: str, told: Callable[[int], None]):
        super().__init__(path)
        self._formatted = told

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        self._formatted(count or 0)
        return count


@contextmanager
def open_file(reading: Reading) -> Iterator[BinaryIO]:
    """The bytes of the file, unpacked. Raises InputError if it may not be read or is broken."""
    source, packing = reading.source, os.path.splitext(reading.path.lower())[1]
    try:
        with (
            io.BufferedReader(_Counted(reading.path, reading.told or (lambda count: None))) as raw,
            gzip.open(raw) if packing == ".gz" else bz2.open(raw) if packing == ".bz2" else raw as file,
        ):
            yield file
    except PermissionError as problem:
        raise InputError(f"{source}: the file may not be read by this user. Change its permissions.") from problem
    except (EOFError, zlib.error, OSError) as problem:  # BadGzipFile and what bz2 raises are OSErrors
        if packing not in PACKED:
            raise
        name = "gzip" if packing == ".gz" else "bzip2"
        raise InputError(
            f"{source}: expected a complete {name} file, found a broken one ({problem}). "
            f"Copy or download it again, or drop the {packing} if it is not compressed."
        ) from problem


def read_lines(file: Reading) -> Iterator[str]:
    """The lines of a text file with their ends; only newlines part lines, so numbers agree with an editor's.

    Raises InputError for a file that is blank, not UTF-8, holds NUL bytes or is broken.
    """
    source, blank = file.source, True
    with open_file(file) as opened:
        for number, raw in enumerate(opened, start=1):
            line = _decoded(f"{source}, line {number}", raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            blank = blank and not line.strip()
            yield line
    if blank:
        raise empty_source(source)


def _decoded(where: str, raw: bytes) -> str:
    found = None
    if b"\0" in raw:
        found = f"a NUL byte (byte {raw.index(0) + 1} of the line)"
    else:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            found = f"byte 0x{raw[problem.start]:02x} (byte {problem.start + 1} of the line)"
    raise InputError(
        f"{where}: expected UTF-8 text, found {found}; the file cannot be read past it. "
        "Save it again as UTF-8, e.g. with iconv -f LATIN1 -t UTF-8."
    )
