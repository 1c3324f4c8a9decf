"""Markdown, HTML, plain text and PDF as titles and sections."""

import sys

import pytest

from cozyrag.data.documents import InputSource, read_document
from cozyrag.data.outline import name_as_title
from cozyrag.data.parsers import markdown_article, pdf_article, plain_article, unwrap
from cozyrag.data.web_pages import html_article
from cozyrag.errors import InputError


def test_markdown_headings_make_sections_and_the_first_one_is_the_title():
    text = (
        "# Rain barrels\n\nThey hold 200\nlitres.\n\n## Care\n\nClean *twice* a year.\n\n"
        "### Winter\nEmpty them.\n\n## Price\n40 euros"
    )
    article = markdown_article(text, "notes/barrel.md")
    assert article.title == "Rain barrels"
    assert article.sections == [
        ((), "They hold 200 litres."),
        (("Care",), "Clean twice a year."),
        (("Care", "Winter"), "Empty them."),
        (("Price",), "40 euros"),
    ]


def test_front_matter_gives_the_title_and_is_not_text():
    article = markdown_article("---\ntitle: The Barrel\ntags: [garden]\n---\nText.\n# Later\nMore.", "a.md")
    assert (article.title, article.sections) == ("The Barrel", [((), "Text."), (("Later",), "More.")])


@pytest.mark.parametrize("title", ["1.10", "12:30", "0123", "2024-02-31", "yes", "1e3", "null", "0x1F", "2001-12-14"])
def test_a_title_in_the_front_matter_stays_as_written(title):
    article = markdown_article(f"---\ntitle: {title}\ndate: 2023-02-30\n---\nText.", "a.md")
    assert (article.title, article.sections) == (title, [((), "Text.")])


def test_a_text_that_begins_with_a_horizontal_rule_is_kept():
    assert markdown_article("---\nFirst: [\n---\nText.", "a.md").sections[-1][1].endswith("Text.")


def test_without_a_heading_the_title_is_the_file_name():
    assert markdown_article("Just text.", "notes/my-old_barrel.md").title == "my old barrel"
    assert markdown_article("Text first.\n\n# Heading\nMore.", "a.md").title == "a"


def test_underlined_headings_and_rules():
    article = markdown_article("Title\n=====\nText.\n\nPart\n----\nMore.\n\n---\nEnd.", "a.md")
    assert (article.title, article.sections) == ("Title", [((), "Text."), (("Part",), "More.\nEnd.")])


@pytest.mark.parametrize(
    ("marked", "bare"),
    [
        ("See [the page](http://x.org) and [this][1].\n\n[1]: http://y.org 'Y'", "See the page and this."),
        ("![A *cat*](cat.png) sleeps.", "A cat sleeps."),
        ("[[Barrel|The barrel]] and ![[Pump]] and [[a_b#c]].", "The barrel and Pump and a_b#c."),
        ("**Bold**, __bold__, *thin*, _thin_ and ~~gone~~.", "Bold, bold, thin, thin and gone."),
        ("snake_case_name and 2 * 3 * 4 and \\*stars\\* stay.", "snake_case_name and 2 * 3 * 4 and *stars* stay."),
        ("Run `ls -l` now.", "Run ls -l now."),
        (
            "`<main>`, `Vec<String>`, `__init__`, ``a`b``, `[[ -f x ]]`",
            "<main>, Vec<String>, __init__, a`b, [[ -f x ]]",
        ),
        ("cd <your-folder> or Vec<String> stay", "cd <your-folder> or Vec<String> stay"),
        ("H<sub>2</sub>O and <b>bold</b>", "H2O and bold"),
        ("10<sup>6</sup> m<sup>2</sup>, the 19<sup>th</sup>, a<sup></sup>7", "10^6 m^2, the 19th, a7"),
        ("<https://x.org/a_b> <anna@example.org>", "https://x.org/a_b anna@example.org"),
        ("AT&amp;T if a < b and b > c", "AT&T if a < b and b > c"),
        ("first<br>second  \nthird\\\nfourth\nfifth", "first\nsecond\nthird\nfourth fifth"),
        ("a <!-- hidden --> b", "a  b"),
        ("<!-- hidden\n\nstill -->\n\nText.", "Text."),
        ("<div>\n<p>One.</p><!-- no -->\n<script>x</script><td>Two\n</div>", "One.\nTwo"),
        ("> quoted\n> twice\n>\n> > again", "quoted twice\nagain"),
        ("- one\n- two\n  lines\n\n  more\n  - deep\n3. [x] done", "- one\n- two lines\nmore\n- deep\n3. [x] done"),
        ("| a | b |\n|---|---|\n| 1 | [[x\\|y]] |\n| `c|d` | 2 |", "a | b\n1 | y\n`c | d` | 2"),
        ("[1]: http://x.org\nText.", "Text."),
        ("Said[^1].\n\n[^1]: Smith", "Said[^1].\n[^1]: Smith"),
        ("```html\n# no heading\n  <code>\n\n[[x]]\n```", "# no heading\n  <code>\n\n[[x]]"),
        ("~~~\n*a*", "*a*"),
        ("Text.\n\n    *code*\n      <b>", "Text.\n*code*\n  <b>"),
        (">" * 2000 + " deep", ">" * 2000 + " deep"),
        ("维也纳是奥地利的\n首都。", "维也纳是奥地利的首都。"),
    ],
    ids=lambda text: text[:12].encode("ascii", "replace").decode(),
)
def test_marks_are_removed(marked, bare):
    assert markdown_article(marked, "a.md").sections == [((), bare)]


