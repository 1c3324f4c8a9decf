"""Web pages as articles: the encoding that they name or that is detected, their main text, and its headings.

Left out: what an article is (outline.py), finding files (documents.py).
"""

import copy
import logging
from collections.abc import Set
from contextlib import suppress
from typing import Any

from cozyrag.data.outline import HEADINGS, HIDDEN, Article, Markup, Outline, missing_extra, name_as_title
from cozyrag.data.streams import InputFile, detected_encoding, keeps_ascii, open_file

_MARGINS = ("nav", "footer", "aside", "select", "button")  # beside the main text, if smaller than the rest
_OWN_TAGS = {"item": "li", "row": "tr", "cell": "td", "lb": "br", "quote": "blockquote"}  # of trafilatura
_NO_CELL = ("table", "ul", "ol", "dl", "pre", *HEADINGS)  # what only a table for the layout of a page holds
LONGEST_ROW = 1000  # characters; longer ones are no row of facts
ENOUGH = 0.7  # share of a page without its margins from which the extractor's text counts as complete


def html_text(file: InputFile) -> str:
    """The text of a web page, which may name its own encoding; labels mean what they mean to browsers."""
    try:
        from w3lib.encoding import html_body_declared_encoding, html_to_unicode
    except ImportError as error:
        raise missing_extra(file.source, "w3lib", "web pages", "web") from error
    with open_file(file) as opened:
        raw = opened.read()
    declared = html_body_declared_encoding(raw)
    # UTF-8 is often a wrong label, UTF-16 cannot declare itself, and some codecs of Python are no encodings.
    if declared in (None, "utf-8") or not keeps_ascii(declared):
        declared = detected_encoding(file, raw)
    declared, text = html_to_unicode(f"text/html; charset={declared}", raw)
    if file.note is not None and (lost := text.count("\ufffd")):
        characters = "character" if lost == 1 else "characters"
        file.note(f"{file.source}: {lost:,} {characters} could not be read as {declared} and became \ufffd")
    return text.replace("\r\n", "\n")


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
    for element in list(body.iter(*HIDDEN)):
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
    markup = Markup(outline)
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
