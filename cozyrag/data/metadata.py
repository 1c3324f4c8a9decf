"""The columns of a file of passages beside id, title and text, such as url or page: one column of JSON.

Answers show them with their sources, and nothing else reads them. Left out: reading files (passages.py).
"""

import json
import math
from datetime import date
from typing import TYPE_CHECKING, Any

from cozyrag.data.layouts import present
from cozyrag.data.rows import SHOWN, BadRows, Columns, Row, printable, quoted

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = "metadata"  # the column of the other columns, only in a table that has some
LONGEST_METADATA = 1000  # characters of a value: longer ones are texts, which would fill the memory unread


def with_metadata(table: "Dataset", metadata: list[str]) -> "Dataset":
    """The table with its metadata column, a JSON object or "" for each row."""
    from datasets import Value  # imported here: the benchmarks of speed run without datasets

    return table.add_column(METADATA, metadata, feature=Value("string"))


class OtherColumns:
    """The columns beside id, title and text, as JSON; notes which of them cannot be kept.

    Kept are texts of up to `LONGEST_METADATA` characters, numbers, true and false, dates, and such values of an object
    called "metadata", as in a passages.parquet of an index. Empty values are left out.
    """

    def __init__(self, columns: Columns):
        self._columns = columns
        self._left_out: dict[str, None] = {}

    def of(self, row: Row) -> str:
        """The other columns of a row as a JSON object; "" if it has none."""
        own = present(tuple(row.values), self._columns)
        others = {name: value for name, value in row.values.items() if name not in (own.id, own.title, own.text)}
        nested = others.get(METADATA)
        if isinstance(nested, str) and nested.startswith("{"):
            nested = metadata_in(nested)
        if isinstance(nested, dict):
            others |= {METADATA: None} | nested
        kept = {printable(str(name)): self._kept(str(name), value) for name, value in others.items()}
        kept = {name: value for name, value in kept.items() if value is not None}
        return json.dumps(kept, ensure_ascii=False) if kept else ""

    def _kept(self, name: str, value: Any) -> str | int | float | bool | None:
        """The value, None for one that is empty or cannot be kept."""
        if isinstance(value, date):
            return value.isoformat()
        if isinstance(value, str) and len(value) <= LONGEST_METADATA:
            return printable(value.strip()) or None
        if isinstance(value, bool | int) or value is None:
            return value
        if isinstance(value, float):
            return (int(value) if value.is_integer() else value) if math.isfinite(value) else None
        self._left_out[name] = None
        return None

    def report(self, bad: BadRows, source: str) -> None:
        """Add a note that names the columns of which values were left out."""
        if self._left_out:
            names = quoted(list(self._left_out)[:SHOWN])
            bad.note(
                f"{source}: some values of {names} are lists, or longer than {LONGEST_METADATA:,} characters; they are "
                "not kept with the passages."
            )


def metadata_in(text: str) -> dict[str, str | int | float | bool]:
    """What `OtherColumns.of` wrote; empty for anything else, which no version of this package has written."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float | bool)}
