"""Read passages, the texts that are searched, into one table.

It exists so that the rest of the package sees one shape: a `datasets.Dataset` with the string columns id, title, text
and ids that are unique. It leaves out cutting long articles into passages, cleaning of markup, and any near-duplicate
search: texts are kept to the letter, and only equal texts are equal.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from datasets import Dataset, Features, Value

from cozyrag.data.readers import read_rows
from cozyrag.data.rows import BadRows, BadValue, Row, finish_columns, no_rows, text_of
from cozyrag.errors import InputError

FEATURES = Features({"id": Value("string"), "title": Value("string"), "text": Value("string")})


def passage_id(text: str) -> str:
    """The id of a passage that was given none: the first 16 hex digits of the SHA-1 of its UTF-8 text."""
    return hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest()[:16]


def read_passages(
    source: str,
    *,
    split: str = "train",
    id_column: str = "id",
    title_column: str = "title",
    text_column: str = "text",
    skip_bad_rows: bool = False,
) -> tuple[Dataset, str | None]:
    """Read passages from a file or Hub dataset (see `tables.read_rows`; TSV and CSV need a header).

    Returns the table (id, title, text; one row per passage, order of the source) and the report of the rows skipped,
    None without any. A missing id becomes `passage_id(text)`, a missing title "". A row is bad without text, with cells
    that are no text, or if it repeats an earlier row's id and text.

    Raises InputError for whatever `read_rows` raises it, without text column, for two texts under one id, without any
    usable row, and for bad rows unless `skip_bad_rows`.
    """
    bad = BadRows()
    passages = _Unique()
    names = {"id_column": id_column, "title_column": title_column, "text_column": text_column}
    for row, *passage in stream_passages(source, split=split, **names, bad=bad):
        try:
            passages.add(row, *passage)
        except BadValue as problem:
            bad.add(row.where, str(problem))
    report = bad.finish(source, skip_bad_rows)
    if not passages.texts:
        raise no_rows(source, "text")
    return passages.table(), report


def stream_passages(
    source: str,
    *,
    split: str,
    id_column: str,
    title_column: str,
    text_column: str,
    bad: BadRows,
    told: Callable[[int], None] | None = None,
) -> Iterator[tuple[Row, str, str, str]]:
    """Rows with the id, title and text of their passages, one at a time, nothing kept; ids may repeat.

    For corpora that do not fit in memory; `read_passages` says what is made of a row, `read_rows` what `told` is.
    """
    found = {}
    known = (id_column, title_column, text_column)
    for row in read_rows(source, split=split, known=known, bad=bad, streaming=told is not None, told=told):
        found.update(dict.fromkeys(row.values))
        try:
            yield row, *_parsed(row, id_column, title_column, text_column)
        except BadValue as problem:
            bad.add(row.where, str(problem))
    finish_columns(source, found, text_column, "--text_column")


def passages_from_contexts(rows: Iterable[tuple[str, str]]) -> Dataset:
    """The passages among (title, context) pairs: one per text with its first title, in first-seen order."""
    titles: dict[str, str] = {}
    for title, context in rows:
        titles.setdefault(context, title)
    return _table(ids=[passage_id(text) for text in titles], titles=list(titles.values()), texts=list(titles))


def merge_passages(tables: Sequence[Dataset]) -> Dataset:
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
    return _table(list(merged), [title for title, _ in merged.values()], [text for _, text in merged.values()])


class _Unique:
    """Passages in first-seen order and the place of each, to refuse a second text under an id."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.texts: list[str] = []
        self._places: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, row: Row, key: str, title: str, text: str) -> None:
        first = self._index.setdefault(key, len(self.texts))
        if first == len(self.texts):
            self.titles.append(title)
            self.texts.append(text)
            self._places.append(row.where)
        elif self.texts[first] == text:
            raise BadValue(f"repeats {self._places[first]}")
        else:
            raise InputError(
                f'{row.where}: expected a new id, found "{key}", which {self._places[first]} gave to another text, so '
                "answers could not be traced to a passage. Correct the ids, or leave that column out to have them made."
            )

    def table(self) -> Dataset:
        return _table(list(self._index), self.titles, self.texts)


def _parsed(row: Row, id_column: str, title_column: str, text_column: str) -> tuple[str, str, str]:
    """Id, title and text of a row; the text to the letter, so that its id agrees with that of the same context."""
    text = text_of(row.values.get(text_column), text_column)
    if not text.strip():
        raise BadValue("empty text")
    title = " ".join(text_of(row.values.get(title_column), title_column).split())
    key = text_of(row.values.get(id_column), id_column).strip()
    return key or passage_id(text), title, text


def _table(ids: list[str], titles: list[str], texts: list[str]) -> Dataset:
    return Dataset.from_dict({"id": ids, "title": titles, "text": texts}, features=FEATURES)