def test_headings_in_html_and_in_lists_or_quotes():
    article = markdown_article(
        '<h1 align="center">Barrel</h1>\n\nText.\n\n> # Quoted\n\n- ## Listed\n\n#\n\n# Care', "a.md"
    )
    assert article.sections == [((), "Text.\nQuoted\n- Listed"), (("Care",), "")] and article.title == "Barrel"


def test_plain_text_is_unwrapped_if_lines_look_wrapped():
    prose = (
        "This line is long enough to have been wrapped by an\neditor, and so it goes on.\n\n"
        "Roses are red\nViolets are blue"
    )
    article = plain_article(prose, "poems/red_roses.txt")
    assert article.title == "red roses"
    assert article.sections[0][1].split("\n") == [
        "This line is long enough to have been wrapped by an editor, and so it goes on.",
        "Roses are red",
        "Violets are blue",
    ]


def test_chinese_lines_join_without_a_space():
    assert unwrap(["维也纳是奥地利的", "首都。"]) == "维也纳是奥地利的首都。"
    assert unwrap(["Wien", "ist"]) == "Wien ist"


def test_html_leaves_out_navigation_and_scripts():
    pytest.importorskip("trafilatura")
    page = """<!doctype html><html><head><title>Barrel - My site</title><style>p {}</style></head><body>
    <nav><ul><li>Home</li></ul></nav><h1>Rain &amp; barrels</h1><p>They hold <b>200</b> litres.<br>Or more.</p>
    <script>if (a < b) { alert("x") }</script><h2>Care</h2><ul><li>Clean.<li>Empty.</ul>
    <table><tr><td>Price</td><td>40</td></tr></table><footer>Imprint</footer></body></html>"""
    article = html_article(page, "a.html")
    assert article.title == "Rain & barrels"
    assert article.sections == [((), "They hold 200 litres.\nOr more."), (("Care",), "Clean.\nEmpty.\nPrice | 40")]


def test_html_without_a_single_top_heading_takes_its_title():
    pytest.importorskip("trafilatura")
    assert html_article("<title>The Site</title><h1>A</h1><p>x</p><h1>B</h1><p>y</p>", "a.html").title == "The Site"
    assert html_article("<p>Only this.", "my-page.html").title == "my page"


FOX, OWL = "The fox lives in the old forest behind the mill.", "The owl sleeps in the tower of the church by day."


