"""Bytes and lines of a file that may be compressed: bytes read are counted, and every error names its line.

Text is UTF-8, or UTF-16 and UTF-32 by their marks or NUL bytes. Other encodings are found by a detector, which a note
to the user tells. Left out: what the lines mean (readers.py, documents.py), writing (atomic_files.py), archives other
than gzip and bzip2, web pages, which name their encoding (documents.py).
"""

import bz2
import codecs
import gzip
import io
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any, AnyStr

from cozyrag.errors import InputError

PACKED = (".gz", ".bz2")
Progress = Callable[[int], None]  # called with the number of bytes just read from disk
Note = Callable[[str], None]  # called with what a user should know about a file that is read
Refuse = Callable[[str, str], None]  # called with the place of a row that cannot be used, and why
LONGEST_ROW = 20_000_000  # bytes of a line, characters of a row: the Bible has 4,300,000
TOO_LONG = (
    f"expected at most {LONGEST_ROW:,} characters in one row, found more; write them as several rows or documents"
)
SAMPLE = 65_536  # bytes that a detector sees
LINES_BEFORE = 8  # a single odd character means more beside the language of its neighbours
_PRINTABLE = bytes(range(0x20, 0x7F)) + rb" \u0041 +AEE- \x41"
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# Encodings that decode the same characters and more (encoding.spec.whatwg.org).
_SUPERSET = {
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "euc_kr": "cp949",
}


