"""Delimiters, quoting, headers and padding of text tables."""

import csv
import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.data.delimited import delimiter_of, find_delimiter
from cozyrag.data.passages import passage_id, read_passages
from cozyrag.data.questions import read_questions
from cozyrag.data.rows import BadRows, Columns
from cozyrag.errors import InputError


def write(path, content):
    path.write_bytes(content.encode("utf-8"))
    return str(path)


def pairs(source, **options):
    table = read_questions(source, **options).table
    return [(row["question"], *row["answers"]) for row in table]


ASKED = [("Who made it?", "a smith, or two"), ("What does it cost?", "7,50; or 8"), ("When?", "1911")]


def table(delimiter, header="question{}answer", rows=ASKED, end="\n"):
    """A file as Excel writes it: cells with the delimiter or a quote mark are quoted."""
    cells = [header.split("{}"), *rows]
    quoted = [
        [f'"{c.replace(chr(34), chr(34) * 2)}"' if delimiter in c or '"' in c else c for c in row] for row in cells
    ]
    return end.join(delimiter.join(row) for row in quoted) + end


# ---- which delimiter


@pytest.mark.parametrize("extension", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_header_with_known_names_shows_the_delimiter(tmp_path, extension, delimiter, end):
    assert pairs(write(tmp_path / f"q.{extension}", table(delimiter, end=end))) == ASKED


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        ("sep=;", table(";")),
        ('"sep=|"', table("|")),
        ("sep=\t", table("\t")),
        ("sep=,", table(",")),
        ("\ufeffsep=:", table(":")),
    ],
)
def test_the_first_line_of_excel_names_the_delimiter(tmp_path, first, rest):
    source = write(tmp_path / "q.csv", f"{first}\r\n{rest}")
    assert pairs(source) == ASKED
    broken = write(tmp_path / "b.csv", f"{first}\r\n{rest}only one cell")
    with pytest.raises(InputError, match="b.csv, line 6: expected 2 cells, found 1 .*--delimiter names another"):
        pairs(broken)


@pytest.mark.parametrize(
    ("kind", "lines", "found"),
    [
        (".csv", ["Frage;Antwort", "Wer?;Anna", "Preis?;7,50 Kronen"], ";"),
        (".csv", ["Titre\tTexte", "A\tun, deux, trois", "B\tquatre"], "\t"),
        (".csv", ["Who?\tAnna, the smith"], "\t"),
        (".tsv", ["Frage;question", "Wer?;Anna", "Wo?;hier"], "\t"),
        (".tsv", ["Frage;id;question", "Wer?;7;Anna"], ";"),
        (".tsv", ["one; two", "three; four", "five; six"], "\t"),
        (".csv", ["a|b", "c|d, e"], "|"),
        # Texts full of other delimiters do not change it.
        (".tsv", ["Who?\ta; b", "Where?\tc; d", "broken; line"], "\t"),
        (".tsv", ["Anna, a smith", "Bob, a cook", "Carl, a monk"], "\t"),
        (".tsv", ["one; two", "three; four, five", "six"], "\t"),
        (".csv", ["Frage,Antwort", "Wer; wann?,Anna", "Wo; wie?,hier"], ","),
        (".csv", ["text", "a; b", "c; d"], ","),
        (".csv", ["question,answer", "a\tb,c", "d\te,f"], ","),
        (".tsv", ["red, text, id\tblue", "green\tyellow"], "\t"),
        (".csv", ["one line; only, with both"], ","),
        (".tsv", ["question\tanswer; or not", "a;b\tc;d"], "\t"),
    ],
)
def test_shape_and_header_decide(kind, lines, found):
    assert find_delimiter([f"{line}\n" for line in lines], kind, ("question", "answer", "text", "id", "title")) == found


WORD = st.text("abc ,;|'", min_size=1, max_size=8).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(WORD, WORD), min_size=1, max_size=6), st.sampled_from([".tsv", ".csv"]))
def test_a_table_with_a_header_is_never_misread(tmp_path_factory, rows, extension):
    path = tmp_path_factory.mktemp("h") / f"q{extension}"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if extension == ".tsv" else ",")
        writer.writerows([("question", "answer"), *rows])
    read = read_questions(str(path))
    assert read.table["question"][:] == [" ".join(question.split()) for question, _ in rows]
    assert read.table["answers"][:] == [[answer.strip()] for _, answer in rows]


@pytest.mark.parametrize(("name", "delimiter"), [(":", ":"), ("tab", "\t"), ("\\t", "\t"), ("pipe", "|"), ("~", "~")])
def test_a_delimiter_that_is_given_is_used(tmp_path, name, delimiter):
    source = write(tmp_path / "q.csv", table(delimiter))
    assert pairs(source, delimiter=delimiter_of(name)) == ASKED


