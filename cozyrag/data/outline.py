"""Articles, and the outline that readers fill: lines of text under headings, also from HTML.

Left out: the formats (parsers.py, web_pages.py, office.py).
"""

import re
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path

from cozyrag.errors import InputError


@dataclass(frozen=True, slots=True)
class Article:
    """A text before it is cut: `where` is its place for messages, `sections` are pairs of heading path and text.

    source: its file or Hub dataset, as the user named it. url: its web address, if its table has one. pages: of a text
    of one section that has pages, the characters other than spaces before each of them.
    """

    where: str
    title: str
    sections: list[tuple[tuple[str, ...], str]]
    source: str = ""
    url: str = ""
    pages: tuple[int, ...] = ()


@dataclass
class Outline:
    """Collects lines under the current headings."""

    sections: list[tuple[tuple[str, ...], list[str]]] = field(default_factory=lambda: [((), [])])
    path: list[tuple[int, str]] = field(default_factory=list)

    def heading(self, level: int, text: str) -> None:
        if not text:
            return
        self.path = [each for each in self.path if each[0] < level] + [(level, text)]
        self.sections.append((tuple(text for _, text in self.path), []))

    def line(self, text: str) -> None:
        if text:
            self.sections[-1][1].append(text)

    def size(self) -> int:
        """The number of characters other than spaces."""
        texts = [text for path, lines in self.sections for text in (*path[-1:], *lines)]
        return sum(len(word) for text in texts for word in text.split())

    def html(self, text: str) -> None:
        """Add the text and the headings of HTML within Markdown."""
        markup = Markup(self)
        markup.feed(text)
        markup.close()

    def article(self, where: str, title: str | None, name: str) -> Article:
        """The article; without a title, the first heading becomes the title if no text comes before it."""
        sections = [(path, "\n".join(lines).strip()) for path, lines in self.sections]
        first = sections[1][0][0] if len(sections) > 1 and not sections[0][1] else None
        title = title or first or name
        cleaned = [(path[1:] if path[:1] == (title,) else path, text) for path, text in sections]
        return Article(where, title, [section for section in cleaned if section[1] or section[0]])


HIDDEN = ("script", "style", "template", "noscript", "svg")
HEADINGS = {f"h{level}": level for level in range(1, 7)}
BLOCK_TAGS = frozenset(
    "address article aside blockquote body br caption center col colgroup dd details dialog div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html legend li link main menu meta nav ol optgroup "
    "option p pre search section summary table tbody td tfoot th thead title tr track ul".split()
)


# A browser's rules for where markup ends. Each branch takes what it has passed and, at the end of the text, ends with
# it ("open"), so reading is linear. html.parser of Python 3.11 is quadratic, and libxml2 too; it also joins the words
# around an end tag without a start, and drops what follows a tag that is never closed.
_REST = r"(?:[^>=]++|=\s*+(?:\"[^\"]*+\"?+|'[^']*+'?+)?+)*+"  # of a tag: quote marks count behind =
_MARKUP = re.compile(
    rf"<((?i:script|style))(?=[\s/>]){_REST}(?<!/)>.*?(?:</(?i:\1)(?=[\s/>])[^>]*+(?:>|\Z)|\Z)"
    r"|<(?:!--(?:[^-]++|-(?!->))*+(?:--)?+|!\[CDATA\[(?:[^\]]++|\](?!\]>))*+(?:\]\])?+"
    rf"|(?P<end>/?)(?P<tag>[a-zA-Z][^\s/>]*+){_REST}|[!?/][^>]*+)(?:>|(?P<open>\Z))",
    re.DOTALL,
)
_CLOSED = re.compile(  # behind markup without end: none goes on past the next "<"
    r"<(?:!--(?:[^<-]++|-(?!->))*+--|(?P<end>/?)(?P<tag>[a-zA-Z][^\s/<>]*+)[^<>]*+)>"
)


class Markup:
    """Adds the text of HTML to an outline: a line for each block or row of a table, headings as headings.

    Tags, comments and declarations have no text. What looks like markup and is never closed is text.
    """

    def __init__(self, outline: Outline) -> None:
        self._outline, self._held, self._level = outline, list[str](), 0
        self._cells: list[str] | None = None  # of the row that is read
        self._hidden, self._verbatim, self._raised = "", False, False

    def feed(self, text: str) -> None:
        """Read HTML, in time that grows with its length."""
        text = text[self._read(text, _MARKUP) :]
        self.handle_data(unescape(text[self._read(text, _CLOSED) :]))

    def _read(self, text: str, markup: re.Pattern) -> int:
        """Read text and markup up to the last piece of markup that is closed; returns where that ends."""
        at = 0
        for found in markup.finditer(text):
            if found.lastgroup == "open":
                break
            self.handle_data(unescape(text[at : found.start()]))
            at = found.end()
            tag = (found["tag"] or "").lower()
            if tag and not found["end"]:
                self.handle_starttag(tag)
            if tag and (found["end"] or text[at - 2] == "/"):
                self.handle_endtag(tag)
        return at

    def handle_starttag(self, tag: str) -> None:
        self._raised = tag == "sup" or (self._raised and tag == "a")
        if tag in HIDDEN:
            self._hidden = tag
        elif tag in BLOCK_TAGS:
            self._flush()
            self._level = HEADINGS.get(tag, self._level)
            self._verbatim |= tag == "pre"
            if tag == "tr":
                self._end_row()
                self._cells = []
            elif tag in ("td", "th") and self._cells is not None:
                self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raised = False
        if tag == self._hidden:
            self._hidden = ""
        elif tag in BLOCK_TAGS:
            self._flush()
            self._level = 0 if tag in HEADINGS else self._level
            self._verbatim &= tag != "pre"
            if tag in ("tr", "table"):
                self._end_row()

    def handle_data(self, data: str) -> None:
        if data and not self._hidden:
            self._held.append("^" + data if self._raised and data[:1].isdigit() else data)
            self._raised = False

    def close(self) -> None:
        self._flush()
        self._end_row()

    def _flush(self) -> None:
        held = "".join(self._held)
        text = held.strip("\n").rstrip() if self._verbatim else " ".join(held.split())
        self._held = []
        if self._cells and text:
            self._cells[-1] = f"{self._cells[-1]} {text}".strip()
        elif self._level:
            self._outline.heading(self._level, text)
        else:
            self._outline.line(text)

    def _end_row(self) -> None:
        cells, self._cells = self._cells, None
        if any(cells or ()):
            self._outline.line(" | ".join(cells or ()))


def missing_extra(where: str, package: str, what: str, extra: str) -> InputError:
    """The InputError for a file that only an optional package reads."""
    return InputError(
        f"{where}: expected the package {package} to read {what}, found it missing. "
        f'Run `pip install "cozyrag[{extra}]"`.'
    )


def name_as_title(path: str) -> str:
    """A title from the name of a file: no extension, spaces for dashes and underscores."""
    return re.sub(r"[-_\s]+", " ", Path(path).stem).strip()
