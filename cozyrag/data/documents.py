"""Files, folders, WikiExtractor output, tables and Hub datasets as a stream of articles, one shape for the cutting.

The format follows from the name of a file, or from its first bytes if the name does not show it (`wiki_00`). Left out:
the formats of single documents (parsers.py, web_pages.py, office.py), tables (readers.py).
"""

import html
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cozyrag.data.office import OFFICE, office_article
from cozyrag.data.outline import Article
from cozyrag.data.parsers import markdown_article, pdf_article, plain_article
from cozyrag.data.readers import is_hub_id, kind_of, read_rows
from cozyrag.data.rows import COLUMNS, BadRows, BadValue, Columns, line_of, printable, text_of
from cozyrag.data.streams import PACKED, InputFile, Note, Progress, read_lines, text_lines
from cozyrag.data.web_pages import html_article, html_text
from cozyrag.errors import InputError
from cozyrag.runtime.terminal import one_line

WIKIEXTRACTOR, HUB = "wikiextractor", "hub"
DOCUMENTS = ("text", "markdown", "html", "pdf", *OFFICE)
FORMATS = (*DOCUMENTS, "jsonl", "json", "csv", "tsv", "parquet", WIKIEXTRACTOR, HUB)
_ALIASES = {"txt": "text", "md": "markdown", "mdx": "markdown", "htm": "html", "xhtml": "html", "ndjson": "jsonl"}
_FORMAT_OF = {f".{name}": _ALIASES.get(name, name) for name in (*_ALIASES, *FORMATS[:-2])}
_KNOWN = " ".join(_FORMAT_OF) + ", WikiExtractor files"

# Ends of lines and sentences in the text of a row. Each takes time and memory, and a quote mark that is never closed
# makes one text of all lines below it.
MOST_SENTENCES = 500_000
_SENTENCE_ENDS = ("\n", ". ", "! ", "? ", "。", "！", "？")


@dataclass(frozen=True, slots=True)
class InputSource:
    """One file, or one Hub dataset, and its format; `size` and `changed` are those of the file, 0 for the Hub."""

    name: str
    format: str
    size: int = 0
    changed: int = 0

    @property
    def is_document(self) -> bool:
        """Whether the file is one article, not a container of many."""
        return self.format in DOCUMENTS


def find_sources(
    inputs: Sequence[str], *, format: str | None, ignore: Sequence[str] = ()
) -> tuple[list[InputSource], list[str]]:
    """The files behind the inputs, folders walked in the order of names, and the files in them that are not read, each
    with the reason.

    Links to folders are followed, each folder once.

    format: one of FORMATS for all inputs; None detects it for each file. ignore: paths in a folder that are not inputs,
    such as the output.

    Raises InputError for a missing input, a file of unknown format, or a folder without any file of a known one.
    """
    sources, unknown = list[InputSource](), list[str]()
    ignored = {os.path.abspath(path) for path in ignore}
    for name in inputs:
        path = os.path.expanduser(name)
        # a name that ends as a document's is a file that is missing, whatever the Hub has
        if format == HUB or (format is None and is_hub_id(name) and kind_of(path) not in _FORMAT_OF):
            sources.append(InputSource(name, HUB))
            continue
        if not os.path.exists(path):
            raise InputError(
                f"Expected a file, a folder or a Hub dataset, found nothing at {os.path.abspath(path)}. Check the path "
                "and the working folder."
            )
        files = [name]
        if os.path.isdir(path):
            files = [file for file in _walk(path) if os.path.abspath(file) not in ignored]
            unknown += [
                one_line(f"{file}: a link to nothing, or no file") for file in files if not os.path.isfile(file)
            ]
            files = [file for file in files if os.path.isfile(file)]
        formats = {file: format or _format_of(os.path.expanduser(file)) for file in files}
        if not any(formats.values()):
            raise InputError(
                f"{name}: expected files of a known format ({_KNOWN}), found {len(files)} whose names and first bytes "
                "show none, so nothing was read. Name another input, or give the format with --format."
            )
        for file, kind in formats.items():
            if kind is None:
                unknown.append(one_line(f"{file}: {_why_unknown(file)}"))
            else:
                status = os.stat(os.path.expanduser(file))
                sources.append(InputSource(file, kind, status.st_size, status.st_mtime_ns))
    return sources, unknown


