"""Test every reader, the prompts and the settings file with thousands of broken inputs.

    python tests/fuzz_run.py --inputs 10000
    python tests/fuzz_run.py --inputs 2000 --only parquet yaml

Every input must be read or refused with an InputError: any other exception, more than LONGEST seconds, or a row that is
neither kept nor reported is a failure. Rows are counted here from what was written, not by the code under test.
Hypothesis draws the inputs: arbitrary bytes, damaged files, and rows of the right shape with the wrong contents.
test_fuzz.py draws a few in every test run. Left out: the Hub, and the later use of the rows.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)
for folder in (Path(__file__).parents[1], Path(__file__).parent):
    sys.path.insert(0, str(folder))

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import tiny  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.strategies import SearchStrategy  # noqa: E402

from cozyrag.config import KINDS, parse_settings  # noqa: E402
from cozyrag.data.documents import InputSource, read_container, read_document  # noqa: E402
from cozyrag.data.ingest_worker import one_bad_row  # noqa: E402
from cozyrag.data.passages import read_passages  # noqa: E402
from cozyrag.data.questions import read_questions  # noqa: E402
from cozyrag.data.readers import read_rows  # noqa: E402
from cozyrag.data.rows import BadRows  # noqa: E402
from cozyrag.errors import InputError  # noqa: E402
from cozyrag.models.generator import Generator  # noqa: E402
from cozyrag.models.prompts import encode_examples, with_keywords  # noqa: E402

LONGEST = 20  # seconds of the processor for one input of a few kilobytes
WAITED = 6 * LONGEST  # seconds on the clock: the machine may be busy
COLUMNS = ("question", "answers", "context", "title", "id", "passage_id", "text")
HEADERLESS = ("question", "answers")


# ---- checks of every reader


class TooLong(Exception):
    """An input that takes too long."""


def _too_long(number, frame) -> None:
    raise TooLong(f"more than {LONGEST} s of the processor, or {WAITED} s in all")


def in_time(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """The check with a time limit."""

    def timed(drawn) -> None:
        signal.signal(signal.SIGALRM, _too_long)
        signal.signal(signal.SIGPROF, _too_long)
        signal.alarm(WAITED)
        signal.setitimer(signal.ITIMER_PROF, LONGEST)
        try:
            check(drawn)
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)

    return timed


def taken(read: Callable[[], Any]) -> Any:
    """The result, or None if it was refused with a printable message of limited length."""
    try:
        return read()
    except InputError as error:
        printable(str(error))
        return None


def printable(message: str) -> None:
    """A message must be valid UTF-8 and not too long."""
    message.encode("utf-8")
    assert len(message) < 20_000, f"a message of {len(message)} characters"


def reported(report: str | None) -> int:
    """The number of skipped rows in a report."""
    printable(report or "")
    found = re.search(r": (\d+) rows? skipped: ", report or "")
    return int(found.group(1)) if found else 0


def check_tables(path: Path, rows: set[int] | None) -> None:
    """Read a file with all readers; `rows`: the possible numbers of rows in it, None if unknown."""
    bad = BadRows()
    read = taken(lambda: list(read_rows(str(path), known=COLUMNS, headerless=lambda _: HEADERLESS, bad=bad)))
    if read is not None:
        for words in bad.first:
            printable(words)
        total = len(read) + bad.count
        assert rows is None or total in rows, f"{rows} rows in the file, {len(read)} read and {bad.count} reported"
        rows = {total}
    # Whether the first line of a TSV is a header depends on the known columns.
    unnamed = int(".tsv" in path.name)
    questions = taken(lambda: read_questions(str(path), needs_answer=False, skip_bad_rows=True))
    if questions is not None:
        kept = len(questions.table) + reported(questions.report)
        turns = b'"story"' in path.read_bytes()  # a row holds several questions
        assert rows is None or {kept, kept - unnamed} & rows or (turns and kept > min(rows)), (
            f"{rows} rows in the file, {len(questions.table)} questions and {questions.report}"
        )
    found = taken(lambda: read_passages(str(path), skip_bad_rows=True))
    if found is not None:
        kept = len(found[0]) + reported(found[1])
        assert rows is None or {kept, kept + unnamed} & rows, (
            f"{rows} rows in the file, {len(found[0])} passages and {found[1]}"
        )
        strict = taken(lambda: read_passages(str(path)))
        assert (strict is None) == (reported(found[1]) > 0)


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# ---- inputs


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates too
PLAIN = st.text(max_size=12)
NESTED = st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**30, 10**40), st.floats(), ANY_TEXT, st.just("Who?")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(PLAIN, inner, max_size=2), st.fixed_dictionaries({"text": inner})
    ),
    max_leaves=6,
)
NAMES = st.one_of(st.sampled_from(COLUMNS), ANY_TEXT)
OBJECTS = st.one_of(
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.fixed_dictionaries({"question": ANY_TEXT, "answers": VALUES, "text": ANY_TEXT}),
    st.fixed_dictionaries({"question": PLAIN, "answers": st.lists(PLAIN), "text": PLAIN, "context": PLAIN}),
)
PIECES = [
    *(b"question", b"answers", b"text", b"\t", b",", b'"', b"\n", b"\r", b"\r\n", b"\0", b"{", b"}", b"[", b"]", b":"),
    *(b"\xef\xbb\xbf", b"\xff", b"1", b"NaN", b" ", b"\\", b"\xe2\x80\xa8"),
]
BYTES = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=200).map(lambda text: text.encode("utf-8")),
    st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join),
)


@dataclass(frozen=True)
class Case:
    """A file's name and bytes, and the possible numbers of its rows (None: unknown)."""

    name: str
    content: bytes
    rows: set[int] | None = None