@pytest.mark.parametrize("text", ["", "::", '"', "\n", "commas"])
def test_impossible_delimiters(text):
    with pytest.raises(InputError, match="--delimiter: expected one character or tab, comma"):
        delimiter_of(text)


def test_a_text_is_no_table(tmp_path):
    source = write(tmp_path / "notes.txt", "A note, on two lines.\nThe second; line.\n")
    with pytest.raises(InputError, match="notes.txt: the extension .txt does not show the format.*cozyrag passages"):
        read_passages(source)
    with pytest.raises(InputError, match='found "A note, on two lines."'):
        read_passages(source, delimiter="|")


# ---- quoting of tables with tabs


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('who?\t"say ""hi"" now"\nwhen?\tnow\n', [("who?", 'say "hi" now'), ("when?", "now")]),
        ('"who ""is"" it?"\tAda\nwhen?\tnow\n', [('who "is" it?', "Ada"), ("when?", "now")]),
        ('"a\ttab?"\tAda\nwhen?\tnow\n', [("a tab?", "Ada"), ("when?", "now")]),
        ('"two\nlines?"\tAda\nwhen?\tnow\n', [("two lines?", "Ada"), ("when?", "now")]),
        ('question\tanswer\nwho?\t"Ada"\nwhen?\t"now"\n', [("who?", "Ada"), ("when?", "now")]),
        ('"question"\t"answer"\r\n"who?"\t"Ada"\r\n"when?"\t"now"', [("who?", "Ada"), ("when?", "now")]),
        # Otherwise quote marks are text.
        ('who?\t"Ada" Lovelace\nwhen?\tnow\n', [("who?", '"Ada" Lovelace'), ("when?", "now")]),
        ('who?\t"Ada\nwhen?\tnow\n', [("who?", '"Ada'), ("when?", "now")]),
        ('"who?" he said\tAda\n"when?"\tnow\n', [('"who?" he said', "Ada"), ('"when?"', "now")]),
        ('who?\t"Ada"\nwhen?\tnow\n', [("who?", '"Ada"'), ("when?", "now")]),
        ('say what?\t"Hi\nand then?\tBye"\n', [("say what?", '"Hi'), ("and then?", 'Bye"')]),
        ('6" pipe?\t5" and ""more""\nwhen?\tnow\n', [('6" pipe?', '5" and ""more""'), ("when?", "now")]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_quoted_and_plain_tables_with_tabs(tmp_path, content, rows, packed):
    path = tmp_path / ("q.tsv.gz" if packed else "q.tsv")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert pairs(str(path)) == rows


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('who?\t"say ""hi"""\nwhen?\t"now\nwhere?\there\n', 2),
        ('question\tanswer\nwhen?\t"now\nwho?\t"say ""hi"""\nwhere?\there\n', 2),
        ('"who?"\t"Ada"\n"when?"\t"now" or never\n"where?"\t"here"\n', 2),
        ('who?\t"say ""hi"""\n\n\nwhat?\t"a "quoted" word"\n', 4),
        ('"a"\tb\n"c ""d"""\te\n"open\tf\n', 3),
    ],
)
def test_a_quoted_cell_that_is_not_closed_is_an_error_with_its_line(tmp_path, content, line):
    source = write(tmp_path / "q.tsv", content)
    with pytest.raises(InputError) as refused:
        pairs(source)
    for words in (f"{source}, line {line}: expected a cell that is closed", "swallow", "Close it", ".jsonl"):
        assert words in str(refused.value)


@pytest.mark.parametrize("content", ['a,b\n1,"2\n3,4\n', 'a;b\n1;"2"x\n3;4\n', 'a|b\n"1|2\n'])
def test_a_broken_quote_of_another_delimiter_is_an_error_with_its_line(tmp_path, content):
    with pytest.raises(
        InputError, match=r"q.csv, line 2: expected a CSV record, found a broken one.*Correct the quotes"
    ):
        pairs(write(tmp_path / "q.csv", content), columns=Columns(question="a", answer="b"))


def test_long_broken_quotes_are_fast(tmp_path):
    cell = '"' + 'x""' * 200_000
    assert len(pairs(write(tmp_path / "q.tsv", f"who?\t{cell}\nwhen?\tnow\n"))) == 2


# ---- padding


@pytest.mark.parametrize(
    "content",
    [
        "question,answer,,\nwho?,Ada,,\nwhen?,now,,\n,,,\n,,,\n",
        "question,answer,,\nwho?,Ada\nwhen?,now,\n",
        "question,answer\nwho?,Ada,, ,\n\n , \nwhen?,now\n",
        "\n,,\nquestion,answer,\nwho?,Ada,\nwhen?,now,\n",
        "question;answer;\nwho?;Ada;\nwhen?;now;\n;;\n",
        "question\tanswer\t\t\nwho?\tAda\t\t\nwhen?\tnow\t\t\n\t\t\t\n",
        "who?\tAda\t\nwhen?\tnow\t\n\t\t\n",
        ",question,answer\n0,who?,Ada\n1,when?,now\n",
    ],
)
def test_empty_columns_and_rows_are_ignored(tmp_path, content):
    name = "q.tsv" if "\t" in content else "q.csv"
    assert pairs(write(tmp_path / name, content)) == [("who?", "Ada"), ("when?", "now")]


