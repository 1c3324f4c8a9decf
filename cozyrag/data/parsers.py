"""Plain text, Markdown and PDF as articles: a title, and sections with their headings.

Headings become part of a passage's title, so that it shows its subject. Formatting marks are removed, wrapped lines are
joined. Left out: finding files (documents.py), web pages (web_pages.py), office files (office.py), pictures.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import yaml

from cozyrag.data.outline import BLOCK_TAGS, Article, Outline, missing_extra, name_as_title
from cozyrag.errors import InputError

WRAPPED = 45  # characters from which a line of plain text is assumed to continue in the next


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
    raised = False  # after <sup>: 10<sup>6</sup> is 10^6, as in HTML (outline.py)
    for part in token.children or ():
        if raised and part.content[:1].isdigit():
            yield "^"
        raised = part.type == "html_inline" and part.content.lower() == "<sup>"
        if part.type == "image":
            yield from _inline_parts(part)
        elif part.type == "html_inline":
            tag = _TAG.match(part.content)
            if tag and tag[1].lower() not in _INLINE_TAGS | BLOCK_TAGS:
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


def pdf_article(path: str, where: str) -> Article:
    """One section: the text of all pages, lines and hyphenated words joined; where each page begins.

    Raises InputError without pypdf, and for a file that it cannot read.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise missing_extra(where, "pypdf", "PDF", "pdf") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings name neither the file nor a remedy
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
    marked = "\n\f".join(page.replace("\f", "\n").strip() for page in pages)
    pages = re.sub(r"(?<=[^\W\d_])-\n(\f?)(?=[^\W\d_A-Z])", r"\1", marked).split("\f")
    article = plain_article("".join(pages), where)
    lengths = (len("".join(page.split())) for page in pages[:-1])
    return replace(article, title=title or article.title, pages=(0, *accumulate(lengths)))