def empty_source(source: str) -> InputError:
    """The InputError for an empty file."""
    return InputError(f"{source}: expected rows, but the file is empty. Check the step that wrote it, or name another.")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read: `source` is its name as the user gave it, `progress` is called with the bytes read from disk,
    `note` with what a user should know.

    refuse: for a file with a row in each line, called for a line longer than LONGEST_ROW, which is read as a blank one;
    None: lines may have any length.
    """

    source: str
    path: str
    progress: Progress | None = None
    note: Note | None = None
    refuse: Refuse | None = None


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
    """The lines of a text file as `text_lines`. Raises InputError for a blank file as well."""
    blank = True

    def refuse(where: str, why: str) -> None:
        nonlocal blank
        blank = False
        if file.refuse is not None:
            file.refuse(where, why)

    for line in text_lines(replace(file, refuse=file.refuse and refuse)):
        blank = blank and not line.strip()
        yield line
    if blank:
        raise empty_source(file.source)


def text_lines(file: InputFile) -> Iterator[str]:
    """The lines of a text file with their ends; only newlines separate lines, so numbers agree with an editor's.

    Raises InputError for a file of mixed or unknown encoding, with NUL bytes, or broken.
    """
    with open_file(file) as opened:
        wide = _wide_encoding(file, opened)
        for number, line in enumerate(_wide_lines(file, opened, wide) if wide else _lines(file, opened), start=1):
            if "\0" in line:
                byte = len(line.partition("\0")[0].encode("utf-8")) + 1
                raise _unreadable(f"{file.source}, line {number}", "UTF-8", f"a NUL byte (byte {byte} of the line)")
            yield line


def _wide_encoding(file: InputFile, opened: Any) -> str | None:
    """UTF-16 or UTF-32 if a byte order mark or NUL bytes show it."""
    start = opened.peek(SAMPLE)[:SAMPLE]
    if marked := _marked_encoding(start):
        return marked
    found = detect_encoding(start) if b"\0" in start else None
    if found is None or not found.startswith(("utf-16", "utf-32")):
        return None
    _tell(file, found)
    return found


def _marked_encoding(start: bytes) -> str | None:
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)


def detect_encoding(sample: bytes) -> str | None:
    """The Python name of the encoding of a text; None if it does not look like text, or like damaged UTF-8."""
    import chardet  # imported here: most files need none
    from chardet import EncodingEra

    text = sample.decode("utf-8", "replace")
    whole, broken = len(re.findall(r"[^\x00-\x7f\ufffd]", text)), text.count("\ufffd")
    if whole and whole >= broken:
        return None
    eras = EncodingEra.MODERN_WEB | EncodingEra.LEGACY_ISO | EncodingEra.DOS  # files of Macs before 2001 are rare
    found = chardet.detect(sample, encoding_era=eras)["encoding"]
    name = codecs.lookup(found).name if found else None
    return _SUPERSET.get(name, name) if name else None


def detected_encoding(file: InputFile, raw: bytes) -> str:
    """The encoding of a whole text without a label: by its mark, UTF-8, or a guess that is noted."""
    if marked := _marked_encoding(raw):
        return marked
    try:
        raw.decode("utf-8")
        if b"\0" not in raw:
            return "utf-8"
        start = 0
    except UnicodeDecodeError as error:
        start = error.start
    found = detect_encoding(raw[max(start - SAMPLE // 2, 0) :][:SAMPLE])
    if found is None:
        return "utf-8"
    _tell(file, found)
    return found


def keeps_ascii(encoding: str) -> bool:
    """Whether this is an encoding in which ASCII text stays as it is, as labels of web pages must be."""
    try:
        return _PRINTABLE.decode(encoding) == _PRINTABLE.decode("ascii")
    except (LookupError, UnicodeError):
        return False


def _tell(file: InputFile, encoding: str) -> None:
    if file.note is not None:
        file.note(f"{file.source}: read as {encoding} (not UTF-8); save it as UTF-8 if characters look wrong")


def _wide_lines(file: InputFile, opened: Any, encoding: str) -> Iterator[str]:
    """Lines of UTF-16 or UTF-32, whose newlines are no single bytes."""
    number = 0
    try:
        text = io.TextIOWrapper(opened, encoding, newline="\n")
        for number, line in enumerate(_in_bounds(file, text, "\n"), start=1):  # noqa: B007
            yield line
    except UnicodeError as error:
        raise _unreadable(f"{file.source}, after line {number}", encoding, error) from error


def _in_bounds(file: InputFile, opened: Any, newline: AnyStr) -> Iterator[AnyStr]:
    """The lines, a blank one in place of each that is refused: no more of it than a row may have is in memory."""
    if file.refuse is None:
        yield from opened
        return
    for number in count(1):
        line = opened.readline(LONGEST_ROW + 1)
        if not line:
            return
        if len(line) > LONGEST_ROW:
            while line and not line.endswith(newline):
                line = opened.readline(SAMPLE)
            file.refuse(f"{file.source}, line {number}", TOO_LONG)
            line = newline
        yield line


def _lines(file: InputFile, opened: io.BufferedIOBase) -> Iterator[str]:
    """Lines of UTF-8; from the first that is not, if all before it are ASCII, those of the detected encoding."""
    ascii_only, before = True, deque[bytes](maxlen=LINES_BEFORE)
    lines = enumerate(_in_bounds(file, opened, b"\n"), start=1)
    for number, raw in lines:
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            if not ascii_only:
                raise _unreadable(f"{file.source}, line {number}", "UTF-8", _odd_byte(error)) from error
            yield from _detected_lines(file, b"".join(before), error, chain([(number, raw)], lines))
            return
        ascii_only = ascii_only and line.isascii()
        before.append(raw)
        yield line


def _detected_lines(
    file: InputFile, before: bytes, fault: UnicodeDecodeError, lines: Iterator[tuple[int, bytes]]
) -> Iterator[str]:
    """Lines of an encoding detected from the first of them, which has the `fault`, and from the ASCII `before`."""
    ahead, size = [next(lines)], 0
    while size < SAMPLE and (more := next(lines, None)):
        ahead.append(more)
        size += len(more[1])
    start = max(fault.start - SAMPLE // 2, 0)
    encoding = detect_encoding(before[-SAMPLE:] + b"".join(raw for _, raw in ahead)[start : start + SAMPLE])
    if encoding is None:
        raise _unreadable(f"{file.source}, line {ahead[0][0]}", "UTF-8", _odd_byte(fault)) from fault
    _tell(file, encoding)
    for number, raw in chain(ahead, lines):
        try:
            yield raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise _unreadable(f"{file.source}, line {number}", encoding, _odd_byte(error)) from error


def _odd_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} (byte {error.start + 1} of the line)"


def _unreadable(where: str, encoding: str, found: object) -> InputError:
    return InputError(
        f"{where}: expected {encoding} text, found {found}; the file cannot be read past it. "
        "Correct it there, or save the file as UTF-8 with the program that wrote it."
    )
