"""Texts of which a reader could take the square of the time: markup without end, runs of spaces, endless rows."""

import gzip
import json
import re
import signal
from contextlib import contextmanager

import pytest

from cozyrag.data import documents, readers, streams
from cozyrag.data.chunking import LONGEST_WORD, cut, without_long_words
from cozyrag.data.documents import InputSource, read_container
from cozyrag.data.literals import LONGEST, literal
from cozyrag.data.outline import Outline
from cozyrag.data.parsers import markdown_article
from cozyrag.data.passages import read_passages
from cozyrag.data.questions import read_questions
from cozyrag.data.readers import read_rows
from cozyrag.data.rows import BadRows, BadValue
from cozyrag.data.streams import TOO_LONG
from cozyrag.errors import InputError

ENOUGH = 20  # seconds of the processor, of which each of these needs one; a quadratic reader needs 60 and more


@contextmanager
def in_bounds():
    """Fails what takes ENOUGH seconds of the processor, however busy the machine is."""

    def fail(*_):
        raise AssertionError(f"it took {ENOUGH} seconds of the processor")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, ENOUGH)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def html_lines(text):
    outline = Outline()
    outline.html(text)
    return outline.sections[-1][1]


# ---- HTML in Markdown


@pytest.mark.parametrize(
    "text",
    ["<a ", "<div ", "<a b=", "<div a='", '<div a="', "<!--", "<![CDATA[", "<!DOCTYPE ", "<?", "</", "</a ",
     "<script/>", "<script a='", "<style></style ", "<b></i>", "&#", "<", "<!", "<a = "],
)  # fmt: skip
def test_markup_without_end_is_read_in_linear_time(text):
    with in_bounds():
        html_lines("<div>\n" + text * 60_000)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("<p>a <b x='c, text", ["a <b x='c, text"]),
        ("one<a href='x>two</a><p>three", ["onetwo", "three"]),
        ("a<!-- b > c<p>d</p>f", ["a<!-- b > c", "d", "f"]),
        ("a<![CDATA[ b<p>c<!-- d > e --></p>f", ["a<![CDATA[ b", "c", "f"]),
        ("x < y <div", ["x < y <div"]),
        ("a<p x=y", ["a<p x=y"]),
        ("one</div>two", ["one", "two"]),
        ("<p title='a > b'>c<p title=it's>d</p>", ["c", "d"]),
        ("a<script>b<p>c", ["a"]),
        ("a<script src=x />b<SCRIPT>c</p></Script >d", ["abd"]),
        ("<script>if (a<b && c == 'd')</script>e", ["e"]),
        ("<svg><style>a</style>b</svg>c<svg/>d", ["cd"]),
        ("<!DOCTYPE a><?b?><!c></ d>e<![CDATA[ f>g ]]>h<![if i]>j<!---->k", ["ehjk"]),
        ("<1> &lt;p&gt; &#65;&copy", ["<1> <p> A©"]),
    ],
)
def test_markup_ends_as_in_a_browser_and_what_has_no_end_is_text(text, lines):
    assert html_lines(text) == lines


def test_a_paragraph_in_a_heading_is_a_heading():
    assert markdown_article("<h1><p>T</p></h1>\n\nText.", "a.md").title == "T"


# ---- what other readers look for


@pytest.mark.parametrize("text", ["a < b", "formula_1", "a (,"])
def test_residue_among_spaces_is_found_in_linear_time(tmp_path, text):
    spaces = " " * 300_000
    (tmp_path / "wiki_00").write_text(f'<doc id="1" url="u" title="t">\n{text}{spaces}x <br> y\n</doc>\n')
    with in_bounds():
        articles = list(read_container(InputSource(str(tmp_path / "wiki_00"), "wikiextractor"), bad=BadRows()))
    assert articles[0].sections[0][1].endswith("x  y\n")


def test_a_list_that_is_never_closed_is_refused_in_linear_time():
    with in_bounds(), pytest.raises(BadValue, match="cannot be parsed"):
        literal("['" + "\\'" * 300_000 + "]", "answers")


