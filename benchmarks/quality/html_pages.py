"""How much of the main text of web pages does a reader keep, and how much beside it?

    python -m benchmarks.quality.html_pages            # the readers and libraries that are installed
    python -m benchmarks.quality.html_pages --details  # one row for each kind of page

Pages of 20 kinds, five of each, are written here from drawn sentences, so the words of the main text are known. Rows:
our reader, trafilatura, readability-lxml and resiliparse. "kept" is the share of the words of the main text, "lost
pages" counts pages with less than 90 % of them, "beside" is the share of the other words (navigation, footers, banners,
related links, comments) that was kept as well. Left out: pages that scripts build, which no reader of files can see.
"""

import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

WHO = "The miller|Our teacher|A young smith|The old ferryman|My neighbour|The keeper of the museum|Nobody".split("|")
DID = "repaired|sold|found|painted|described|moved|measured|cleaned|opened".split("|")
WHAT = "the pump|a red barrel|the stone bridge|an iron clock|the garden gate|two wooden boats|the salt mine".split("|")
WHEN = "in the spring of {}|after the flood of {}|with the help of {} children|for {} crowns|in {} days".split("|")
LANGUAGES = {
    "German": "Der alte Müller reparierte im Frühjahr {} die Pumpe hinter dem Haus, weil sie kein Wasser mehr gab.",
    "Russian": "Старый мельник починил насос за домом весной {} года, потому что воды в колодце больше не было.",
    "French": "Le vieux meunier a réparé la pompe derrière la maison en {}, parce qu'elle ne donnait plus d'eau.",
    "Japanese": "古い水車の番人は{}年の春に家の裏のポンプを直しました。井戸の水が出なくなったからです。",
    "Chinese": "老磨坊主在{}年春天修好了屋后的水泵，因为井里已经抽不出水了。",
}


@dataclass(frozen=True)
class Page:
    """A web page, the words of its main text, and its other words."""

    kind: str
    html: str
    main: Counter[str]
    beside: Counter[str]


def words_of(text: str) -> Counter[str]:
    """Words, and each character of scripts without spaces."""
    return Counter(re.findall(r"[\u3040-\u9fff]|[^\W_\u3040-\u9fff]+", text.lower()))


