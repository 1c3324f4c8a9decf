"""Plain text, Markdown, HTML and PDF as articles: a title, and sections with their headings.

Headings become part of a passage's title, so that it shows its subject. Formatting marks are removed, wrapped lines are
joined. Left out: finding files, office files (office.py), pictures.
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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
        markup = _Markup(self)
        markup.feed(text)
        markup.close()

    def article(self, where: str, title: str | None, name: str) -> Article:
        """The article; without a title, the first heading becomes the title if no text comes before it."""
        sections = [(path, "\n".join(lines).strip()) for path, lines in self.sections]
        first = sections[1][0][0] if len(sections) > 1 and not sections[0][1] else None
        title = title or first or name
        cleaned = [(path[1:] if path[:1] == (title,) else path, text) for path, text in sections]
        return Article(where, title, [section for section in cleaned if section[1] or section[0]])


_HIDDEN = ("script", "style", "template", "noscript", "svg")
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_BLOCK_TAGS = frozenset(
    "address article aside blockquote body br caption center col colgroup dd details dialog div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html legend li link main menu meta nav ol optgroup "
    "option p pre search section summary table tbody td tfoot th thead title tr track ul".split()
)


class _Markup(HTMLParser):
    """Adds the text of HTML to an outline: a line for each block or row of a table, headings as headings."""

    def __init__(self, outline: Outline) -> None:
        super().__init__(convert_charrefs=True)
        self._outline, self._held, self._level = outline, list[str](), 0
        self._cells: list[str] | None = None  # of the row that is read
        self._hidden, self._verbatim, self._raised = "", False, False

    def handle_starttag(self, tag: str, attrs: Sequence = ()) -> None:
        self._raised = tag == "sup" or (self._raised and tag == "a")
        if tag in _HIDDEN:
            self._hidden = tag
        elif tag in _BLOCK_TAGS:
            self._flush()
            self._level = _HEADINGS.get(tag, self._level)
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
        elif tag in _BLOCK_TAGS:
            self._flush()
            self._level = 0 if tag in _HEADINGS else self._level
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
        f"{where}: expected the package {package} to read {what}, found it missing. Run `pip install cozyrag[{extra}]`."
    )


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


def markdown_article(text: str, where: str) -> Article:
    """Headings start sections; the title is from the front matter, the first heading, or the file name."""
    body, title = _front_matter(text)
    try:
        outline = _markdown_outline(body)
    except RecursionError:  # hundreds of quotes or lists within each other
        return plain_article(text, where)
    return outline.article(where, title, name_as_title(where))


def _markdown_outline(text: str) -> Outline:
    outline, mark, cells, row = Outline(), "", list[str](), ""
    parsed, lines = _markdown().parse(text), text.split("\n")
    for opening, token in zip([None, *parsed], parsed, strict=False):
        around = opening.type if opening else ""
        if token.type == "list_item_open":
            mark = f"{token.info}{token.markup} " if token.info else "- "
        elif token.type == "tr_open":
            row = lines[token.map[0]]
        elif token.type == "tr_close":
            outline.line(" | ".join(cells + _more_cells(row, len(cells))))
            cells.clear()
        elif token.type == "inline" and around == "heading_open" and token.level == 1:
            outline.heading(int(opening.tag[1]), _inline_text(token).replace("\n", " "))
        elif token.type == "inline" and around in ("th_open", "td_open"):
            cells.append(_inline_text(token).replace("\n", " "))
        elif token.type == "inline" and (words := _inline_text(token)):
            outline.line(mark + words)
            mark = ""
        elif token.type in ("fence", "code_block"):
            outline.line(token.content.rstrip())
        elif token.type == "html_block":
            outline.html(token.content)
    return outline


def _more_cells(row: str, known: int) -> list[str]:
    """The cells of a table's row beyond the columns of its head, which Markdown drops."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))[known:]]


@cache
def _markdown() -> Any:
    """CommonMark with tables, ~~strikethrough~~ and [[wiki links]]; a footnote is text, not the target of a link."""
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import reference

    def is_target(state: Any, line: int, *rest: Any) -> bool:
        start = state.bMarks[line] + state.tShift[line]
        return not state.src.startswith("[^", start) and reference(state, line, *rest)

    parser = MarkdownIt("commonmark", {"maxNesting": 100_000}).enable(["table", "strikethrough"])
    parser.block.ruler.at("reference", is_target)
    parser.inline.ruler.before("link", "wiki_link", _wiki_link)
    return parser


def _wiki_link(state: Any, silent: bool) -> bool:
    """A rule of the parser: [[target|text]] and ![[target]] as their text."""
    found = _WIKI_LINK.match(state.src, state.pos)
    if found and not silent:
        state.push("text", "", 0).content = found[1]
    if found:
        state.pos = found.end()
    return found is not None


_WIKI_LINK = re.compile(r"!?\[\[(?:[^\[\]|\n]*\|)?([^\[\]|\n]+)\]\]")
_TAG = re.compile(r"</?([a-zA-Z][\w-]*)")
# Other words in angle brackets are no markup but text: <your name>, Vec<String>.
_INLINE_TAGS = frozenset(
    "a abbr acronym audio b bdi bdo big br button canvas cite code data del dfn em embed font i iframe img input ins "
    "kbd label map mark math meter noscript object output picture pre progress q rp rt ruby s samp script select slot "
    "small source span strike strong style sub sup svg template textarea time tt u var video wbr".split()
)


def _inline_text(token: Any) -> str:
    """The text of a paragraph, heading or cell: on one line except for hard breaks."""
    lines = "".join(_inline_parts(token)).split("\f")
    return "\n".join(filter(None, (unwrap(line.split("\n")) for line in lines)))