def test_cells_without_a_column_are_not_dropped(tmp_path):
    source = write(tmp_path / "q.csv", "question,answer\nwho?,Ada,and more\nwhen?,now\n")
    with pytest.raises(InputError, match="line 2: expected 2 cells, found 3"):
        pairs(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [("q.tsv", "\t\n"), ("q.tsv", " \t \n\n"), ("q.csv", ",,\n,,\n"), ("q.csv", '""\n'), ("q.csv", '"\n"\n')],
)
def test_a_table_of_blank_cells_has_no_row(tmp_path, name, content):
    for reader in (pairs, read_passages):
        with pytest.raises(InputError, match="at least one row|expected 2 cells|file is empty"):
            reader(write(tmp_path / name, content))


# ---- headers


def test_a_header_in_another_language_names_the_columns_found(tmp_path):
    for name, delimiter in (("q.csv", ","), ("s.csv", ";"), ("t.tsv", ";"), ("u.csv", "|"), ("v.txt", ";")):
        source = write(tmp_path / name, table(delimiter, "Frage{}Antwort"))
        found = 'found "Frage", "Antwort".*--columns question=COLUMN' if name.endswith("csv") else "--delimiter"
        with pytest.raises(InputError, match=found):
            pairs(source)
        assert pairs(source, columns=Columns(question="Frage", answer="Antwort")) == ASKED


LONG = [(f"Which of the {n} smiths made the pump?", f"smith {n}") for n in range(4)]
TITLED = [(f"Pump {n}", f"The pump number {n} was made by a smith.") for n in range(4)]


@pytest.mark.parametrize(("header", "rows"), [("Frage{}Antwort", LONG), ("Titre{}Texte entier", TITLED)])
def test_words_above_sentences_are_a_header_without_known_names(tmp_path, header, rows):
    source = write(tmp_path / "a.tsv", table("\t", header, rows))
    first = header.split("{}")[0]
    reader, column = (pairs, "question") if rows is LONG else (read_passages, "title")
    with pytest.raises(InputError, match=f'line 1: .*"{first}".*looks like a header.*--columns {column}={first}'):
        reader(source)


@pytest.mark.parametrize(
    "rows",
    [LONG, [("Who?", "Ada"), *LONG], [("Capital of France", "Paris"), *LONG], [("Pump", "Ada"), ("Song", "Bob")] * 2],
)
def test_data_without_header_is_not_taken_for_a_header(tmp_path, rows):
    assert pairs(write(tmp_path / "q.tsv", "".join(f"{q}\t{a}\n" for q, a in rows))) == rows


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("Pump\tIt is old.\nSong\tIt is new.\n", [(None, "Pump", "It is old."), (None, "Song", "It is new.")]),
        ("1\tIt is old.\n2\tIt is new.\n", [("1", "", "It is old."), ("2", "", "It is new.")]),
        ("1984\tA novel.\nPump\tIt is new.\n", [(None, "1984", "A novel."), (None, "Pump", "It is new.")]),
        ("It is old.\nIt is new, he said.\n", [(None, "", "It is old."), (None, "", "It is new, he said.")]),
        ("id\ttext\n7\tIt is old.\n", [("7", "", "It is old.")]),
    ],
)
def test_passages_without_header(tmp_path, content, rows):
    read = read_passages(write(tmp_path / "p.tsv", content))[0].to_list()
    assert [(row["id"], row["title"], row["text"]) for row in read] == [
        (key or passage_id(text), title, text) for key, title, text in rows
    ]


def test_more_columns_without_known_names_are_refused(tmp_path):
    source = write(tmp_path / "p.tsv", f"1\tPump\tIt is old.\t{'x' * 100}\n2\tSong\tIt is new.\ty\n")
    with pytest.raises(
        InputError, match='a column "text", found "1", "Pump", "It is old.", "xxx.*--columns'
    ) as refused:
        read_passages(source)
    assert "x" * 60 not in str(refused.value)


def test_a_file_of_questions_is_not_read_as_passages_without_header(tmp_path):
    source = write(tmp_path / "q.tsv", table("\t"))
    with pytest.raises(InputError, match='a column "text", found "question", "answer"'):
        read_passages(source)


def test_one_row_in_the_note_of_bad_rows():
    bad = BadRows()
    bad.note("f: read as cp1252")
    bad.note("f: read as cp1252")
    assert bad.finish("f", skip=False) == "f: read as cp1252"
    bad.add("f, line 1", "empty text")
    assert bad.finish("f", skip=True).splitlines()[0] == "f: read as cp1252"