@pytest.mark.parametrize(
    "page",
    [
        f"<form action=a.aspx><input type=hidden value=x><h1>T</h1><p>{FOX}</p><h2>H</h2><p>{OWL}</p></form>",
        f"<div><h1>T</h1><div><p>{FOX}</p><aside>Also</div><h2>H</h2><p>{OWL}</p></div>",
        f"<h1>T</h1><p>{FOX} <select name=y><option>2023<option>2024</p><h2>H</h2><p>{OWL}</p>",
        f"<nav><h1>T</h1><p>{FOX}</p><h2>H</h2><p>{OWL}</p></nav>",
        f"<table><tr><td>Menu</td><td><h1>T</h1>{FOX}<br><h2>H</h2>{OWL}</td></tr></table>",
        f"<h1>T<p>{FOX}<h2>H</h2><div><div>{OWL}",
        f"<?xml version='1.0' encoding='utf-8'?><html><body><h1>T</h1><p>{FOX}</p><h2>H</h2>\0<p>{OWL}</p>",
        f"<h1>T</h1><section><p>{FOX}</p></section><footer>Imprint</footer><section><h2>H</h2>{OWL}</section>",
        "<div>" * 3000 + f"<h1>T</h1>{FOX}<h2>H</h2>{OWL}",
        f"<h1>T</h1><details><summary>{FOX}</summary><h2>H</h2><p>{OWL}</p></details>",
        f"<h1>T\1</h1><p>{FOX}\x1f<p>&#2;</p><h2>H</h2><template></template>{OWL}",
        "<table>" * 3000 + f"<h1>T</h1>{FOX}<h2>H</h2>{OWL}",
        f"<h1>T</h1><p>{FOX}</p><table><tr>{'<td>x' * 5000}</table><h2>H</h2>{OWL}",
    ],
    ids="form aside select nav layout unclosed xml sections deep details control tables cells".split(),
)
def test_html_keeps_its_main_text_under_its_headings(page):
    pytest.importorskip("trafilatura")
    sections = html_article(page, "a.html").sections
    assert any(FOX in text for path, text in sections if path != ("H",))
    assert any(OWL in text for path, text in sections if path[-1:] == ("H",))


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("10<sup>6</sup> litres", "10^6 litres"),
        ("here<sup><a href=#1>1</a></sup>.", "here^1."),
        ("the 19<sup>th</sup> day", "the 19th day"),
        ("a<sup>x</sup>5 b<sup></sup>7", "ax5 b7"),
        ("H<sub>2</sub>O", "H2O"),
    ],
)
def test_raised_numbers_stay_apart_from_the_number_before(page, text):
    pytest.importorskip("trafilatura")
    assert html_article(f"<p>{page}</p>", "a.html").sections == [((), text)]
    menu = "<div class=comments><p>By the way, the pump is blue.</p></div>"
    around = f"<article><h1>T</h1><p>{FOX} {OWL}</p><p>{page}</p><p>{OWL} {FOX}</p></article>{menu}"
    assert text in html_article(around, "a.html").sections[0][1].split("\n")


def test_html_tables_code_and_terms_have_lines_of_their_own():
    pytest.importorskip("trafilatura")
    page = (
        f"<h1>T</h1><p>{FOX}</p><pre>a = 1\n  b</pre><table><tr><th>A</th><th>B</th></tr><tr><td><p>1</p></td><td>2"
        f"<br>3</td></tr></table><dl><dt>Term</dt><dd>{OWL}</dd></dl><ul><li>x <code>y_z</code> <b>b</b>c<li>w</ul>"
    )
    lines = html_article(page, "a.html").sections[0][1].split("\n")
    assert lines == [FOX, "a = 1", "  b", "A | B", "1 | 2 3", "Term", OWL, "x y_z bc", "w"]


@pytest.mark.parametrize("page", ["", " ", "<!-- nothing -->", "<html><body></body>", "<script>x</script>", "\0"])
def test_an_empty_page_has_no_text(page):
    pytest.importorskip("trafilatura")
    article = html_article(page, "my-page.html")
    assert (article.title, "".join(text for _, text in article.sections)) == ("my page", "")


@pytest.mark.parametrize("package", ["trafilatura", "w3lib.encoding", "lxml"])
def test_without_the_packages_a_web_page_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.html").write_text(FOX)
    with pytest.raises(InputError, match=r'pip install "cozyrag\[web\]"'):
        read_document(InputSource(str(tmp_path / "a.html"), "html"))


