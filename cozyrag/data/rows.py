"""What a row of any table is, and what becomes of rows that cannot be used: they are counted and told with their places.

Left out: files and their formats (readers.py), which columns a question or a passage needs (questions.py, passages.py).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from cozyrag.errors import InputError

SHOWN = 10  # bad rows named in a message


class BadValue(ValueError):
    """Why one row cannot be used, without its place; the readers turn it into an entry of `BadRows`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: `where` names its place for messages ("FILE, line 12"), `values` maps column to cell."""

    where: str
    values: dict[str, Any]


@dataclass
class BadRows:
    """Collects the rows that cannot be used, so that a user sees all of a file's faults at once.

    Keeps the count of all and the words for the first `SHOWN` only: a wrong file may hold millions.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Note that the row at `where` cannot be used because of `why`."""
        self.count += 1
        if len(self.first) < SHOWN:
            words = f"{where}: {why}"
            self.first.append(words.encode("utf-8", "backslashreplace").decode("utf-8"))  # else it could not be printed

    def finish(self, what: str, skip: bool, log: Callable[[str], None] | None = None) -> str | None:
        """End the reading of `what`: None without bad rows, else a report (also given to `log`) if `skip` is true.

        Raises InputError naming the count, the first bad rows and the remedy if there are bad rows and `skip` is false.
        """
        if not self.count:
            return None
        rows = "row" if self.count == 1 else "rows"
        listed = "; ".join(self.first) + ("; ..." if self.count > len(self.first) else "")
        if not skip:
            raise InputError(
                f"{what}: {self.count} {rows} cannot be used: {listed}. "
                "Nothing was done with this source: fix them or pass --skip_bad_rows."
            )
        report = f"{what}: {self.count} {rows} skipped: {listed}"
        if log is not None:
            log(report)
        return report


def text_of(value: object, name: str) -> str:
    """The text of a cell: strings as they are, whole numbers in digits, None as "".

    Raises BadValue naming the column `name` for any other type and for text that is not Unicode (lone surrogates).
    """
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadValue(f"{name} is a {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise BadValue(f"{name} holds half a surrogate pair at character {problem.start + 1}") from problem
    return value


def finish_columns(source: str, found: Collection[str], column: str, flag: str) -> None:
    """Raise InputError naming the columns found and the flag to use if rows were found but none with `column`."""
    if found and column not in found:
        raise InputError(
            f'{source}: expected a column "{column}", found {quoted(found)}; nothing was done with this source. '
            f"Name the right column with {flag}."
        )


def no_rows(source: str, what: str) -> InputError:
    """The InputError for a source that leaves no row to work with; `what` says what a usable row needs."""
    return InputError(f"{source}: expected at least one row with {what}, found none. Check the file, or name another.")


def quoted(names: Collection[str]) -> str:
    """The names in quotes, one after another, for a message."""
    return ", ".join(f'"{name}"' for name in names)
