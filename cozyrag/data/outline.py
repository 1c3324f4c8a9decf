"""Articles, and the outline that readers fill: lines of text under headings, also from HTML.

Left out: the formats (parsers.py, web_pages.py, office.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
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


class Markup(HTMLParser):
    """Adds the text of HTML to an outline: a line for each block or row of a table, headings as headings."""

    def __init__(self, outline: Outline) -> None:
        super().__init__(convert_charrefs=True)
        self._outline, self._held, self._level = outline, list[str](), 0
        self._cells: list[str] | None = None  # of the row that is read
        self._hidden, self._verbatim, self._raised = "", False, False

    def handle_starttag(self, tag: str, attrs: Sequence = ()) -> None:
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

    def parse_html_declaration(self, i: int) -> int:
        try:
            return super().parse_html_declaration(i)
        except AssertionError:  # html.parser gives up on an unknown <![...
            return self.parse_bogus_comment(i)

    def close(self) -> None:
        super().close()
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
