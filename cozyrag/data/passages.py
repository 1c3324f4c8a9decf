"""Read passages, the texts that are searched, into one table.

The table is a `datasets.Dataset` with the string columns id, title and text; ids are unique. Texts are kept exactly as
they are. Other columns, such as url or page, become one column, metadata: JSON that answers show with their sources,
and nothing else reads. Left out: splitting long articles into passages, removing markup, near-duplicates.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from cozyrag.data import beir
from cozyrag.data.layouts import known_names, present
from cozyrag.data.metadata import OtherColumns, with_metadata
from cozyrag.data.readers import Sources, described, read_rows, sources_of
from cozyrag.data.rows import (
    COLUMNS,
    BadRows,
    BadValue,
    Columns,
    Row,
    line_of,
    no_rows,
    require_column,
    text_of,
)
from cozyrag.data.streams import Progress
from cozyrag.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, Features


def features() -> "Features":
    """The columns of a table of passages."""
    from datasets import Features, Value  # here: it takes a second, which commands that only stream do not need

    return Features({"id": Value("string"), "title": Value("string"), "text": Value("string")})


def passage_id(text: str) -> str:
    """The id of a passage that has none in its file: the first 16 hex digits of the SHA-1 of its UTF-8 text."""
    return hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()[:16]


def read_passages(
    source: Sources,
    *,
    split: str = "train",
    columns: Columns = COLUMNS,
    skip_bad_rows: bool = False,
    delimiter: str | None = None,
) -> tuple["Dataset", str | None]:
    """Read passages from one or several files, folders or Hub datasets (see `read_rows`, `sources_of`).

    A table with tabs and without header is text, title and text, or id and text if all first cells are digits. Returns
    the table (id, title, text; one row per passage, in the order of the sources) and the report of skipped rows and
    notes, None if there are none. A missing id becomes `passage_id(text)`, a missing title "". A row is bad without
    text, with cells that are not text, or if it repeats the id and text of an earlier row.

    Raises InputError as `read_rows`, without text column, for two texts under one id, without any usable row, and for
    bad rows unless `skip_bad_rows`.
    """
    bad, others = BadRows(), OtherColumns(columns)
    kept: dict[str, tuple[str, str, str, str]] = {}
    for row, key, title, text in stream_passages(source, split=split, columns=columns, delimiter=delimiter, bad=bad):
        passage = (title, text, others.of(row), row.where)
        _, first_text, _, first_where = first = kept.setdefault(key, passage)
        if first_text != text:
            raise InputError(
                f'{row.where}: expected a new id, found "{key}", which {first_where} gave to another text, so '
                "answers could not be traced to a passage. Correct the ids, or leave that column out to generate them."
            )
        if first is not passage:
            bad.add(row.where, f"repeats {first_where}")
    others.report(bad, described(source))
    report = bad.finish(described(source), skip_bad_rows)
    if not kept:
        raise no_rows(described(source), "text")
    table = _table((key, title, text) for key, (title, text, _, _) in kept.items())
    metadata = [extra for _, _, extra, _ in kept.values()]
    return with_metadata(table, metadata) if any(metadata) else table, report


def stream_passages(
    source: Sources,
    *,
    split: str,
    columns: Columns,
    bad: BadRows,
    delimiter: str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Row, str, str, str]]:
    """Rows with the id, title and text of their passages, one at a time; nothing is kept, and ids may repeat.

    For corpora larger than memory; see `read_passages` for the rules of a row, `read_rows` for `progress`.
    """

    def names(records: Sequence[Sequence[str]]) -> Sequence[str]:
        ids = all(cells[0].strip().isdigit() for cells in records)
        return {1: (columns.text,), 2: (columns.id if ids else columns.title, columns.text)}.get(len(records[0]), ())

    known = known_names(columns)
    for each in sources_of(source):
        found: dict[str, None] = {}
        rows = read_rows(
            beir.part_of(each, "corpus") or each,
            split=split,
            known=known,
            headerless=names,
            delimiter=delimiter,
            bad=bad,
            streaming=progress is not None,
            progress=progress,
        )
        for row in rows:
            own = present(tuple(row.values), columns)
            found.update(dict.fromkeys([*row.values, *([columns.text] if own.text in row.values else [])]))
            try:
                yield row, *_parsed(row, own)
            except BadValue as error:
                bad.add(row.where, str(error))
        require_column(each, found, columns.text, "text")


def _parsed(row: Row, columns: Columns) -> tuple[str, str, str]:
    """Id, title and text of a row; the text is unchanged, so that its id equals that of the same context."""
    values = row.values
    text = text_of(values.get(columns.text), columns.text)
    if not text.strip():
        raise BadValue("empty text")
    title = line_of(values, columns.title)
    key = text_of(values.get(columns.id), columns.id).strip()
    return key or passage_id(text), title, text


def read_column(table: "Dataset", name: str) -> Iterator[str]:
    """The values of a column, some thousand in memory at a time."""
    for batch in table.select_columns([name]).iter(batch_size=4096):
        yield from batch[name]


def rows_of(values: Iterable[str], wanted: Iterable[str | None]) -> dict[str, int]:
    """The first row of each wanted value among the values, which are read once and not kept."""
    missing, found = set(wanted) - {None}, dict[str, int]()
    for row, value in enumerate(values):
        if value in missing:
            found.setdefault(value, row)
    return found


def passages_from_contexts(rows: Iterable[tuple[str, str]]) -> "Dataset":
    """The passages among (title, context) pairs: one per text with its first title, in first-seen order."""
    titles: dict[str, str] = {}
    for title, context in rows:
        titles.setdefault(context, title)
    return _table((passage_id(text), title, text) for text, title in titles.items())


def merge_passages(tables: Sequence["Dataset"]) -> "Dataset":
    """The union of passage tables, one row per id (the first seen, with its title), in first-seen order.

    Raises InputError if two tables give one id to different texts.
    """
    merged: dict[str, tuple[str, str]] = {}
    for table in tables:
        for key, title, text in zip(table["id"][:], table["title"][:], table["text"][:], strict=True):
            if merged.setdefault(key, (title, text))[1] != text:
                raise InputError(
                    f'Expected one text per passage id, found two under "{key}": "{merged[key][1][:60]}" and '
                    f'"{text[:60]}", so answers could not be traced to a passage. Give one of them another id.'
                )
    return _table((key, title, text) for key, (title, text) in merged.items())


def _table(rows: Iterable[tuple[str, str, str]]) -> "Dataset":
    from datasets import Dataset

    columns: dict[str, list[str]] = {name: [] for name in features()}
    for row in rows:
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Dataset.from_dict(columns, features=features())
