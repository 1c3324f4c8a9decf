"""Text on the screen: what other people wrote cannot steer a terminal, nor look like a line of ours.

Every line of the package is printed here; texts, titles, names of files and answers come from anywhere. What cannot be
printed ends nothing. Left out: progress bars, whose descriptions are ours, and `--help`.
"""

import contextlib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from cozyrag.errors import InputError

# control characters but for tab and line feed, separators of lines, embeddings, overrides and isolates of direction,
# lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """The text with characters that a terminal would obey as escapes, such as \\x1b; line feeds and tabs stay."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: object) -> str:
    """A name or a text for a line of ours: `escaped`, its line feeds and tabs too."""
    return escaped(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a text of ours, with line feeds; names and texts of others in it are given through `one_line`."""
    print(escaped(text), file=file, flush=True)


def say_above_bars(text: str, *, file: TextIO | None = None) -> None:
    """`say`, above progress bars."""
    from tqdm.auto import tqdm  # most commands that print have no bar

    tqdm.write(escaped(text), file=file or sys.stdout)


class _Lasting:
    """A standard stream that takes text even if it is closed or its disk is full: then into nothing."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        with self._guarded():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guarded():
            self._stream.flush()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = error
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())  # what is still buffered goes there too
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaped_warnings() -> Iterator[None]:
    """Inside, Python's warnings, which name files and texts, are printed as `escaped`."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda *given: escaped(before(*given))
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, standard output and error that are closed (`| head -1`) or on a full disk end no command."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream or open(os.devnull, "w")) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def check_printed() -> None:
    """Raise InputError if lines could not be printed, for a command whose result they are.

    A reader who closes a pipe wants no more of them, so nothing is missing.
    """
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    if fault and fault.errno != errno.EPIPE:
        raise InputError(f"Lines are missing: standard output cannot be written ({fault.strerror}).")


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Suppress what these loggers of libraries say below an error, where it would mislead."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
