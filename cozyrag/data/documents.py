"""Whatever a person has, as a stream of articles: files, folders, WikiExtractor output, tables, Hub datasets.

It exists so that the cutting (ingest_worker.py) sees one shape. Formats are told by the name of a file, or by its first bytes where
the name says nothing (`wiki_00`). Left out: what the formats of single documents mean (parsers.py), tables (readers.py).
"""

import html
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cozyrag.data.parsers import Article, html_article, markdown_article, pdf_article, plain_article
from cozyrag.data.readers import is_hub_id, kind_of, read_rows
from cozyrag.data.rows import BadRows, BadValue, text_of
from cozyrag.data.streams import PACKED, Reading, read_lines
from cozyrag.errors import InputError

WIKIEXTRACTOR, HUB = "wikiextractor", "hub"
DOCUMENTS = {"text": (".txt", ".text"), "markdown": (".md", ".markdown", ".mdx"), "html": (".html", ".htm", ".xhtml"), "pdf": (".pdf",)}  # fmt: skip
TABLES = {"jsonl": (".jsonl", ".ndjson"), "json": (".json",), "csv": (".csv",), "tsv": (".tsv",), "parquet": (".parquet",)}  # fmt: skip
FORMATS = (*DOCUMENTS, *TABLES, WIKIEXTRACTOR, HUB)
_FORMAT_OF = {extension: name for group in (DOCUMENTS, TABLES) for name, all_ in group.items() for extension in all_}


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or one Hub dataset, and its format; `size` and `changed` are those of the file, 0 for the Hub."""

    name: str
    format: str
    size: int = 0
    changed: int = 0

    @property
    def is_document(self) -> bool:
        """Whether the file is one article, not a container of many."""
        return self.format in DOCUMENTS


# ------------------------------------------------------------------------------------------------------------ finding


def find_sources(inputs: Sequence[str], *, format: str | None, ignore: Sequence[str] = ()) -> tuple[list[Source], list[str]]:  # fmt: skip
    """The files behind what the user named, folders walked in the order of names, and the files in them of unknown format.

    Args:
        format: one of FORMATS for all of them; None tells it from each file.
        ignore: paths that are no input even where a folder holds them, such as the output.

    Raises InputError for a name that is nothing, a file of unknown format, or a folder without any known one.
    """
    sources, unknown = [], []
    skipped = {os.path.abspath(path) for path in ignore}
    for name in inputs:
        path = os.path.expanduser(name)
        if format == HUB or (format is None and is_hub_id(name)):
            sources.append(Source(name, HUB))
        elif os.path.isdir(path):
            files = [file for file in _walk(path) if os.path.abspath(file) not in skipped]
            told = [(file, format or _format_of(file)) for file in files]
            unknown += [file for file, kind in told if kind is None]
            sources += (found := [_source(file, kind) for file, kind in told if kind])
            if not found:
                raise InputError(
                    f"{name}: expected files to read in this folder, found {len(files)} files and none of a known format "
                    f"({_known()}). Name another folder, or say with --format what they are."
                )
        else:
            sources.append(_named(name, path, format))
    return sources, unknown


def _named(name: str, path: str, format: str | None) -> Source:
    if not os.path.exists(path):
        raise InputError(
            f"Expected a file, a folder or a Hub dataset, found nothing at {os.path.abspath(path)}. Check the path and the working folder."
        )
    kind = format or _format_of(path)
    if kind is None:
        raise InputError(
            f"{name}: its name and its first bytes do not tell the format, so it was not read. Known: {_known()}; "
            "rename it, or say with --format what it is."
        )
    return _source(name, kind)


def _source(name: str, kind: str) -> Source:
    facts = os.stat(os.path.expanduser(name))
    return Source(name, kind, facts.st_size, facts.st_mtime_ns)


def _walk(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (os.path.join(place, each) for each in sorted(files) if not each.startswith("."))


def _format_of(path: str) -> str | None:
    known = _FORMAT_OF.get(kind_of(path))
    if known in DOCUMENTS and path.lower().endswith(PACKED):
        return None
    if known and known != "text":
        return known
    try:
        first = next(iter(read_lines(Reading(path, path)))).lstrip()
    except InputError:  # no text, or none at all
        return known
    return WIKIEXTRACTOR if first.startswith("<doc ") else "jsonl" if first.startswith("{") and not known else known


def _known() -> str:
    return " ".join(_FORMAT_OF) + ", WikiExtractor files"


# ------------------------------------------------------------------------------------------------------------ reading


def read_document(source: Source) -> Article:
    """The article that a single file is. Raises InputError naming the file and the line that cannot be read."""
    path = os.path.expanduser(source.name)
    if source.format == "pdf":
        return pdf_article(path, source.name)
    read = {"text": plain_article, "markdown": markdown_article, "html": html_article}[source.format]
    return read(_html_text(source.name, path) if source.format == "html" else _text(source.name, path), source.name)


def _text(name: str, path: str) -> str:
    with open(path, "rb") as file:
        if not file.read(1_000_000).strip():  # an empty note is no fault
            return ""
    return "".join(read_lines(Reading(name, path))).replace("\r\n", "\n")


def _html_text(name: str, path: str) -> str:
    """Web pages may name an encoding of their own."""
    with open(path, "rb") as file:
        raw = file.read()
    named = re.search(rb"<meta[^>]+charset=[\"']?([\w-]+)", raw[:4096], re.I)
    encoding = named[1].decode("ascii") if named else "utf-8"
    try:
        text = raw.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n")
        text.encode("utf-8")  # some encodings give halves of surrogate pairs, which nothing later can write
        return text
    except (UnicodeError, LookupError) as problem:
        raise InputError(
            f"{name}: expected a page in {encoding}, found something else ({problem}). Save it again as UTF-8."
        ) from problem


def read_container(
    source: Source,
    *,
    split: str = "train",
    title_column: str = "title",
    text_column: str = "text",
    bad: BadRows,
    told: Callable[[int], None] | None = None,
) -> Iterator[Article]:
    """The articles of a file or Hub dataset that holds many, one at a time; rows that are none go to `bad`.

    A first line that repeats the title (as WikiExtractor writes it) is left out.

    Raises InputError for what cannot be read at all, and where no row has the text column.
    """
    if source.format == WIKIEXTRACTOR:
        yield from _extracted(source, bad, told)
        return
    columns, kind = set(), None if source.format == HUB else TABLES[source.format][0]
    named = (title_column, text_column)
    rows = read_rows(source.name, split=split, known=named, bad=bad, kind=kind, streaming=source.format == HUB, told=told)  # fmt: skip
    for row in rows:
        columns |= row.values.keys()
        try:
            title, text = (text_of(row.values.get(column), column) for column in named)
        except BadValue as problem:
            bad.add(row.where, str(problem))
            continue
        if text_column not in row.values:
            bad.add(
                row.where, f'no column "{text_column}" (found: {", ".join(row.values)}); --text_column names another'
            )
        else:
            yield _article(row.where, " ".join(title.split()), text)


def _article(where: str, title: str, text: str) -> Article:
    first, _, rest = text.lstrip().partition("\n")
    return Article(where, title, [((), rest if title and first.strip() == title else text)])


def _extracted(source: Source, bad: BadRows, told: Callable[[int], None] | None) -> Iterator[Article]:
    """Articles between <doc id= url= title=> and </doc> (github.com/attardi/wikiextractor)."""
    head, where, lines = None, "", []
    for number, line in enumerate(read_lines(Reading(source.name, os.path.expanduser(source.name), told)), start=1):
        place = f"{source.name}, line {number}"
        if (opened := _opened_title(line)) is not None:
            if head is not None:
                bad.add(where, "the article has no </doc> before the next one begins")
            head, where, lines = opened, place, []
        elif head is not None and line.rstrip().endswith("</doc>"):
            lines.append(line.rstrip().removesuffix("</doc>"))
            yield _article(where, html.unescape(head), html.unescape("".join(lines)))
            head = None
        elif head is not None:
            lines.append(line)
        elif line.strip():
            bad.add(place, "text outside of <doc> ... </doc>")
    if head is not None:
        bad.add(where, "the article has no </doc> before the end of the file")


def _opened_title(line: str) -> str | None:
    """The title in a line `<doc ... title="...">`, None in any other; no regex, which takes ages on a long broken line."""
    _, found, rest = line.rstrip().partition('title="')
    return rest[:-2] if found and line.startswith("<doc ") and rest.endswith('">') else None