def bare(name: str) -> SearchStrategy[Case]:
    """Arbitrary bytes under that name, also packed, also packed and cut short."""
    packed = st.tuples(BYTES, st.integers(0, 40), st.sampled_from([(".gz", gzip.compress), (".bz2", bz2.compress)]))
    return st.one_of(
        BYTES.map(lambda content: Case(name, content)),
        packed.map(lambda drawn: Case(name + drawn[2][0], drawn[2][1](drawn[0])[: -drawn[1] or None])),
    )


def damaged(case: Case, places: list[tuple[float, int]], kept: float) -> Case:
    """Some bytes of a file replaced, and its end cut off."""
    content = bytearray(case.content)
    for place, byte in places if content else ():
        content[int(place * (len(content) - 1))] = byte
    return Case(case.name, bytes(content[: int(kept * len(content))]))


def with_damage(cases: SearchStrategy[Case]) -> SearchStrategy[Case]:
    place = st.tuples(st.floats(0, 1), st.integers(0, 255))
    kept = st.one_of(st.just(1.0), st.floats(0, 1))
    return st.builds(damaged, cases, st.lists(place, min_size=1, max_size=4), kept)


CELL = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=10),
    st.sampled_from(["", " ", "Who?", "1815", '"', "a\nb"]),
)
ROWS = st.lists(st.lists(CELL, min_size=1, max_size=4), max_size=6)
HEADERS = st.lists(st.sampled_from([*COLUMNS, "Question", " TEXT "]), min_size=1, max_size=4, unique=True)


def as_csv(header: list[str], rows: list[list[str]]) -> Case:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return Case("table.csv", text.getvalue().encode("utf-8"), {sum(any(map(str.strip, row)) for row in rows)})


def as_tsv(header: list[str] | None, rows: list[list[str]]) -> Case:
    """Cells of one line each; a line without text is no row; cells that begin with a quote mark may be quoted."""
    clean = [[re.sub(r"[\t\n\r]", " ", cell) for cell in row] for row in rows]
    lines = ["\t".join(row) for row in ([header] if header else []) + clean]
    rows_in = sum(bool(line.strip()) for line in lines)
    plain = not any(cell.startswith('"') for row in clean for cell in row)
    counts = {rows_in - 1, rows_in} if header else {rows_in}
    return Case("table.tsv", "\n".join(lines).encode("utf-8"), counts if plain else None)


def lines_of(content: bytes) -> int:
    """Lines with something in them."""
    return sum(bool(line.decode("utf-8", "replace").removeprefix("\ufeff").strip()) for line in content.split(b"\n"))


def as_jsonl(lines: list[str]) -> Case:
    content = "\n".join(lines).encode("utf-8")
    return Case("table.jsonl", content, {lines_of(content)})


def as_json(rows: list[Any]) -> Case:
    return Case("table.json", json.dumps(rows).encode("utf-8"), {len(rows)})


