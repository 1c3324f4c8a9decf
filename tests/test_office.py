"""Word processor files, slides, sheets, e-books and notebooks: words and headings kept, broken ones one named row."""

import io
import subprocess
import sys
import zipfile

import pytest

from cozyrag.data import office
from cozyrag.data.documents import InputSource, read_document
from cozyrag.errors import InputError

TEXT = """---
title: Village pumps
---

# Pumps

The pump stands **beside** the mill; 10^6^ litres a year[^1].

## Care

- Clean `x_y`
- Paint it

| Part | Price |
|------|-------|
| Lid  | 7     |

[^1]: Measured in 1974.
"""
pandoc = pytest.importorskip("pypandoc")
pytest.importorskip("python_calamine")


def made(path, format, text=TEXT):
    """A file of that format, written by pandoc."""
    program = pandoc.get_pandoc_path()
    words = [program, "-f", "markdown", "-t", format, "-s", "-o", str(path)]
    subprocess.run(words, input=text.encode(), check=True)
    return str(path)


def read(path, format):
    return read_document(InputSource(str(path), format))


@pytest.mark.parametrize("format", ["docx", "odt", "epub", "ipynb", "rst", "rtf", "org", "pptx"])
def test_words_and_headings_are_kept(tmp_path, format):
    article = read(made(tmp_path / f"a.{format}", format), format)
    text = " ".join([article.title, *(word for path, body in article.sections for word in (*path, body))])
    for words in ("Pumps", "beside the mill; 10", "litres a year", "Clean x_y", "Paint it", "Part | Price", "Lid | 7"):
        assert words in text, words
    assert "Measured in 1974" in text or format == "rtf"  # which pandoc writes without footnotes
    assert any(path[-1:] == ("Care",) for path, _ in article.sections) or format == "pptx"
    assert "10^6 litres a year." in text or format in ("rtf", "pptx", "ipynb", "odt", "docx")


NAMES = "http://schemas.openxmlformats.org"
MAIN = f"{NAMES}/spreadsheetml/2006/main"


def sheet(*rows):
    cells = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{cell}</t></is></c>' for cell in row) + "</row>" for row in rows
    )
    return f'<worksheet xmlns="{MAIN}"><sheetData>{cells}</sheetData></worksheet>'


def workbook(path, sheets):
    """A minimal .xlsx file with absolute targets, as openpyxl writes them."""
    kind = f"{NAMES}/officeDocument/2006/relationships"
    names = "".join(f'<sheet name="{name}" sheetId="{i}" r:id="r{i}"/>' for i, name in enumerate(sheets, 1))
    links = "".join(
        f'<Relationship Id="r{i}" Type="{kind}/worksheet" Target="/xl/worksheets/sheet{i}.xml"/>'
        for i in range(1, len(sheets) + 1)
    )
    book = f'<workbook xmlns="{MAIN}" xmlns:r="{kind}"><sheets>{names}</sheets></workbook>'
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("[Content_Types].xml", f'<Types xmlns="{NAMES}/package/2006/content-types"/>')
        file.writestr("xl/workbook.xml", book)
        root = f'<Relationship Id="r0" Type="{kind}/officeDocument" Target="/xl/workbook.xml"/>'
        for place, entries in (("_rels/.rels", root), ("xl/_rels/workbook.xml.rels", links)):
            relations = f'<Relationships xmlns="{NAMES}/package/2006/relationships">{entries}</Relationships>'
            file.writestr(place, relations)
        for i, text in enumerate(sheets.values(), 1):
            file.writestr(f"xl/worksheets/sheet{i}.xml", text)
    return path


def test_sheets_become_sections_and_rows_become_lines(tmp_path):
    path = workbook(tmp_path / "old-prices.xlsx", {"Parts": sheet(["Part", "Price"], ["Lid", "7"]), "Öl": sheet(["x"])})
    article = read(path, "xlsx")
    assert article.title == "old prices"
    assert article.sections == [(("Parts",), "Part | Price\nLid | 7"), (("Öl",), "x")]
    alone = workbook(tmp_path / "b.xlsx", {"Sheet1": sheet(["Part", "", "Price"])})
    assert read(alone, "xlsx").sections == [((), "Part |  | Price")]


@pytest.mark.parametrize(("value", "text"), [(7.0, "7"), (7.5, "7.5"), ("a\n b", "a b"), (True, "True"), ("", "")])
def test_cells_are_written_as_they_look(value, text):
    assert office._cell(value) == text


@pytest.mark.parametrize("format", office.OFFICE)
@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 cut", b"\x93\x81\x00\xff\x00", b"{", b""], ids=["zip", "binary", "text", "empty"]
)
def test_a_broken_file_is_named_or_read_as_text(tmp_path, format, content):
    (tmp_path / f"a.{format}").write_bytes(content)
    try:
        assert read(tmp_path / f"a.{format}", format).title == "a"
    except InputError as error:
        assert str(error).startswith(str(tmp_path / f"a.{format}"))


def test_a_written_format_may_be_in_another_encoding(tmp_path):
    (tmp_path / "a.rst").write_bytes("Pump\n====\n\nThe smith’s pump – “old”.\n".encode("cp1252"))
    assert read(tmp_path / "a.rst", "rst").sections == [((), "The smith’s pump – “old”.")]


@pytest.mark.parametrize("format", ["docx", "xlsx", "epub"])
def test_a_file_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch, format):
    monkeypatch.setattr(office, "UNPACKED", 1_000_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("word/document.xml", b" " * 2_000_000)
    (tmp_path / "a.zip").rename(tmp_path / f"a.{format}")
    with pytest.raises(InputError, match="2,000,000 bytes when unpacked, at most 1,000,000"):
        read(tmp_path / f"a.{format}", format)


@pytest.mark.parametrize(
    ("name", "value", "why"), [("SECONDS", 0.001, "no end after"), ("MEMORY", "1m", "cannot be read")]
)
def test_time_and_memory_of_a_file_are_limited(tmp_path, monkeypatch, name, value, why):
    path = made(tmp_path / "a.docx", "docx", TEXT + "word " * 50_000)
    monkeypatch.setattr(office, name, value)
    with pytest.raises(InputError, match=why):
        read(path, "docx")


@pytest.mark.parametrize(
    ("package", "format"), [("pypandoc", "docx"), ("pypandoc", "org"), ("python_calamine", "xlsx")]
)
def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch, package, format):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"a.{format}").write_bytes(b"text")
    with pytest.raises(InputError, match=r'pip install "cozyrag\[office\]"'):
        read(tmp_path / f"a.{format}", format)


def test_files_are_not_reached_from_within_a_file(tmp_path):
    (tmp_path / "secret.txt").write_text("hidden words")
    (tmp_path / "a.rst").write_text(f"Pump\n====\n\n.. include:: {tmp_path / 'secret.txt'}\n\nOpen words.\n")
    try:
        assert "hidden" not in str(read(tmp_path / "a.rst", "rst").sections)
    except InputError as error:
        assert "hidden" not in str(error)


def test_a_zip_that_cannot_be_listed_is_named():
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("a", "b")
    with pytest.raises(InputError, match="cannot be read"):
        office._check_size(office.InputFile("a.docx", "a.docx"), raw.getvalue()[:-10] + b"\xff" * 10)