def _inline_parts(token: Any) -> Iterator[str]:
    """The text of each part; "\\n" for a wrapped line, "\\f" for a hard break."""
    for part in token.children or ():
        if part.type == "image":
            yield from _inline_parts(part)
        elif part.type == "html_inline":
            tag = _TAG.match(part.content)
            if tag and tag[1].lower() not in _INLINE_TAGS | _BLOCK_TAGS:
                yield part.content
            elif tag and tag[1].lower() == "br":
                yield "\f"
        else:
            yield {"softbreak": "\n", "hardbreak": "\f"}.get(part.type, part.content)


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


_MARGINS = ("nav", "footer", "aside", "select", "button")  # beside the main text, if smaller than the rest
_OWN_TAGS = {"item": "li", "row": "tr", "cell": "td", "lb": "br", "quote": "blockquote"}  # of trafilatura
_NO_CELL = ("table", "ul", "ol", "dl", "pre", *_HEADINGS)  # what only a table for the layout of a page holds
LONGEST_ROW = 1000  # characters; longer ones are no row of facts
ENOUGH = 0.7  # share of a page without its margins from which the extractor's text counts as complete


def html_article(text: str, where: str) -> Article:
    """Headings start sections; the title is the only heading of the first level, else <title>.

    trafilatura finds the main text. If it keeps little of the page, the whole page without its margins is taken.

    Raises InputError without trafilatura.
    """
    text = text.replace("\0", "")
    page = _html_tree(text, where)
    found = Outline()
    if page is None:
        found.html(text)
        return found.article(where, None, name_as_title(where))
    with suppress(RecursionError, ValueError):  # a page of thousands of nested elements, control characters
        found = _main_outline(page)
    whole = _outline_of(_without_margins(page))
    # Of short pages it takes menus as well, and parts words such as H<sub>2</sub>O.
    complete = ENOUGH * whole.size() <= found.size() < whole.size()
    flat = len(found.sections) == 1 < len(whole.sections)
    outline = found if complete and not flat else whole
    tops = [" ".join(top.text_content().split()) for top in page.iter("h1")]
    title = tops[0] if len(tops) == 1 else " ".join((page.findtext(".//title") or "").split())
    return outline.article(where, title or None, name_as_title(where))


def _html_tree(text: str, where: str) -> Any:
    """The elements of a page, None if it is empty, or too large or deep (256) for the parser."""
    try:
        import trafilatura  # noqa: F401
        from lxml import etree, html
    except ImportError as error:
        raise missing_extra(where, "trafilatura", "web pages", "web") from error
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        page = html.document_fromstring(text.encode("utf-8", "replace"), parser=parser)
    except etree.LxmlError:
        return None
    return None if parser.error_log.filter_from_fatals() else page


def _main_outline(page: Any) -> Outline:
    from trafilatura import bare_extraction

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    found: Any = bare_extraction(
        copy.deepcopy(page), favor_recall=True, include_comments=False, include_formatting=True
    )
    return Outline() if found is None or found.body is None else _outline_of(found.body)


def _without_margins(page: Any) -> Any:
    """The body of the page, which loses what is not shown, and menus and the like unless they hold most of it."""
    body = page.find("body")
    body = page if body is None else body
    for element in list(body.iter(*_HIDDEN)):
        element.clear(keep_tail=True)  # drop_tree would refuse control characters in the text that follows
    size = len(body.text_content())
    for element in list(body.iter(*_MARGINS)):
        if len(element.text_content()) < size / 2:
            element.clear(keep_tail=True)
    return body


def _outline_of(tree: Any) -> Outline:
    """The text under headings of elements of HTML, or of trafilatura."""
    from lxml import etree

    outline = Outline()
    markup = _Markup(outline)
    facts = {row for row in tree.iter("tr", "row") if _is_row_of_facts(row)}
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        tag = _tag_of(element, facts)
        if event == "start":
            markup.handle_starttag(tag)
            markup.handle_data(element.text or "")
        else:
            markup.handle_endtag(tag)
            markup.handle_data(element.tail or "" if element is not tree else "")
    markup.close()
    return outline


def _is_row_of_facts(row: Any) -> bool:
    """Whether a row of a table is no part of the layout of a page."""
    return next(row.iter(*_NO_CELL), None) is None and len("".join(row.itertext())) < LONGEST_ROW


def _tag_of(element: Any, facts: Set[Any]) -> str:
    """The tag that says what an element is for: a heading, a block of code, one of the rows of `facts`."""
    tag = _OWN_TAGS.get(element.tag, element.tag)
    if tag in ("head", "hi"):
        return (element.get("rend") or "p").lstrip("#")
    if tag == "code" and "\n" in "".join(element.itertext()):
        return "pre"
    if tag in ("tr", "td", "th"):
        return tag if (element if tag == "tr" else element.getparent()) in facts else "div"
    return tag


def pdf_article(path: str, where: str) -> Article:
    """One section: the text of all pages, lines and hyphenated words joined.

    Raises InputError without pypdf, and for a file that it cannot read.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise missing_extra(where, "pypdf", "PDF", "pdf") from error
    try:
        reader = PdfReader(path)
        pages = [page.extract_text() for page in reader.pages]
        title = str(reader.metadata.get("/Title") or "").strip() if reader.metadata else ""
    except DependencyError as error:
        raise missing_extra(where, "cryptography", "an encrypted PDF", "pdf") from error
    except (PyPdfError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{where}: expected a PDF with text, found an unreadable one ({error}). Save it again without password."
        ) from error
    article = plain_article(re.sub(r"(?<=[^\W\d_])-\n(?=[^\W\d_A-Z])", "", "\n".join(pages)), where)
    return replace(article, title=title or article.title)