def as_squad(articles: list[Any]) -> Case:
    """Every question counts, or every object without paragraphs; a file with a broken layout is refused as a whole."""
    flat = all(isinstance(article, dict) and "paragraphs" not in article for article in articles)
    rows = (
        len(articles)
        if flat
        else sum(
            len(paragraph["qas"])
            for article in articles
            if isinstance(article, dict) and isinstance(article.get("paragraphs"), list)
            for paragraph in article["paragraphs"]
            if isinstance(paragraph, dict) and isinstance(paragraph.get("qas"), list)
        )
    )
    return Case("table.json", json.dumps({"version": "v2.0", "data": articles}).encode("utf-8"), {rows})


TITLED = st.fixed_dictionaries({"title": SCALARS, "text": ANY_TEXT})
TURNS = st.lists(st.fixed_dictionaries({"input_text": SCALARS, "turn_id": st.integers(1, 3) | VALUES}), max_size=3)
# The keys of known data sets, with parts of their form; with_odd_parts breaks them.
KNOWN_LAYOUTS = {
    "kilt": {"input": PLAIN, "output": st.lists(st.fixed_dictionaries({"answer": SCALARS, "provenance": VALUES}))},
    "hotpot": {
        "question": PLAIN,
        "answer": SCALARS,
        "context": st.lists(st.tuples(PLAIN, st.lists(PLAIN, max_size=2)).map(list), max_size=3),
        "supporting_facts": st.lists(st.tuples(PLAIN, st.integers(0, 2)).map(list), max_size=2),
    },
    "hotpot_hub": {
        "question": PLAIN,
        "answer": SCALARS,
        "context": st.fixed_dictionaries({"title": st.lists(PLAIN, max_size=2), "sentences": st.lists(VALUES)}),
        "supporting_facts": st.fixed_dictionaries({"title": st.lists(PLAIN), "sent_id": st.lists(SCALARS)}),
    },
    "trivia": {"Question": PLAIN, "Answer": st.fixed_dictionaries({"Value": SCALARS, "Aliases": VALUES})},
    "trivia_hub": {"question": PLAIN, "answer": st.fixed_dictionaries({"value": SCALARS, "aliases": VALUES})},
    "coqa": {"id": SCALARS, "story": PLAIN, "questions": TURNS, "answers": TURNS, "additional_answers": VALUES},
    "boolq": {"question": PLAIN, "answer": st.booleans(), "passage": st.just("two words") | VALUES},
    "dpr": {
        "question": PLAIN,
        "answers": st.lists(PLAIN),
        "positive_ctxs": st.lists(TITLED, max_size=2),
        "hard_negative_ctxs": st.lists(TITLED, max_size=2),
    },
    "written": {
        "question": PLAIN,
        "answers": st.one_of(
            VALUES.map(repr), VALUES.map(json.dumps), st.sampled_from(["['a' 'b']", "[1] x", "{'a'}"])
        ),
    },
    "negatives": {"question": PLAIN, "answers": PLAIN, "negative_ids": VALUES, "passage_id": SCALARS},
}


@st.composite
def layout_files(draw) -> Case:
    """Rows of one layout, some with parts of another form, as JSON lines or as the list in an object."""
    keys = KNOWN_LAYOUTS[draw(st.sampled_from(sorted(KNOWN_LAYOUTS)))]
    rows = draw(st.lists(st.fixed_dictionaries({key: one | VALUES for key, one in keys.items()}), max_size=3))
    if draw(st.booleans()):
        return as_jsonl([json.dumps(row) for row in rows])
    name = draw(st.sampled_from(["data", "Data"]))
    return Case("table.json", json.dumps({"version": "1", name: rows}).encode("utf-8"), {len(rows)})


QAS = st.lists(
    st.one_of(OBJECTS, VALUES, st.fixed_dictionaries({"id": PLAIN, "question": PLAIN, "answers": VALUES})), max_size=3
)
PARAGRAPHS = st.lists(st.one_of(st.fixed_dictionaries({"context": ANY_TEXT, "qas": QAS}), VALUES), max_size=2)
ARTICLES = st.lists(st.one_of(st.fixed_dictionaries({"title": SCALARS, "paragraphs": PARAGRAPHS}), VALUES), max_size=2)


TYPES = st.sampled_from(
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.int64(),
        pa.float64(),
        pa.bool_(),
        pa.binary(),
        pa.list_(pa.string()),
        pa.timestamp("us"),
        pa.timestamp("ns"),
        pa.timestamp("us", "Mars/Olympus"),
        pa.date64(),
        pa.duration("s"),
        pa.dictionary(pa.int32(), pa.string()),
        pa.map_(pa.string(), pa.string()),
        pa.struct([("text", pa.list_(pa.string()))]),
        pa.decimal128(20, 3),
        pa.null(),
    ]
)