class Writer:
    """Draws sentences and remembers which belong to the main text."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.draw = kind, random.Random(f"{kind} {number}")
        self.number, self.main, self.beside = number, list[str](), list[str]()

    def words(self, text: str, *, main: bool = True) -> str:
        """The text, remembered."""
        (self.main if main else self.beside).append(text)
        return text

    def sentence(self, *, main: bool = True) -> str:
        """One sentence."""
        draw = self.draw
        when = draw.choice(WHEN).format(draw.randrange(10, 1999))
        return self.words(f"{draw.choice(WHO)} {draw.choice(DID)} {draw.choice(WHAT)} {when}.", main=main)

    def text(self, least: int, most: int, *, main: bool = True) -> str:
        """Some sentences."""
        return " ".join(self.sentence(main=main) for _ in range(self.draw.randint(least, most)))

    def paragraphs(self, count: int, *, main: bool = True) -> str:
        """Paragraphs of two to five sentences."""
        return "\n".join(f"<p>{self.text(2, 5, main=main)}</p>" for _ in range(count))

    def heading(self, level: int) -> str:
        """A heading."""
        text = self.words(f"{self.draw.choice(WHO)} and {self.draw.choice(WHAT)} {self.draw.randrange(99)}")
        return f"<h{level}>{text}</h{level}>"

    def links(self, count: int) -> str:
        """Items of a menu, which are no main text."""
        names = [
            f"{self.draw.choice(('News', 'Shop', 'Contact', 'Help'))} {self.draw.randrange(99)}" for _ in range(count)
        ]
        return "<ul>" + "".join(f'<li><a href="/x">{self.words(name, main=False)}</a></li>' for name in names) + "</ul>"

    def around(self, body: str) -> str:
        """The body between a menu and a footer."""
        foot = self.words("All rights reserved. Imprint and terms of use.", main=False)
        return f"<header><nav>{self.links(6)}</nav></header>\n{body}\n<footer><p>{foot}</p>{self.links(3)}</footer>"

    def page(self, body: str, head: str = "") -> Page:
        """The finished page."""
        html = f"<!doctype html><html><head><title>Site</title>{head}</head><body>{body}</body></html>"
        return Page(self.kind, html, words_of(" ".join(self.main)), words_of(" ".join(self.beside)))


def article(w: Writer) -> Page:
    banner = f'<div id="cookie-banner">{w.text(1, 2, main=False)}<button>OK</button></div>'
    aside = f"<aside><h3>{w.words('Related', main=False)}</h3>{w.links(5)}</aside>"
    comments = f'<div id="comments" class="comments">{w.paragraphs(2, main=False)}</div>'
    text = f"<article>{w.heading(1)}{w.paragraphs(3)}{w.heading(2)}{w.paragraphs(3)}</article>"
    return w.page(banner + w.around(f"<main>{text}{aside}{comments}</main>"))


def form_page(w: Writer) -> Page:
    hidden = '<input type="hidden" name="__VIEWSTATE" value="dDwtMTA4"/>'
    body = f"{w.heading(1)}{w.paragraphs(2)}{w.heading(2)}{w.paragraphs(1)}"
    return w.page(
        f'<form method="post" action="./a.aspx" id="aspnetForm">{hidden}<div id="content">{body}</div></form>'
    )


def unclosed(w: Writer) -> Page:
    tag = ("aside", "select", "nav", "p", "div")[w.number]
    extra = {"select": "<option>2023<option>2024", "p": "", "div": ""}.get(
        tag, w.words("See also the tour", main=False)
    )
    body = f'{w.heading(1)}<div class="intro"><p>{w.text(2, 3)}</p><{tag}>{extra}</div>{w.paragraphs(3)}'
    return w.page(f'<div id="page">{body}</div>')


def docs_page(w: Writer) -> Page:
    code = w.words(f"def pump_{w.number}(litres):\n    return litres * {w.number + 2}")
    rows = "".join(
        f"<tr><td><code>{w.words(f'option{i}')}</code></td><td>{w.sentence()}</td></tr>"
        for i in range(w.draw.randint(3, 6))
    )
    body = (
        f"{w.heading(1)}{w.paragraphs(1)}<pre><code>{code}</code></pre>{w.heading(2)}<table><tr><th>{w.words('Name')}</th>"
        f"<th>{w.words('Meaning')}</th></tr>{rows}</table>{w.paragraphs(1)}"
    )
    side = f'<div class="sidebar"><div class="toctree">{w.links(9)}</div></div>'
    return w.page(w.around(f'{side}<div class="document"><div class="body" role="main">{body}</div></div>'))


def forum(w: Writer) -> Page:
    posts = "".join(
        f'<div class="post" id="p{i}"><div class="author">{w.words(f"user{i}", main=False)}</div>'
        f'<div class="content">{w.text(1, 4)}</div></div>'
        for i in range(w.draw.randint(3, 7))
    )
    return w.page(w.around(f'{w.heading(1)}<div class="thread">{posts}</div>'))


def recipe(w: Writer) -> Page:
    needs = "".join(f"<li>{w.words(f'{i + 2} spoons of {w.draw.choice(WHAT)}')}</li>" for i in range(6))
    steps = "".join(f"<li>{w.sentence()}</li>" for _ in range(5))
    body = f"{w.heading(1)}<p>{w.sentence()}</p>{w.heading(2)}<ul>{needs}</ul>{w.heading(2)}<ol>{steps}</ol>"
    return w.page(w.around(f'<div class="recipe">{body}</div>'))


def wiki(w: Writer) -> Page:
    facts = "".join(
        f"<tr><th>{w.words(name)}</th><td>{w.words(str(w.draw.randrange(999)))}</td></tr>"
        for name in ("Founded", "People")
    )
    body = (
        f'{w.heading(1)}<table class="infobox">{facts}</table>{w.paragraphs(2)}{w.heading(2)}{w.paragraphs(2)}'
        f"{w.heading(3)}<ul><li>{w.sentence()}</li><li>{w.sentence()}</li></ul>"
    )
    return w.page(
        f'<div id="mw-navigation">{w.links(8)}</div><div id="content"><div id="bodyContent">{body}</div></div>'
    )


def short(w: Writer) -> Page:
    body = "".join(f"<p>{w.sentence()}</p>" for _ in range(w.number % 3 + 1))
    return w.page(w.heading(1) + body)


def short_with_menu(w: Writer) -> Page:
    return w.page(w.around(f"<main>{w.heading(1)}<p>{w.text(1, 2)}</p></main>"))


def div_soup(w: Writer) -> Page:
    texts = "".join(f'<div class="c{i}"><div>{w.text(2, 4)}</div></div>' for i in range(5))
    menu = f'<div class="m">{w.links(6)}</div>'
    return w.page(f'{menu}<div class="x"><div class="t">{w.words("The old mill")}</div>{texts}</div>')


def table_layout(w: Writer) -> Page:
    menu = "".join(f'<a href="/x">{w.words(f"Page {i}", main=False)}</a><br>' for i in range(6))
    body = f"{w.heading(1)}{'<br><br>'.join(w.text(2, 4) for _ in range(3))}"
    return w.page(
        f'<table width=100%><tr><td valign="top">{menu}</td><td><font face="Arial">{body}</font></td></tr></table>'
    )


def foreign(w: Writer) -> Page:
    pattern = list(LANGUAGES.values())[w.number]
    texts = "".join(f"<p>{w.words(pattern.format(w.draw.randrange(1000, 2000)))}</p>" for _ in range(5))
    return w.page(w.around(f'<div class="text">{w.heading(1)}{texts}</div>'))


def definitions(w: Writer) -> Page:
    pairs = "".join(f"<dt>{w.words(f'Term {i}')}</dt><dd>{w.sentence()}</dd>" for i in range(5))
    return w.page(w.around(f"{w.heading(1)}<dl>{pairs}</dl>"))


def headings_only(w: Writer) -> Page:
    return w.page("".join(f"{w.heading(level)}" for level in (1, 2, 2, 3, 2)) + f"<p>{w.sentence()}</p>")


def questions(w: Writer) -> Page:
    asked = "".join(
        f"<details><summary>{w.words(f'Why {i}?')}</summary><p>{w.text(1, 2)}</p></details>" for i in range(4)
    )
    return w.page(w.around(f"<main>{w.heading(1)}{asked}</main>"))


def contact(w: Writer) -> Page:
    lines = "<br>".join(
        w.words(text) for text in ("Town library", "Mill Lane 7", "Open from 9 to 17", "Phone 555 0100")
    )
    times = "".join(
        f"<tr><td>{w.words(day)}</td><td>{w.words(f'{w.draw.randrange(7, 12)} to 18')}</td></tr>"
        for day in ("Monday", "Friday")
    )
    return w.page(w.around(f"{w.heading(1)}<address>{lines}</address><table>{times}</table>"))


def sections(w: Writer) -> Page:
    parts = "".join(
        f'<section class="band-{i}"><div class="inner">{w.heading(2)}<p>{w.text(1, 2)}</p></div></section>'
        for i in range(6)
    )
    return w.page(w.around(w.heading(1) + parts))


def odd_classes(w: Writer) -> Page:
    name = ("with-sidebar", "comment-body", "footer-top", "promo-text", "menu-page")[w.number]
    return w.page(
        w.around(f'<div class="{name}">{w.heading(1)}{w.paragraphs(2)}<div class="{name}">{w.text(2, 3)}</div></div>')
    )


def list_of_links(w: Writer) -> Page:
    items = "".join(f'<li><a href="/{i}">{w.sentence()}</a> {w.words(f"page {i}")}</li>' for i in range(10))
    return w.page(w.around(f"<main>{w.heading(1)}<ul>{items}</ul></main>"))


def columns(w: Writer) -> Page:
    cells = "".join(
        f'<div class="col-md-4"><div class="card"><h3>{w.sentence()}</h3>{w.text(1, 3)}</div></div>' for _ in range(6)
    )
    return w.page(w.around(f'<div class="container">{w.heading(1)}<div class="row">{cells}</div></div>'))


KINDS: tuple[Callable[[Writer], Page], ...] = (
    *(article, form_page, unclosed, docs_page, forum, recipe, wiki, short, short_with_menu, div_soup, table_layout),
    *(foreign, definitions, headings_only, questions, contact, sections, odd_classes, list_of_links, columns),
)


def ours(html: str) -> str:
    """The reader of `cozyrag passages`."""
    from cozyrag.data.web_pages import html_article

    found = html_article(html, "page.html")
    return "\n".join([found.title] + [line for path, text in found.sections for line in (*path[-1:], text)])


def trafilatura(html: str) -> str:
    """trafilatura with its usual settings."""
    import trafilatura

    return trafilatura.extract(html) or ""


def trafilatura_recall(html: str) -> str:
    """trafilatura that prefers more text."""
    import trafilatura

    return trafilatura.extract(html, favor_recall=True) or ""


def plain(html: str) -> str:
    """All text of the page, by trafilatura."""
    import trafilatura

    return trafilatura.html2txt(html)


def readability(html: str) -> str:
    """readability-lxml."""
    import lxml.html
    from readability import Document

    page = Document(html)
    return f"{page.short_title()}\n" + "\n".join(lxml.html.fromstring(page.summary()).itertext())


def resiliparse(html: str) -> str:
    """resiliparse, main content only."""
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(html, main_content=True)


READERS = {
    "cozyrag": ours,
    "trafilatura": trafilatura,
    "trafilatura, favor_recall": trafilatura_recall,
    "trafilatura.html2txt": plain,
    "readability-lxml": readability,
    "resiliparse": resiliparse,
}


def row(name: str, pages: list[Page], read: Callable[[str], str]) -> str:
    """A row of the table: a reader on these pages."""
    kept, lost, beside, started = [], 0, [], time.perf_counter()
    for page in pages:
        try:
            found = words_of(read(page.html))
        except Exception as error:  # a library that fails keeps nothing
            print(f"{name}: {type(error).__name__}: {error}")
            found = Counter()
        kept.append((page.main & found).total() / page.main.total())
        lost += kept[-1] < 0.9
        beside.append((page.beside & (found - page.main)).total() / max(page.beside.total(), 1))
    spent = 1000 * (time.perf_counter() - started) / len(pages)
    share = f"{100 * sum(kept) / len(kept):.1f} % | {lost} of {len(pages)} | {100 * sum(beside) / len(beside):.1f} %"
    return f"| {name} | {share} | {spent:.1f} ms |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--details", action="store_true", help="one row for each kind of page")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    options = parser.parse_args()
    pages = [make(Writer(make.__name__, number)) for make in KINDS for number in range(5)]
    print("| reader | main text kept | lost pages | beside kept | time per page |\n|---|---|---|---|---|")
    for name in options.readers:
        READERS[name](pages[0].html)  # imports and compiles
        print(row(name, pages, READERS[name]))
        for kind in dict.fromkeys(page.kind for page in pages) if options.details else ():
            print(row(f"{name}: {kind}", [page for page in pages if page.kind == kind], READERS[name]))


if __name__ == "__main__":
    main()
