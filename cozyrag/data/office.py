"""Word processor files, slides, sheets, e-books and notebooks as articles, through pandoc and calamine.

pandoc runs as a process of its own: without access to files, with limited memory and time. Left out: old binary formats
of Word and PowerPoint, pictures, what pandoc does not show (comments, deleted text).
"""

import io
import re
import subprocess
import zipfile
from typing import Any

from cozyrag.data.outline import Article, Outline, missing_extra, name_as_title
from cozyrag.data.streams import InputFile, open_file, text_lines
from cozyrag.errors import InputError

ZIPPED = ("docx", "pptx", "odt", "epub")
WRITTEN = ("rst", "rtf", "org", "ipynb")  # text with marks
SHEETS = ("xlsx", "xls", "ods")
OFFICE = (*ZIPPED, *WRITTEN, *SHEETS)
MEMORY, SECONDS = "1G", 60  # of pandoc, for one file
UNPACKED = 1_000_000_000  # bytes
_FOOTNOTE_MARKS = re.compile(r'<a href="#fn\d+"[^>]*?class="footnote-ref".*?</a>|<a [^>]*?class="footnote-back".*?</a>')


def office_article(file: InputFile, format: str) -> Article:
    """Headings, slides and sheets start sections; the title is that in the file, its first heading, or its name.

    Raises InputError without pypandoc or python-calamine, and for a file that they cannot read.
    """
    if format in WRITTEN:
        raw = "".join(text_lines(file)).encode("utf-8")
    else:
        with open_file(file) as opened:
            raw = opened.read()
        if zipfile.is_zipfile(io.BytesIO(raw)):
            _check_size(file, raw)
    outline, name = Outline(), name_as_title(file.source)
    if format in SHEETS:
        _add_sheets(file, raw, outline)
        return outline.article(file.source, name, name)
    if raw.strip():
        outline.html(_pandoc(file, format, raw))
    return outline.article(file.source, None, name)


def _check_size(file: InputFile, raw: bytes) -> None:
    try:
        size = sum(each.file_size for each in zipfile.ZipFile(io.BytesIO(raw)).infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _unreadable(file, error) from error
    if size > UNPACKED:
        raise _unreadable(file, f"{size:,} bytes when unpacked, at most {UNPACKED:,} are read")


def _pandoc(file: InputFile, format: str, raw: bytes) -> str:
    """The body of the file as HTML."""
    try:
        import pypandoc

        program = pypandoc.get_pandoc_path()
    except (ImportError, OSError) as error:
        raise missing_extra(file.source, "pypandoc_binary", f"{format} files", "office") from error
    limits, form = ["+RTS", f"-M{MEMORY}", "-RTS", "--sandbox"], ["-t", "html", "--wrap=none", "-M", "date="]
    words = [program, *limits, "-s", "-f", format, *form]
    try:
        done = subprocess.run(words, input=raw, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _unreadable(file, f"no end after {SECONDS} seconds") from error
    if done.returncode:
        why = " ".join(done.stderr.decode("utf-8", "replace").split())
        raise _unreadable(file, why[:300] or f"pandoc ended with {done.returncode}")
    return _FOOTNOTE_MARKS.sub("", done.stdout.decode("utf-8", "replace").partition("<body>")[2])


def _add_sheets(file: InputFile, raw: bytes, outline: Outline) -> None:
    """Each sheet as a section, each row with a value as a line."""
    try:
        from python_calamine import CalamineError, CalamineWorkbook
    except ImportError as error:
        raise missing_extra(file.source, "python-calamine", "sheets", "office") from error
    try:
        book = CalamineWorkbook.from_filelike(io.BytesIO(raw))
        sheets = [(name, book.get_sheet_by_name(name).to_python()) for name in book.sheet_names]
    except CalamineError as error:
        raise _unreadable(file, error) from error
    for name, rows in sheets:
        outline.heading(1, name if len(sheets) > 1 else "")
        for row in rows:
            cells = [_cell(value) for value in row]
            outline.line(" | ".join(cells).strip(" |") if any(cells) else "")


def _cell(value: Any) -> str:
    """The text of a cell; numbers that are whole are written so."""
    return " ".join(str(int(value) if isinstance(value, float) and value.is_integer() else value).split())


def _unreadable(file: InputFile, why: object) -> InputError:
    return InputError(
        f"{file.source}: expected a file of its format, found one that cannot be read ({why}). Open and save it again."
    )