@st.composite
def parquet_files(draw) -> Case:
    """Columns of any type; times come from arbitrary integers, so that some are outside the range of Python."""
    count = draw(st.integers(0, 4))
    names = draw(st.lists(st.one_of(st.sampled_from(COLUMNS), PLAIN), min_size=1, max_size=3))
    columns = [_column(draw, draw(TYPES), count) for _ in names]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, names=names), file, store_schema=draw(st.booleans()))
    return Case("table.parquet", file.getvalue(), {count})


def _column(draw, kind: pa.DataType, count: int) -> pa.Array:
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind) or pa.types.is_date64(kind):
        wide = st.integers(-(2**62), 2**62)
        days = 86_400_000 if pa.types.is_date64(kind) else 1
        return pa.array([draw(wide) // days * days for _ in range(count)], pa.int64()).view(kind)
    if pa.types.is_string(kind) and draw(st.booleans()):
        raw = pa.array([draw(st.binary(max_size=6)) for _ in range(count)], pa.binary())
        return pa.Array.from_buffers(pa.string(), count, raw.buffers())  # text that may not be UTF-8
    fitting = {
        pa.int64(): st.integers(-(2**63), 2**63 - 1),
        pa.float64(): st.floats(),
        pa.bool_(): st.booleans(),
        pa.binary(): st.binary(max_size=6),
        pa.list_(pa.string()): st.lists(PLAIN, max_size=2),
        pa.map_(pa.string(), pa.string()): st.lists(st.tuples(PLAIN, PLAIN), max_size=2),
        pa.struct([("text", pa.list_(pa.string()))]): st.fixed_dictionaries({"text": st.lists(PLAIN, max_size=2)}),
        pa.decimal128(20, 3): st.decimals(-1000, 1000, places=3),
        pa.null(): st.none(),
    }
    return pa.array([draw(st.none() | fitting.get(kind, PLAIN)) for _ in range(count)], kind)


OPEN = st.one_of(
    st.builds(
        '<doc id="{}" url="u" title="{}">'.format,
        st.integers(0, 9),
        st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    ),
    st.sampled_from(
        [
            '<doc title="A">',
            '<doc id="1" title="">',
            '<doc id="1" url="x">',
            "<doc ",
            "<doc >",
            '<doc title=">',
            '<doc title="a" x="b">',
        ]
    ),
    st.integers(1, 3000).map(lambda times: "<doc " + 'title="' * times),
)
WIKI_LINE = st.one_of(
    OPEN,
    st.just("</doc>"),
    st.just("text </doc>"),
    st.just(""),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20),
)
WIKI = st.one_of(
    st.lists(WIKI_LINE, max_size=10).map(lambda lines: Case("wiki_00", "\n".join(lines).encode("utf-8"))),
    bare("wiki_00"),
)


WORD = st.integers(0, 99).map("w{}".format)
MARKDOWN_PIECES = [
    *(
        "# ",
        "### ",
        "- ",
        "* ",
        "1. ",
        "> ",
        "    ",
        "\t",
        "  ",
        "**",
        "*",
        "_",
        "~~",
        "`",
        "```",
        "~~~",
        "[",
        "]",
        "](x)",
    ),
    *(
        "![",
        "[[",
        "]]",
        "|",
        "\n|---|---|\n",
        "---\n",
        "===\n",
        "+++",
        "<!--",
        "-->",
        "<b>",
        "<div>\n",
        "</div>",
        "<w1>",
    ),
    *(
        "<script>",
        "<pre>",
        "<?php",
        "<![CDATA[",
        "&amp;",
        "&#xD800;",
        "&#0;",
        "\\",
        "\n",
        "\n\n",
        "  \n",
        "[^1]",
        "[^1]: ",
    ),
    *("[a]: ", "title: ", "\r", "\r\n", "\u2028", "\ufeff", "\x0c", "<https://x.org>", "维也纳", "((", "!", "="),
]
MARKDOWN = st.lists(st.one_of(WORD, WORD, st.sampled_from(MARKDOWN_PIECES), PLAIN), max_size=60).map(" ".join)
REPEATED = st.builds(lambda piece, times: piece * times, st.sampled_from(MARKDOWN_PIECES), st.integers(1, 2000))
HTML_TAGS = (
    "html head title body h1 h2 h6 p div span br hr a b i code pre ul ol li dl dt dd table tr td th tbody thead nav"
    " footer aside main article section form select option button script style template noscript svg math iframe"
    " textarea sup blockquote details summary img input meta frameset frame plaintext xmp x-y"
).split()
HTML_PIECES = st.one_of(
    WORD,
    st.sampled_from(HTML_TAGS).map("<{}>".format),
    st.sampled_from(HTML_TAGS).map("</{}>".format),
    st.sampled_from(
        ['<div class="comment">', '<a href="x', "<!--", "-->", "<![CDATA[", "<!doctype html>", "&amp;", "&#xD800;"]
    ),
    st.sampled_from(
        ["&#0;", "&#x110000;", "<?xml version='1.0' encoding='x'?>", "<meta charset=utf-16>", "\0", "\n", "<", ">"]
    ),
    st.sampled_from(
        ["<meta charset=shift_jis>", "<meta charset=iso-2022-jp>", "\ufeff", "\x0c", "<svg/onload>", "<td colspan=9>"]
    ),
    PLAIN,
)
HTML = st.lists(HTML_PIECES, max_size=60).map("".join)
LONG_HTML = st.builds(
    lambda tag, times, word: f"<{tag}>" * times + word, st.sampled_from(HTML_TAGS), st.integers(1, 3000), WORD
)


def text_file(name: str, texts: SearchStrategy[str]) -> SearchStrategy[Case]:
    """Texts of a format as files, also in other encodings, damaged, and arbitrary bytes under its name."""
    encodings = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "cp1252", "gb18030"])
    whole = st.builds(lambda text, encoding: Case(name, text.encode(encoding, "replace")), texts, encodings)
    return st.one_of(whole, with_damage(whole), BYTES.map(lambda content: Case(name, content)))


