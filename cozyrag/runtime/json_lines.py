"""JSON Lines, read and written in one place: a newline ends a line, and no other character does.

Python's `splitlines` also splits at U+2028, U+0085 and eight more, which passages and answers may contain. Such
characters are written as escapes, so that other programs read the same lines. Left out: tables of users, whose
readers report bad rows (data/readers.py), and atomic writing (atomic_files.py).
"""

import errno
import gzip
import json
from pathlib import Path
from typing import Any, TextIO

from cozyrag.errors import InputError
from cozyrag.runtime.machine_faults import machine_faults_told

# json escapes control characters by itself, but not these three, at which some programs split.
SPLITTING = {number: f"\\u{number:04x}" for number in (0x85, 0x2028, 0x2029)}


def json_line(row: object, **how: Any) -> str:
    """A line of a JSON Lines file, with its newline. how: as for `json.dumps`."""
    return json.dumps(row, **({"ensure_ascii": False} | how)).translate(SPLITTING) + "\n"


def open_for_lines(path: Path, *, packed: bool) -> TextIO:
    """A new file to write lines to, compressed with gzip if `packed`."""
    return gzip.open(path, "wt", 6, "utf-8") if packed else open(path, "w", encoding="utf-8", newline="\n")


def append_json_line(path: Path, row: object) -> None:
    """Add a line to a file in one write at its end, so that lines of several processes do not mix.

    Raises InputError if the machine refuses.
    """
    data = json_line(row).encode("utf-8", "backslashreplace")
    with machine_faults_told(path), open(path, "ab", buffering=0) as file:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, "only a part of a line was written", str(path))


def end_last_line(path: Path) -> None:
    """Add the newline that the last line of a file lacks, as after a power cut, before others append to it."""
    with machine_faults_told(path):
        if path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            with open(path, "ab", buffering=0) as file:
                file.write(b"\n")


AGAIN = "Copy the file again, or delete it and give the command that wrote it again."


def read_json_lines(path: Path, remedy: str = AGAIN) -> list[dict]:
    """The rows of a JSON Lines file that a run or a command wrote. Raises InputError for a line that is none."""
    rows = []
    with machine_faults_told(path):
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines if lines != [b""] else [], 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, number, line, str(error), remedy) from error
        if not isinstance(row, dict):
            raise _unreadable(path, number, line, f"a {type(row).__name__}", remedy)
        rows.append(row)
    return rows


def _unreadable(path: Path, number: int, line: bytes, why: str, remedy: str) -> InputError:
    found = line[:40].decode("utf-8", "replace")
    return InputError(
        f"{path}, line {number}: expected a JSON object as cozyrag writes it, found {found!r} ({why}). {remedy}"
    )
