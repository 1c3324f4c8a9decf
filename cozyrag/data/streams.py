"""Bytes and lines of a file that may be compressed: bytes read are counted, and every error names its line.

Left out: what the lines mean (readers.py, documents.py), writing (atomic_files.py), archives other than gzip and bzip2,
encodings other than UTF-8.
"""

import bz2
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cozyrag.errors import InputError

PACKED = (".gz", ".bz2")
Progress = Callable[[int], None]  # called with the number of bytes just read from disk


def empty_source(source: str) -> InputError:
    """The InputError for an empty file."""
    return InputError(f"{source}: expected rows, but the file is empty. Check the step that wrote it, or name another.")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read: `source` is its name as the user gave it, `progress` is called with the bytes read from disk."""

    source: str
    path: str
    progress: Progress | None = None


class _CountingFile(io.FileIO):
    """A file that reports the bytes read from disk, before decompression."""

    def __init__(self, file: InputFile):
        super().__init__(file.path)
        self._progress = file.progress

    def readinto(self, buffer) -> int | None:
        count = super().readinto(buffer)
        if self._progress is not None:
            self._progress(count or 0)
        return count


@contextmanager
def open_file(file: InputFile) -> Iterator[io.BufferedIOBase]:
    """The bytes of the file, decompressed. Raises InputError if it is not readable or is broken."""
    extension = os.path.splitext(file.path.lower())[1]
    try:
        with (
            io.BufferedReader(_CountingFile(file)) as raw,
            gzip.open(raw) if extension == ".gz" else bz2.open(raw) if extension == ".bz2" else raw as opened,
        ):
            yield opened
    except PermissionError as error:
        raise InputError(
            f"{file.source}: this user has no permission to read the file. Change its permissions."
        ) from error
    except (EOFError, zlib.error, OSError) as error:  # BadGzipFile and the errors of bz2 are OSErrors
        if extension not in PACKED:
            raise
        name = "gzip" if extension == ".gz" else "bzip2"
        raise InputError(
            f"{file.source}: expected a complete {name} file, found a broken one ({error}). "
            f"Copy or download it again, or drop the {extension} if it is not compressed."
        ) from error


def read_lines(file: InputFile) -> Iterator[str]:
    """The lines of a text file with their ends; only newlines separate lines, so numbers agree with an editor's.

    Raises InputError for a file that is blank, not UTF-8, holds NUL bytes or is broken.
    """
    blank = True
    with open_file(file) as opened:
        for number, raw in enumerate(opened, start=1):
            line = _decoded(f"{file.source}, line {number}", raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            blank = blank and not line.strip()
            yield line
    if blank:
        raise empty_source(file.source)


def _decoded(where: str, raw: bytes) -> str:
    try:
        if b"\0" not in raw:
            return raw.decode("utf-8")
        found = f"a NUL byte (byte {raw.index(0) + 1} of the line)"
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} (byte {error.start + 1} of the line)"
    raise InputError(
        f"{where}: expected UTF-8 text, found {found}; the file cannot be read past it. "
        "Save it again as UTF-8, e.g. with iconv -f LATIN1 -t UTF-8."
    )
