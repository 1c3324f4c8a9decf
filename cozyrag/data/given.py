"""Questions and passages given in Python, as a Dataset or a list of dictionaries, written as the JSON lines of a file.

So they go the way of every other file: the same columns, layouts, checks and messages. Left out: reading them
(readers.py), and where the file lies.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cozyrag.errors import InputError
from cozyrag.runtime.json_lines import json_line


def sources_given(what: str, given: Any) -> list[str] | None:
    """The paths or Hub names that were given, None if rows were given instead of them.

    Args:
        what: name of the argument, for messages.

    Raises:
        InputError: it is neither.
    """
    if isinstance(given, str | os.PathLike):
        return [_path(what, given)]
    if _is_table(given):
        return None
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise _foreign(what, given)
    if not given:
        raise InputError(f"{what}: expected at least one row or path, found an empty {type(given).__name__}.")
    if all(isinstance(each, str | os.PathLike) for each in given):
        return [_path(what, each) for each in given]
    return None


def lines_of(what: str, rows: Any) -> str:
    """A Dataset or a list of dictionaries as JSON lines: line n is row n.

    Arrays become lists; dates and other values without a form in JSON become their text. Raises InputError for a row
    that is no dictionary.
    """
    lines = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{what}, row {number}: expected a dictionary such as {{'question': ..., 'answer': ...}}, found "
                f"{row!r:.80}. Give rows of one kind, or paths only."
            )
        try:
            lines.append(json_line(dict(row), default=_plain, ensure_ascii=True))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{what}, row {number}: expected texts, numbers and lists of them, found what JSON cannot hold "
                f"({error}). Remove that column, or turn it into text."
            ) from error
    return "".join(lines)


def _is_table(given: Any) -> bool:
    """Whether this is a Dataset, without importing the library that someone who has one has imported."""
    return type(given).__name__ == "Dataset" and type(given).__module__.startswith("datasets.")


def _path(what: str, given: str | os.PathLike) -> str:
    path = os.fspath(given)
    if not isinstance(path, str) or not path.strip():
        raise InputError(f"{what}: expected a path or a Hub name, found {given!r}.")
    return path


def _foreign(what: str, given: Any) -> InputError:
    kind = type(given).__name__
    remedy = {
        "DatasetDict": f"Choose a split, such as {what}[{'train'!r}]",
        "IterableDataset": "Load it without streaming=True",
        "DataFrame": "Give Dataset.from_pandas(frame), or frame.to_dict('records')",
        "dict": "Put the rows into a list",
    }.get(kind, "Give one of these")
    return InputError(
        f"{what}: expected a path, a list of paths, a list of dictionaries or a datasets.Dataset, found "
        f"{'None' if given is None else f'a {kind}'}. {remedy}."
    )


def _plain(value: Any) -> Any:
    """A value that JSON has no form for: arrays and numbers of NumPy as lists and numbers, others as their text."""
    listed = getattr(value, "tolist", None)
    return listed() if callable(listed) else str(value)
