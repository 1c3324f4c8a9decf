"""Plain text, Markdown, HTML and PDF as articles: a title, and sections with their headings.

Headings become part of a passage's title, so that it shows its subject. Formatting marks are removed, wrapped lines are
joined. Left out: finding files, other formats (word processors can save HTML), pictures, and guessing which part of a
web page matters beyond its tags.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import yaml

from cozyrag.errors import InputError

WRAPPED = 45  # characters from which a line of plain text is assumed to continue in the next


@dataclass(frozen=True, slots=True)
class Article:
    """A text before it is cut: `where` is its place for messages, `sections` are pairs of heading path and text."""

    where: str
    title: str
    sections: list[tuple[tuple[str, ...], str]]


@dataclass
class _Outline:
    """Collects lines under the current headings."""

    sections: list[tuple[tuple[str, ...], list[str]]] = field(default_factory=lambda: [((), [])])
    path: list[tuple[int, str]] = field(default_factory=list)

    def heading(self, level: int, text: str) -> None:
        self.path = [each for each in self.path if each[0] < level] + [(level, text)]
        self.sections.append((tuple(text for _, text in self.path), []))

    def line(self, text: str) -> None:
        self.sections[-1][1].append(text)

    def paragraph(self, lines: list[str]) -> None:
        """Add these lines of Markdown as one line of text, and clear the list."""
        if text := _bare(unwrap(lines)):
            self.line(text)
        lines.clear()

    def article(self, where: str, title: str | None, name: str) -> Article:
        """The article; without a title, the first heading becomes the title if no text comes before it."""
        sections = [(path, "\n".join(lines).strip()) for path, lines in self.sections]
        first = sections[1][0][0] if len(sections) > 1 and not sections[0][1] else None
        title = title or first or name
        cleaned = [(path[1:] if path[:1] == (title,) else path, text) for path, text in sections]
        return Article(where, title, [section for section in cleaned if section[1] or section[0]])


def name_as_title(path: str) -> str:
    """A title from the name of a file: no extension, spaces for dashes and underscores."""
    return re.sub(r"[-_\s]+", " ", Path(path).stem).strip()


def unwrap(lines: Iterable[str], least: int = 0) -> str:
    """Join the lines of a paragraph: each of at least `least` characters with the next, ideographs without a space."""
    text, last = "", 0
    for line in filter(None, map(str.strip, lines)):
        wide = "\u2e80" < text[-1:] < "\ua000" and line[0] > "\u2e80"
        text += ("" if not text or (wide and last >= least) else " " if last >= least else "\n") + line
        last = len(line)
    return text


def plain_article(text: str, where: str) -> Article:
    """One section; blank lines separate paragraphs, lines that look wrapped are joined."""
    blocks = re.split(r"\n[^\S\n]*\n", text)
    paragraphs = [unwrap(block.split("\n"), WRAPPED) for block in blocks if block.strip()]
    return Article(where, name_as_title(where), [((), "\n".join(paragraphs))])


_ATX = re.compile(r" {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$")
_SETEXT = re.compile(r" {0,3}(=+|-+)\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_DEFINITION = re.compile(r" {0,3}\[[^\]]+\]:\s+\S+\s*(?:[\"'(].*)?$")  # the target of a reference link
_OWN_LINE = re.compile(r"\s*(?:[-*+]\s|\d+[.)]\s|\||>)")
_MARKS = (
    (re.compile(r"<!--.*?-->", re.S), ""),
    (re.compile(r"!\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"!?\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]"), r"\1"),
    (re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"(\*\*|__|~~)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w_])_(?=\S)([^_\n]+?)(?<=\S)_(?![\w_])"), r"\1"),
    (re.compile(r"`+([^`\n]+)`+"), r"\1"),
    (re.compile(r"^\s*>+ ?", re.M), ""),
    (re.compile(r"<(https?://[^>\s]+)>"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^<>]*>"), " "),
)


def markdown_article(text: str, where: str) -> Article:
    """Headings start sections; the title is from the front matter, the first heading, or the file name."""
    text, title = _front_matter(text)
    outline, block, fenced = _Outline(), list[str](), False
    for line in text.split("\n"):
        fence, atx, setext = _FENCE.match(line), _ATX.match(line), _SETEXT.match(line)
        if fenced and not fence:
            outline.line(line.rstrip())
        elif setext and len(block) == 1 and not _OWN_LINE.match(block[0]):
            outline.heading(1 if setext[1][0] == "=" else 2, _bare(block.pop()))
        elif fence or atx or setext or not line.strip() or _DEFINITION.match(line):
            outline.paragraph(block)
            fenced ^= bool(fence)
            if atx:
                outline.heading(len(atx[1]), _bare(atx[2] or ""))
        else:
            if _OWN_LINE.match(line):
                outline.paragraph(block)
            block.append(line)
    outline.paragraph(block)
    return outline.article(where, title, name_as_title(where))


def _bare(text: str) -> str:
    for mark, replacement in _MARKS:
        text = mark.sub(replacement, text)
    return text.strip()


def _front_matter(text: str) -> tuple[str, str | None]:
    """The text after the front matter, and the title in it."""
    found = re.match(r"---[^\S\n]*\n(.*?\n)(?:---|\.\.\.)[^\S\n]*(?:\n|$)", text, re.S)
    try:  # the loader without types: a title such as 1.10 stays as written, and no date can be impossible
        facts = yaml.BaseLoader(found[1]).get_single_data() if found else None
    except yaml.YAMLError:  # a text that begins with a horizontal rule, not front matter
        facts = None
    if found is None or not isinstance(facts, dict):
        return text, None
    return text[found.end() :], str(facts["title"]).strip() if facts.get("title") else None


_SKIPPED = {"script", "style", "template", "noscript", "svg", "nav", "footer", "aside", "form", "button", "select"}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCKS = (
    "address article blockquote body br caption dd div dl dt fieldset figcaption figure header hr html li main ol p "
    "pre section table tbody tfoot thead tr ul"
)
_BREAKS = {"title", *_HEADINGS, *_BLOCKS.split()}


class _Page(HTMLParser):
    """Text under headings, without navigation, scripts and forms."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.outline, self.title = _Outline(), ""
        self._held: list[str] = []
        self._skipped: list[str] = []
        self._inside = ""  # "title" or a heading

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in _SKIPPED:
            self._skipped.append(tag)
        elif tag in _BREAKS:
            self._flush()
            self._inside = tag if tag in _HEADINGS or tag == "title" else ""
        elif tag in ("td", "th"):
            self._held.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            del self._skipped[self._skipped.index(tag) :]
        elif tag in _BREAKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._held.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        text, inside = " ".join("".join(self._held).split()), self._inside
        self._held, self._inside = [], ""
        if inside == "title":
            self.title = self.title or text
        elif text and inside:
            self.outline.heading(_HEADINGS[inside], text)
        elif text:
            self.outline.line(text)


def html_article(text: str, where: str) -> Article:
    """Headings start sections; the title is the only heading of the first level, else <title>."""
    page = _Page()
    page.feed(text)
    page.close()
    tops = [path[0] for path, _ in page.outline.sections if len(path) == 1]
    title = tops[0] if len(tops) == 1 else page.title
    return page.outline.article(where, title or None, name_as_title(where))


def pdf_article(path: str, where: str) -> Article:
    """One section: the text of all pages, lines and hyphenated words joined.

    Raises InputError without pypdf, and for a file that it cannot read.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise InputError(
            f"{where}: expected the package pypdf to read PDF, found it missing. Run `pip install cozyrag[pdf]`."
        ) from error
    try:
        reader = PdfReader(path)
        pages = [page.extract_text() for page in reader.pages]
        title = str(reader.metadata.get("/Title") or "").strip() if reader.metadata else ""
    except (PyPdfError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{where}: expected a PDF with text, found an unreadable one ({error}). Save it again without password."
        ) from error
    article = plain_article(re.sub(r"(?<=[^\W\d_])-\n(?=[^\W\d_A-Z])", "", "\n".join(pages)), where)
    return replace(article, title=title or article.title)