def _walk(folder: str) -> Iterator[str]:
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (os.path.join(place, each) for each in sorted(files) if not each.startswith("."))


def _format_of(path: str) -> str | None:
    known = _FORMAT_OF.get(kind_of(path))
    if known in DOCUMENTS and path.lower().endswith(PACKED):
        return None
    if known and known != "text":
        return known
    try:
        first = next(iter(read_lines(InputFile(path, path)))).lstrip()
    except (InputError, OSError):  # not text, empty, or not to be opened
        return known
    return WIKIEXTRACTOR if first.startswith("<doc ") else "jsonl" if first.startswith("{") and not known else known


def _why_unknown(path: str) -> str:
    extension = os.path.splitext(path)[1].lower()
    if extension in (".doc", ".ppt"):
        return f"the old {extension} format; save it as {extension}x"
    if extension in PACKED and kind_of(path) in _FORMAT_OF:
        return "a compressed document; unpack it"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    return "empty" if not os.path.getsize(path) else f"unknown format {extension}".strip()


def read_document(source: InputSource, note: Note | None = None) -> Article:
    """The article in a single file; `note` is called with what a user should know about it.

    Raises InputError naming the file and the line that cannot be read.
    """
    article = replace(_read_document(source, note), source=printable(source.name))
    texts = [article.title, *(text for path, body in article.sections for text in (*path, body))]
    lost = sum(len(_SURROGATE.findall(text)) for text in texts if not text.isascii())
    if not lost:
        return article
    if note is not None:
        note(f"{source.name}: {lost:,} half characters (lone surrogates) became \ufffd")
    sections = [(tuple(map(_whole, path)), _whole(text)) for path, text in article.sections]
    return replace(article, title=_whole(article.title), sections=sections)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _whole(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _read_document(source: InputSource, note: Note | None) -> Article:
    path = os.path.expanduser(source.name)
    file = InputFile(source.name, path, note=note)
    if source.format == "pdf":
        return pdf_article(path, source.name)
    if source.format in OFFICE:
        return office_article(file, source.format)
    if source.format == "html":
        return html_article(html_text(file), source.name)
    text = "".join(text_lines(file)).replace("\r\n", "\n")
    return (markdown_article if source.format == "markdown" else plain_article)(text, source.name)


def read_container(
    source: InputSource,
    *,
    split: str = "train",
    columns: Columns = COLUMNS,
    delimiter: str | None = None,
    bad: BadRows,
    progress: Progress | None = None,
) -> Iterator[Article]:
    """The articles of a file or Hub dataset that holds many, one at a time; unusable rows go to `bad`.

    A first line that repeats the title (as in WikiExtractor output) is left out. delimiter: see `read_rows`.

    Raises InputError for a source that cannot be read at all.
    """
    if source.format == WIKIEXTRACTOR:
        yield from _extracted(source, bad, progress)
        return
    hub, name = source.format == HUB, printable(source.name)
    rows = read_rows(
        source.name,
        split=split,
        known=(columns.title, columns.text),
        delimiter=delimiter,
        bad=bad,
        kind=None if hub else f".{source.format}",
        streaming=hub,
        progress=progress,
    )
    for row in rows:
        try:
            title = line_of(row.values, columns.title)
            text = _in_bounds(text_of(row.values.get(columns.text), columns.text))
        except BadValue as error:
            bad.add(row.where, str(error))
            continue
        if columns.text in row.values:
            url = row.values.get("url")
            url = printable(url.strip()) if isinstance(url, str) else ""
            text = _without_residue(html.unescape(text)) if "?curid=" in url else text  # as WikiExtractor --json
            yield _article(row.where, title, text, name, url)
        else:
            found = ", ".join(row.values)
            bad.add(row.where, f'no column "{columns.text}" (found: {found}); give it with --columns text=COLUMN')


def _in_bounds(text: str) -> str:
    """The text. Raises BadValue if it has too many lines and sentences."""
    found = sum(text.count(end) for end in _SENTENCE_ENDS)
    if found > MOST_SENTENCES:
        raise BadValue(
            f"expected at most {MOST_SENTENCES:,} lines and sentences in the text of one row, found {found:,}, so it "
            "is not cut; close the quote mark that swallowed other rows, or write it as several rows or as a .txt file"
        )
    return text


def _article(where: str, title: str, text: str, source: str, url: str) -> Article:
    first, _, rest = text.lstrip().partition("\n")
    return Article(where, title, [((), rest if title and first.strip() == title else text)], source, url)


def _extracted(source: InputSource, bad: BadRows, progress: Progress | None) -> Iterator[Article]:
    """Articles between <doc id= url= title=> and </doc> (github.com/attardi/wikiextractor)."""
    head, where, body, name = None, "", list[str](), printable(source.name)
    lines = read_lines(InputFile(source.name, os.path.expanduser(source.name), progress, bad.note))
    for number, line in enumerate(lines, start=1):
        place = f"{source.name}, line {number}"
        if (opening := _opening(line)) is not None:
            if head is not None:
                bad.add(where, "the article has no </doc> before the next one begins")
            head, where, body = opening, place, []
        elif head is not None and line.rstrip().endswith("</doc>"):
            body.append(line.rstrip().removesuffix("</doc>"))
            title, url = map(html.unescape, head)
            yield _article(where, title, _without_residue(html.unescape("".join(body))), name, url)
            head = None
        elif head is not None:
            body.append(line)
        elif line.strip():
            bad.add(place, "text outside of <doc> ... </doc>")
    if head is not None:
        bad.add(where, "the article has no </doc> before the end of the file")


# What WikiExtractor leaves of templates, tags and formulas. Tags that an article about HTML may name are kept. A run of
# spaces is looked at from its beginning alone: from each space, a long one would take its square.
_SPACES = r"(?<![^\S\n])[^\S\n]*+"
_TAGS = re.compile(
    _SPACES + r"</?(?:(?:templatestyles|references?|ref|nowiki|onlyinclude|includeonly|noinclude|section|poem|gallery"
    r"|mapframe|maplink|timeline|dfn|br)\b|(?:div|span|p|small|big|center|font|table|tr|td|th|ul|ol|li)\s)[^<>\n]*>",
    re.IGNORECASE,
)
_FORMULAS = re.compile(_SPACES + r"\b(?:formula|codice)_\d+\b")
_EMPTY_PARENTHESES = re.compile(r"(?:^|[^\S\n])\(\s*+(?:[;,:][\s;,:]*+(?:from|or|and)?\s*+)?\)", re.MULTILINE)


def _without_residue(text: str) -> str:
    if "<" in text:
        text = _TAGS.sub(" ", text)
    if "formula_" in text or "codice_" in text:
        text = _FORMULAS.sub("", text)
    if "(" in text:
        text = _EMPTY_PARENTHESES.sub("", text)
    return text


def _opening(line: str) -> tuple[str, str] | None:
    """Title and url of `<doc ... url="..." title="...">`, None of any other line; a regex is too slow on a long broken
    one."""
    before, found, rest = line.rstrip().partition('title="')
    if not (found and line.startswith("<doc ") and rest.endswith('">')):
        return None
    url, closed, _ = before.partition(' url="')[2].partition('"')
    return rest[:-2], url if closed else ""