def damaged_zip(content: bytes, member: float, places: list[tuple[float, int]], kept: float) -> Case:
    """A file of Word with one of its files damaged and packed again."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        names = source.namelist()
        for number, name in enumerate(names):
            inner = Case(name, source.read(name))
            hit = number == int(member * (len(names) - 1)) or name == "word/document.xml"
            out.writestr(name, (damaged(inner, places, kept) if hit else inner).content)
    return Case("a.docx", packed.getvalue())


def docx_files() -> SearchStrategy[Case]:
    """A file of Word from pandoc: one part of it damaged, or the whole."""
    import pypandoc

    text = b"# Pump\n\nIt **stands** here[^1].\n\n- a\n- b\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n[^1]: Note.\n"
    words = [pypandoc.get_pandoc_path(), "-f", "markdown", "-t", "docx"]
    content = subprocess.run(words, input=text, capture_output=True, check=True).stdout
    place = st.tuples(st.floats(0, 1), st.integers(0, 255))
    parts = st.builds(
        damaged_zip, st.just(content), st.floats(0, 1), st.lists(place, max_size=3), st.sampled_from([1.0, 0.7])
    )
    return st.one_of(parts, parts, with_damage(st.just(Case("a.docx", content))))


def pdf_files(folder: Path) -> SearchStrategy[Case]:
    """A small PDF with bytes changed, or with words of its syntax put in."""
    from test_markup import make_pdf

    content = Path(
        make_pdf(folder / "whole.pdf", ["A barrel for rain", "that stands here"], title="Barrel")
    ).read_bytes()
    words = [
        b"<<",
        b">>",
        b"[",
        b"]",
        b"null",
        b"9 0 R",
        b"1 0 R",
        b"/Kids",
        b"/Filter /FlateDecode",
        b"-1",
        b"stream",
        b"/Encrypt 2 0 R",
    ]
    put = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(words)), max_size=4)

    def with_words(places: list[tuple[float, bytes]]) -> Case:
        changed = content
        for place, word in places:
            at = int(place * len(changed))
            changed = changed[:at] + word + changed[at + len(word) * (len(places) % 2) :]
        return Case("a.pdf", changed)

    return st.one_of(put.map(with_words), with_damage(st.just(Case("a.pdf", content))))


# ---- checks of other inputs


def check_document(folder: Path, case: Case, kind: str) -> None:
    """A document is read, or refused in one sentence; its text can be written; plain words of Markdown are kept.

    pypdf raises anything for damaged files, which the worker turns into one named row.
    """
    source, bad = InputSource(str(written(folder, case.name, case.content)), kind), BadRows()
    article = None
    with one_bad_row(source, bad) if kind == "pdf" else nullcontext():
        article = taken(lambda: read_document(source, bad.note))
    for words in [*bad.first, *bad.notes]:
        printable(words)
    if article is None:
        return
    text = " ".join([article.title, *(each for path, body in article.sections for each in (*path, body))])
    text.encode("utf-8")
    given = case.content.decode("utf-8", "replace")
    if kind == "markdown" and not re.search(r"[<\ufffd\0`|]|\]\(|\]:|~~~|\[\[|^\W*---|[^\x00-\x7f]", given):
        assert not (lost := set(re.findall(r"\bw\d+\b", given)) - set(re.findall(r"w\d+", text))), lost


OPENING = re.compile(r'<doc .*title=".*">')


def check_wiki(folder: Path, case: Case) -> None:
    """Every line that opens an article is read or reported as one, and no other line is lost."""
    path = written(folder, case.name, case.content)
    bad = BadRows()
    read = taken(lambda: list(read_container(InputSource(str(path), "wikiextractor"), bad=bad)))
    if read is None:
        return
    for words in bad.first:
        printable(words)
    if path.name.endswith((".gz", ".bz2")):
        return
    try:
        lines = [line.strip() for line in case.content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:  # read in a detected encoding
        return
    opened = [line for line in lines if OPENING.fullmatch(line)] if len(str(lines)) < 5000 else None
    if opened is not None:
        assert len(opened) <= len(read) + bad.count
        body = " ".join(text for article in read for _, text in article.sections)
        strays = [line for line in lines if line and line not in opened and "</doc>" not in line]
        lost = [line for line in strays if html_free(line) not in html_free(body)]
        titles = " ".join(article.title for article in read)
        assert len([line for line in lost if html_free(line) not in html_free(titles)]) <= bad.count + unclosed(lines)


def html_free(text: str) -> str:
    """Letters and digits only: entities and spaces are changed on purpose."""
    import html

    return re.sub(r"\W", "", html.unescape(text))


def unclosed(lines: list[str]) -> int:
    """Lines of articles that never end, each reported by its first line; a broken opening line counts as text."""
    count, inside = 0, None
    for line in lines:
        if OPENING.fullmatch(line):
            count, inside = count + len(inside or ()), []
        elif inside is not None and line.endswith("</doc>"):
            inside = None
        elif inside is not None and line:
            inside.append(line)
    return count + len(inside or ())


@dataclass(frozen=True)
class Asked:
    """One question with its context, answer and budgets."""

    question: str
    context: str
    answer: str
    context_tokens: int
    max_length: int


LONG = st.builds(lambda text, times: text * times, st.text(max_size=20), st.integers(1, 30))
TEXT = st.one_of(st.text(max_size=40), LONG, st.sampled_from(["", "<|endoftext|>", "\nAnswer:", "\nQuestion: "]))
PROMPTS = st.builds(Asked, TEXT, TEXT, TEXT, st.integers(-3, 300), st.integers(0, 300))


def prompt_checker(folder: Path) -> Callable[[Asked], None]:
    """A check of prompts with a byte tokenizer, which keeps every character."""
    tokenizer = Generator.load(str(tiny.make_generator(folder / "generator"))).tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def check(asked: Asked) -> None:
        budget = {"context_tokens": asked.context_tokens, "max_length": asked.max_length}
        texts = {"questions": [asked.question], "contexts": [asked.context], "answers": [asked.answer]}
        examples = taken(lambda: encode_examples(tokenizer, **texts, **budget))
        question, context = ids(f"\nQuestion: {asked.question}\nAnswer:"), ids(asked.context)
        answer = (ids(f" {asked.answer}") if asked.answer else []) + [tokenizer.eos_token_id]
        room = asked.max_length - len(question) - len(answer)
        assert (examples is None) == (room < 0), "refused although it fits, or accepted although it does not"
        if examples is None:
            return
        example = with_keywords(tokenizer, examples, [asked.question])[0]
        prompt, labels = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
        kept = min(len(context), max(asked.context_tokens, 0), room)
        assert labels == answer and prompt == context[:kept] + question
        assert len(example.input_ids) <= asked.max_length

    return check


SETTING = st.one_of(st.sampled_from(sorted(KINDS)), PLAIN)
YAML_VALUE = st.one_of(
    SCALARS,
    st.sampled_from(
        [
            "inf",
            "nan",
            "1e-3",
            "yes",
            "on",
            "~",
            "0x10",
            "1_000",
            "2026-01-01",
            "!!python/object:os.system",
            "&a [*a]",
            "<<",
        ]
    ),
    st.lists(PLAIN, max_size=2),
)
YAML = st.one_of(
    BYTES,
    st.dictionaries(SETTING, YAML_VALUE, max_size=4)
    .map(lambda found: yaml.dump(found, allow_unicode=True))
    .map(lambda text: text.encode("utf-8", "replace")),
    st.lists(st.tuples(SETTING, YAML_VALUE), max_size=4)
    .map(lambda found: "".join(f"{name}: {value}\n" for name, value in found))
    .map(lambda text: text.encode("utf-8", "replace")),
    NESTED.map(str.encode),
    NESTED.map(lambda nested: f"report_to: {nested}\n".encode()),
    NESTED.map(lambda nested: f"? {nested}\n: 1\n".encode()),
)


def check_yaml(folder: Path, content: bytes) -> None:
    """Parsed settings must have finite numbers."""
    path = written(folder, "settings.yaml", content)
    settings_read = taken(lambda: parse_settings(["--config", str(path)]))
    if settings_read is not None:
        numbers = [value for value in settings_read.to_dict().values() if isinstance(value, float)]
        assert all(abs(number) < float("inf") for number in numbers)


# ---- the run


def target(name: str, folder: Path) -> tuple[SearchStrategy, Callable[[Any], None]]:
    """The strategy and the check of a target; files go to `folder`."""
    if name == "prompts":
        return PROMPTS, prompt_checker(folder)
    if name == "yaml":
        return YAML, lambda content: check_yaml(folder, content)
    if name in DOCUMENTS:
        return DOCUMENTS[name](folder), lambda case: check_document(folder, case, name)
    if name == "wikiextractor":
        return WIKI, lambda case: check_wiki(folder, case)
    cases = TABLES[name]
    files = bare(f"table.{'json' if name in ('squad', 'layouts') else name}")
    strategy = st.one_of(cases, with_damage(cases), files)
    return strategy, lambda case: check_tables(written(folder, case.name, case.content), case.rows)


LINES = st.lists(
    st.one_of(
        OBJECTS.map(json.dumps),
        VALUES.map(json.dumps),
        PLAIN,
        NESTED,
        NESTED.map('{{"question": "Who?", "answers": {}}}'.format),
    ),
    max_size=5,
)
TABLES = {
    "tsv": st.builds(as_tsv, st.none() | HEADERS, ROWS),
    "csv": st.builds(as_csv, HEADERS, ROWS),
    "jsonl": LINES.map(as_jsonl),
    "json": st.lists(st.one_of(OBJECTS, VALUES), max_size=5).map(as_json),
    "squad": ARTICLES.map(as_squad),
    "layouts": layout_files(),
    "parquet": parquet_files(),
}
DOCUMENTS: dict[str, Callable[[Path], SearchStrategy[Case]]] = {
    "markdown": lambda folder: text_file("a.md", st.one_of(MARKDOWN, MARKDOWN, REPEATED)),
    "html": lambda folder: text_file("a.html", st.one_of(HTML, HTML, LONG_HTML)),
    "docx": lambda folder: docx_files(),
    "pdf": pdf_files,
}
READERS = (*TABLES, *DOCUMENTS, "wikiextractor", "prompts", "yaml")


def fuzz(name: str, inputs: int, folder: Path, *, shrink: bool = False, same: bool = False) -> int:
    """Draw and check inputs of one target; returns their number. Raises at the first that fails.

    shrink: look for the smallest input that fails, which may take minutes. same: the same inputs in every run.
    """
    strategy, check = target(name, folder)
    drawn = 0

    def counted(value) -> None:
        nonlocal drawn
        drawn += 1
        in_time(check)(value)

    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    lenient = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    limits = settings(derandomize=same, max_examples=inputs, phases=phases, report_multiple_bugs=False, **lenient)
    limits(given(strategy)(counted))()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="inputs for each target (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=READERS, default=READERS, help="targets (default: all)")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest input that fails")
    arguments = parser.parse_args()
    for name in arguments.only:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            drawn = fuzz(name, arguments.inputs, Path(folder), shrink=arguments.shrink)
        print(f"{name}: {drawn} inputs without a failure ({time.perf_counter() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
