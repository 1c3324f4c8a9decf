"""Rows of a table, the names of its columns, and the rows that cannot be used.

Left out: files and their formats (readers.py), which columns a question or a passage needs (questions.py, passages.py).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cozyrag.errors import InputError
from cozyrag.runtime.terminal import one_line

SHOWN = 10  # bad rows named in a message
LONGEST = 60  # characters of a column name in a message


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns of question files and passage files."""

    question: str = "question"
    answer: str = "answers"
    context: str = "context"
    title: str = "title"
    id: str = "id"
    passage_id: str = "passage_id"
    text: str = "text"


COLUMNS = Columns()


class BadValue(ValueError):
    """Why a row cannot be used, without its place; the readers turn it into an entry of `BadRows`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: `where` is its place for messages ("FILE, line 12"), `values` maps column to cell.

    written: whether all cells are text, as in CSV, so that lists in them are written out.
    """

    where: str
    values: dict[str, Any]
    written: bool = False


@dataclass
class BadRows:
    """Collects the rows that cannot be used, so that a user sees all faults of a file at once.

    All are counted, but only the first `SHOWN` messages are kept: a wrong file may hold millions.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Record what a user should know although no row is bad, such as a guessed encoding."""
        self.notes.append(one_line(text))

    def add(self, where: str, why: str) -> None:
        """Record that the row at `where` cannot be used because of `why`."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(one_line(f"{where}: {why}"))

    def finish(self, what: str, skip: bool) -> str | None:
        """Report the notes, each once, and the bad rows of `what`; None if there are none.

        Raises InputError with the count, the first bad rows and the remedy if there are bad rows and `skip` is false.
        """
        what = one_line(what)
        notes = list(dict.fromkeys(self.notes))
        notes[SHOWN:] = [f"... and {len(notes) - SHOWN:,} more notes"] if len(notes) > SHOWN else []
        if not self.count:
            return "\n".join(notes) or None
        rows = "row" if self.count == 1 else "rows"
        listed = "; ".join(self.first) + ("; ..." if self.count > len(self.first) else "")
        if not skip:
            raise InputError(
                f"{what}: {self.count} {rows} cannot be used: {listed}. "
                "Nothing was done with this source: fix them or pass --skip_bad_rows."
            )
        return "\n".join([*notes, f"{what}: {self.count} {rows} skipped: {listed}"])


def printable(text: str) -> str:
    """The text with lone surrogates, which cannot be printed, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def text_of(value: object, name: str) -> str:
    """The text of a cell: strings unchanged, numbers as digits, None and NaN as "".

    pandas writes whole numbers as 2.0, and missing ones as NaN. Raises BadValue with the column `name` for any other
    type and for text with lone surrogates.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != math.inf:
        return str(value)
    if not isinstance(value, str):
        raise BadValue(f"{name} is a {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadValue(f"{name} holds half a surrogate pair at character {error.start + 1}") from error
    return value


def line_of(values: Mapping[str, Any], column: str) -> str:
    """The text of a cell on one line, with single spaces; "" for a missing column. Raises BadValue as `text_of`."""
    return " ".join(text_of(values.get(column), column).split())


def require_column(source: str, found: Collection[str], column: str, name: str) -> None:
    """Raise InputError with the columns found if there were rows, but none with `column`, the column of `name`."""
    if found and column not in found:
        raise InputError(
            f'{source}: expected a column "{column}", found {quoted(found)}; nothing was done with this source. '
            f"Give the right column with --columns {name}=COLUMN."
        )


def no_rows(source: str, what: str) -> InputError:
    """The InputError for a source without any usable row; `what` is what a usable row needs."""
    return InputError(f"{source}: expected at least one row with {what}, found none. Check the file, or name another.")


def quoted(names: Collection[str]) -> str:
    """The names in quotes, separated by commas; texts, which stand for names in files without header, are cut."""
    return ", ".join(f'"{name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."}"' for name in names)