@pytest.mark.parametrize(
    ("label", "encoding", "text"),
    [
        ('<meta charset="iso-8859-1">', "cp1252", "“Vienna” – 5 €…"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=us-ascii">', "cp1252", "café “x”"),
        ('<meta charset="gb2312">', "gb18030", "朱镕基和水泵在广场上。"),
        ('<meta charset="Shift_JIS">', "cp932", "①村のポンプ㈱です。"),
        ('<?xml version="1.0" encoding="iso-8859-2"?>', "iso8859-2", "Łódź i żółć"),
        ('<meta charset="euc-kr">', "cp949", "똠방각하 펌프"),
        ('<meta charset="windows-1251">', "cp1251", "Насос за домом"),
        ("", "cp1251", "Насос за домом качает воду из колодца."),
        ('<meta charset="utf-8">', "cp1251", "Насос за домом качает воду из колодца."),
        ('<meta charset="iso-8859-1">', "utf-8-sig", "Größe “x”"),
        ("", "utf-16", "Größe und Breite"),
        ("", "utf-16-le", "Gr\u00f6\u00dfe und Breite der neuen Br\u00fccke"),
    ],
)
def test_labels_of_web_pages_mean_what_they_mean_to_browsers(tmp_path, label, encoding, text):
    pytest.importorskip("w3lib")
    (tmp_path / "a.html").write_bytes(f"{label}<html><body><p>{text}</p></body></html>".encode(encoding))
    notes = []
    assert read_document(InputSource(str(tmp_path / "a.html"), "html"), notes.append).sections == [((), text)]
    assert len(notes) == (encoding == "utf-16-le" or (encoding == "cp1251" and "windows" not in label))


def test_characters_that_are_lost_are_noted(tmp_path):
    pytest.importorskip("w3lib")
    (tmp_path / "a.html").write_bytes("<meta charset=utf-8><p>größer, schöner ".encode() + b"\xff\xfe</p>")
    notes = []
    assert "\ufffd" in read_document(InputSource(str(tmp_path / "a.html"), "html"), notes.append).sections[0][1]
    assert notes == [f"{tmp_path / 'a.html'}: 2 characters could not be read as utf-8 and became \ufffd"]


def make_pdf(path, *pages, title=None):
    """A minimal PDF: pages of lines, one font, text at the left."""
    numbers = range(5, 5 + 2 * len(pages), 2)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{' '.join(f'{number} 0 R' for number in numbers)}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        f"<< /Title ({title}) >>" if title else "<< >>",
    ]
    for number, lines in zip(numbers, pages, strict=True):
        text = "BT /F1 12 Tf 50 700 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {number + 1} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(text)} >>\nstream\n{text}\nendstream",
        ]
    out, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    out += (
        f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer\n"
        f"<< /Size {len(places) + 1} /Root 1 0 R /Info 4 0 R >>\n"
        f"startxref\n{len(out)}\n%%EOF\n"
    )
    path.write_bytes(out.encode("latin-1"))
    return str(path)


def test_pdf_lines_and_hyphenated_words_are_joined(tmp_path):
    pytest.importorskip("pypdf")
    path = make_pdf(tmp_path / "old-barrel.pdf", ["A barrel for rain that stands behind the old gar-", "den house."])
    article = pdf_article(path, "old-barrel.pdf")
    assert article.title == "old barrel"
    assert article.sections == [((), "A barrel for rain that stands behind the old garden house.")]
    assert pdf_article(make_pdf(tmp_path / "b.pdf", ["x"], title="Named"), "b.pdf").title == "Named"


@pytest.mark.parametrize(
    ("pages", "text", "begins"),
    [
        ([["A fox."], ["An owl."], ["An elk."]], "A fox.\nAn owl.\nAn elk.", (0, 5, 11)),
        ([["A fox is in the gar-"], ["den."]], "A fox is in the garden.", (0, 14)),  # the hyphen belongs to no page
        ([[], ["A fox."], [], ["An elk."]], "A fox.\nAn elk.", (0, 0, 5, 5)),  # pages without text
        ([[]], "", (0,)),
    ],
)
def test_the_pages_of_a_pdf_begin_where_their_text_does(tmp_path, pages, text, begins):
    pytest.importorskip("pypdf")
    article = pdf_article(make_pdf(tmp_path / "a.pdf", *pages), "a.pdf")
    assert (article.sections[0][1], article.pages) == (text, begins)


def test_a_broken_pdf_is_named(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "a.pdf").write_bytes(b"no pdf at all")
    with pytest.raises(InputError, match=r"^a.pdf: expected a PDF"):
        pdf_article(str(tmp_path / "a.pdf"), "a.pdf")


def test_an_encrypted_pdf_without_cryptography_names_the_extra(tmp_path, monkeypatch):
    pypdf = pytest.importorskip("pypdf")

    def fail(*_):
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf, "PdfReader", fail)
    with pytest.raises(InputError, match=r"^a.pdf: .*cryptography to read an encrypted PDF.*cozyrag\[pdf\]"):
        pdf_article(str(tmp_path / "a.pdf"), "a.pdf")


def test_names_become_titles():
    assert name_as_title("x/2024-05-01_rain  barrel.final.md") == "2024 05 01 rain barrel.final"


def test_a_broken_declaration_within_markdown_is_no_fault():
    article = markdown_article("# Pump\n\n<![CD\x05TA[ one\n\nIt stands here.", "a.md")
    assert article.title == "Pump" and "It stands here." in article.sections[0][1]


def test_control_characters_in_a_page_are_no_fault():
    page = "<body>&#1;<h1>Pump</h1><nav>Home</nav>\x13&#2;<p>It stands on the square.</p><style>p {}</style>\x01</body>"
    article = html_article(page, "a.html")
    assert article.title == "Pump" and "It stands on the square." in str(article) and "Home" not in str(article)