def test_a_long_list_is_read_as_json_alone():
    items = ["a"] * (LONGEST // 4)
    assert literal(json.dumps(items), "answers") == items
    assert literal("['a', 'b']", "answers") == ["a", "b"]
    with pytest.raises(BadValue, match="cannot be parsed"):
        literal(str(items), "answers")


def test_a_sentence_of_many_words_is_cut_without_loss():
    for text in ("word " * 400_000, "a, b " * 150_000, "维也" * 100_000):
        with in_bounds():
            passages = cut(text, words=100)
        assert "".join("".join(passages).split()) == "".join(text.split())
        assert max(map(len, passages)) <= 1_500


def test_runs_that_are_no_words_are_found_where_they_are():
    run = "a" * (LONGEST_WORD + 1)
    assert without_long_words(f"{run}{'维' * 500} {run} b") == (f"{run}{'维' * 500}  b", 1)
    with in_bounds():
        assert without_long_words("b " * 2_000_000 + f"{run} " * 5_000)[1] == 5_000


# ---- rows without end


@pytest.fixture
def short_rows(monkeypatch):
    """Rows of at most 100 characters."""
    monkeypatch.setattr(streams, "LONGEST_ROW", 100)
    monkeypatch.setattr(readers, "LONGEST_ROW", 100)


LONG = "word " * 40


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", f'{{"text": "one"}}\n{{"text": "{LONG}"}}\n{{"text": "two"}}'),
        ("a.json", f'[{{"text": "one"}}, {{"text": "{LONG}"}}, {{"text": "two"}}]'),
        ("a.csv", f'title,text\n,one\na,"{LONG}\n{LONG}"\n,two\n'),
        ("a.tsv", f"title\ttext\n\tone\na\t{LONG}\n\ttwo\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_row_that_is_too_long_is_one_bad_row(tmp_path, short_rows, name, text, encoding):
    (path := tmp_path / name).write_bytes(text.encode(encoding))
    table, report = read_passages(str(path), skip_bad_rows=True)
    assert table["text"][:] == ["one", "two"] and "1 row skipped" in report and TOO_LONG in report
    with pytest.raises(InputError, match="1 row cannot be used: .*(line|row) [23]: expected at most .* in one row"):
        read_passages(str(path))


def test_texts_within_lists_count(tmp_path, short_rows):
    rows = [{"question": "a", "answers": ["b"]}, {"question": "c", "answers": ["word"] * 40}]
    (path := tmp_path / "a.json").write_text(json.dumps(rows))
    assert len(read_questions(str(path), skip_bad_rows=True).table) == 1


def test_a_file_of_one_long_line_says_what_is_wrong(tmp_path, short_rows):
    (path := tmp_path / "a.jsonl").write_text(json.dumps({"question": LONG, "answers": LONG}))
    with pytest.raises(InputError, match="line 1: expected at most"):
        read_questions(str(path))


def test_of_a_line_that_is_too_long_no_more_is_in_memory_than_a_row_may_have(tmp_path, monkeypatch):
    (path := tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "' + b"a" * 10_000_000 + b'"}\n{"text": "b"}')
    )
    sizes, real = [], streams._in_bounds
    monkeypatch.setattr(streams, "LONGEST_ROW", 1000)
    monkeypatch.setattr(
        streams, "_in_bounds", lambda *given: (sizes.append(len(each)) or each for each in real(*given))
    )
    bad = BadRows()
    assert [row.values for row in read_rows(str(path), bad=bad)] == [{"text": "b"}]
    assert sizes == [1, 13] and bad.count == 1


@pytest.mark.parametrize("text", ["A b. ", "a\n", "维。"])
def test_a_text_of_a_row_with_too_many_sentences_is_one_bad_row(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "MOST_SENTENCES", 1000)
    (path := tmp_path / "a.csv").write_text(f'title,text\na,one\nb,"{text * 1001}"\nc,"{text * 1000}"\n')
    bad = BadRows()
    articles = list(read_container(InputSource(str(path), "csv"), bad=bad))
    assert [article.title for article in articles] == ["a", "c"] and bad.count == 1
    assert re.fullmatch(r".*a.csv, line 3: expected at most 1,000 .* found 1,001.* quote mark .*", bad.first[0])


def test_a_document_may_have_more_sentences_than_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_SENTENCES", 10)
    (path := tmp_path / "a.txt").write_text("A b. " * 100)
    assert documents.read_document(InputSource(str(path), "text")).sections[0][1].count("A b.") == 100


def test_a_document_may_be_one_long_line(tmp_path, short_rows):
    (path := tmp_path / "a.txt").write_text(LONG)
    assert len("".join(streams.text_lines(streams.InputFile("a", str(path))))) == len(LONG)
