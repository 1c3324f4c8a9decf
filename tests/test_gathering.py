"""`cozyrag passages` end to end on small corpora: every format, every word accounted for, stable ids, resumable."""

import bz2
import gzip
import json
import os
import re
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_markup import make_pdf
from tqdm import tqdm

from cozyrag import cli
from cozyrag.commands import passages as command
from cozyrag.data import ingest, ingest_worker
from cozyrag.data.documents import read_document
from cozyrag.data.passages import passage_id, read_passages
from cozyrag.errors import InputError

DOCS = """<doc id="12" url="http://en.wikipedia.org/wiki?curid=12" title="Anarchism">
Anarchism

Anarchism is a political philosophy &amp; a movement of many sides.
Etymology.
The word comes from Greek, where it means without rulers of any kind.

</doc>
<doc id="25" url="http://en.wikipedia.org/wiki?curid=25" title="&quot;Autumn&quot; is "here" >">
"Autumn" is "here" >

The leaves fall on the ground and the days become shorter and colder.
</doc>
"""


def passages(arguments):
    cli.run("passages", arguments)


def made(folder, name="out.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def summary(folder, name="out.summary.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def run(folder, *inputs, output="out.jsonl"):
    passages([*map(str, inputs), "--output", str(folder / output), "--workers", "1"])
    return made(folder) if output == "out.jsonl" else None


def squeezed(text):
    return "".join(text.split())


# ---- formats


@pytest.mark.parametrize("pack", [None, gzip, bz2])
def test_wikiextractor(tmp_path, pack):
    (tmp_path / "wiki" / "AA").mkdir(parents=True)
    if pack:
        ending = ".gz" if pack is gzip else ".bz2"
        (tmp_path / "wiki" / "AA" / f"wiki_00{ending}").write_bytes(pack.compress(DOCS.encode()))
    else:
        (tmp_path / "wiki" / "AA" / "wiki_00").write_text(DOCS)
    first, second = run(tmp_path, tmp_path / "wiki")
    assert first["title"] == "Anarchism" and second["title"] == '"Autumn" is "here" >'
    assert (
        first["text"].startswith("Anarchism is a political philosophy & a movement")
        and "Etymology.\nThe word" in first["text"]
    )
    assert second["text"] == "The leaves fall on the ground and the days become shorter and colder."


def test_wikiextractor_json_and_every_word_accounted_for(tmp_path):
    body = "Heading\n" + " ".join(f"Sentence {i} has some words." for i in range(200)) + "\nEnd"
    rows = [{"id": str(i), "url": "u", "title": f"T{i}", "text": f"T{i}\n\n{body} {i}"} for i in range(5)]
    (tmp_path / "wiki_00").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = run(tmp_path, tmp_path / "wiki_00", "--keep_duplicates", "--min_characters", 1)
    for i in range(5):
        assert squeezed("".join(part["text"] for part in parts if part["title"] == f"T{i}")) == squeezed(f"{body} {i}")
    facts = summary(tmp_path)
    assert facts["words_read"] == facts["words"] == sum(len(f"{body} {i}".split()) for i in range(5))
    assert facts["articles"] == 5 and facts["passages"] == len(parts) == len({part["id"] for part in parts})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "json"])
def test_tables_of_articles(tmp_path, kind):
    rows = [{"name": f"A{i}", "body": f"Article {i} tells of a thing that is {i} years old."} for i in range(3)]
    path = tmp_path / f"articles.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        path.write_text("".join(comma.join(row) + "\n" for row in [rows[0], *(row.values() for row in rows)]))
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    found = run(tmp_path, path, "--columns", "title=name", "text=body")
    assert [(each["title"], each["text"]) for each in found] == [(row["name"], row["body"]) for row in rows]


def test_a_folder_of_documents(tmp_path):
    notes = tmp_path / "notes"
    (notes / "old").mkdir(parents=True)
    (notes / "barrel.md").write_text("# Rain barrel\nIt holds two hundred litres of rain.\n## Price\n40 euros")
    (notes / "old" / "pump.txt").write_text("The pump lifts water from the well behind the house.")
    (notes / "page.html").write_text("<h1>Roof</h1><p>The roof is made of red tiles from a village.</p>")
    (notes / "photo.jpg").write_bytes(b"\xff\xd8\x00")
    (notes / ".hidden.md").write_text("Not to be read by anybody at all.")
    (notes / "empty.md").write_text("")
    found = run(tmp_path, notes)
    assert {(each["title"], each["text"]) for each in found} == {
        ("Rain barrel", "It holds two hundred litres of rain.\nPrice\n40 euros"),
        ("pump", "The pump lifts water from the well behind the house."),
        ("Roof", "The roof is made of red tiles from a village."),
    }
    facts = summary(tmp_path)
    assert facts["articles_without_text"] == 1 and facts["unknown_files"] == 1
    assert facts["unknown_files_first"][0].endswith("photo.jpg: unknown format .jpg")


def test_the_progress_bar_counts_bytes(tmp_path, capsys):
    (tmp_path / "a.md").write_text("The pump lifts water from the well behind the house.")
    (tmp_path / "empty.md").write_text("")
    articles(tmp_path / "b.jsonl", [long("fox")])
    run(tmp_path, tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("a.md", "b.jsonl"))
    assert f"{size / 1000:.2f}k/{size / 1000:.2f}k" in capsys.readouterr().err


def test_a_worker_that_dies_is_reported_with_the_remedy(monkeypatch):
    future = Future()
    future.set_exception(BrokenProcessPool("gone"))
    monkeypatch.setattr(ingest.ProcessPoolExecutor, "submit", lambda *_: future)
    with pytest.raises(InputError, match="Run the same command again"):
        ingest._make_parts([None], 2, tqdm(disable=True))


def test_the_output_inside_the_folder_is_not_an_input(tmp_path):
    (tmp_path / "note.md").write_text("The pump lifts water from the well behind the house.")
    assert run(tmp_path, tmp_path) == run(tmp_path, tmp_path)
    assert summary(tmp_path)["files"] == 1


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    rows = [{"id": str(i), "title": f"T{i}", "text": f"Article number {i} is about many things."} for i in range(4)]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train.parquet")
    real, calls = datasets.load_dataset, []

    def load(*names, **options):
        calls.append((names, options))
        return real(str(tmp_path / "data"), **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = run(tmp_path, "wikimedia/wikipedia:20231101.de")
    assert [each["title"] for each in found] == ["T0", "T1", "T2", "T3"]
    assert {each["source"] for each in found} == {"wikimedia/wikipedia:20231101.de"}
    assert calls == [(("wikimedia/wikipedia", "20231101.de"), {"split": "train", "streaming": True})]


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl.gz", "out.jsonl"])
def test_outputs_can_be_read_as_passages(tmp_path, name):
    (tmp_path / "wiki_00").write_text(DOCS)
    run(tmp_path, tmp_path / "wiki_00", output=name)
    table, report = read_passages(str(tmp_path / name))
    assert report is None and table["title"][:] == ["Anarchism", '"Autumn" is "here" >']
    assert summary(tmp_path)["passages"] == 2 and not (tmp_path / f"{name}.parts").exists()


# ---- where a passage comes from


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_a_passage_keeps_its_file_and_url_up_to_the_sources_of_a_pair(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "pump.md").write_text(long("pump", 3))
    (tmp_path / "wiki_00").write_text(DOCS.replace("?curid=25", "?a=1&amp;b=%22"))
    rows = [{"title": "A", "url": " https://x.org/a ", "text": long("owl", 3)}, {"title": "B", "text": long("elk", 3)}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, "notes", "wiki_00", "rows.jsonl", output=output)
    table, _ = read_passages(output)
    assert [json.loads(each) for each in table["metadata"]] == [
        {"source": "wiki_00", "url": "http://en.wikipedia.org/wiki?curid=12"},
        {"source": "wiki_00", "url": "http://en.wikipedia.org/wiki?a=1&b=%22"},
        {"source": "rows.jsonl", "url": "https://x.org/a"},
        {"source": "rows.jsonl"},
        {"source": os.path.join("notes", "pump.md")},  # documents of all inputs come last
    ]
    assert table["id"][:] == [passage_id(text) for text in table["text"]]


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("overlap", [0, 2])
def test_a_passage_of_a_pdf_keeps_the_page_on_which_it_begins(tmp_path, output, overlap):
    pytest.importorskip("pypdf")
    # every sentence names its page; the second page has none, the fourth ends within a sentence
    pages = [[f"Page{page} has the number{line} and more words." for line in range(12)] for page in range(1, 6)]
    pages[1], pages[3][-1] = [], "Page4 has the num-"
    pages[4][0] = "bers and more words."
    make_pdf(tmp_path / "a.pdf", *pages)
    (tmp_path / "b.txt").write_text(long("fox", 3))
    run(tmp_path, tmp_path / "a.pdf", tmp_path / "b.txt", "--words", "20", "--overlap", str(overlap), output=output)
    table, _ = read_passages(str(tmp_path / output))
    found = [json.loads(each).get("page") for each in table["metadata"]]
    named = [int(re.search(r"Page(\d)|$", text)[1] or 0) or None for text in table["text"]]
    assert found == named and set(found) == {1, 3, 4, 5, None}


def test_a_pdf_from_which_a_long_word_was_left_out_has_no_pages(tmp_path):
    pytest.importorskip("pypdf")
    make_pdf(
        tmp_path / "a.pdf", ["A" * 2000, "The fox is red and lives in the forest."], ["The owl is white and awake."]
    )
    found = run(tmp_path, tmp_path / "a.pdf")
    assert found and not any("page" in each for each in found)


@pytest.mark.parametrize("head", ['<doc title="T">', '<doc id="1" url="" title="T">', '<doc url="cut title="T">'])
def test_a_head_without_a_url_has_none(tmp_path, head):
    (tmp_path / "wiki_00").write_text(f"{head}\nT\n\n{long('fox', 3)}\n</doc>\n")
    [found] = run(tmp_path, tmp_path / "wiki_00")
    assert found["title"] == "T" and "url" not in found


@pytest.mark.parametrize("url", [None, 7, ["https://x.org"], "", "  "])
def test_a_cell_that_is_no_url_makes_no_row_bad(tmp_path, url):
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "T", "url": url, "text": long("fox", 3)}) + "\n")
    [found] = run(tmp_path, tmp_path / "a.jsonl")
    assert "url" not in found and found["source"] == str(tmp_path / "a.jsonl")


def test_names_and_urls_that_are_not_unicode_are_written_as_escapes(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / os.fsdecode(b"caf\xe9.md")).write_text(long("fox", 3))
    (tmp_path / "notes" / "rows.jsonl").write_text(json.dumps({"url": "https://x.org/\ud800", "text": long("owl", 3)}))
    row, document = run(tmp_path, tmp_path / "notes")
    assert document["source"].endswith("caf\\udce9.md") and row["url"] == "https://x.org/\\ud800"


@pytest.mark.parametrize("near", [False, True])
def test_a_repeated_text_keeps_the_source_of_the_first(tmp_path, monkeypatch, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text(long("fox", 9))
    (tmp_path / "a.txt").write_text(long("fox", 9).replace("village 14", "town 14") if near else long("fox", 9))
    found = run(tmp_path, "b.txt", "a.txt", *["--near_duplicates"] * near)
    assert [each["source"] for each in found] == ["b.txt"]
    kept = run(tmp_path, "b.txt", "a.txt", "--keep_duplicates")
    assert [each["source"] for each in kept] == ["b.txt", "a.txt"]


# ---- stable ids, without repeats, resumable


def articles(path, texts):
    path.write_text("".join(json.dumps({"title": f"T{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def long(name, sentences=60):
    return " ".join(f"The {name} {i} stands in village {i * 7} beside the river." for i in range(sentences))


def test_ids_do_not_change_with_other_articles(tmp_path):
    source = articles(tmp_path / "a.jsonl", [long("fox"), long("owl"), long("elk")])
    before = {each["id"]: each["text"] for each in run(tmp_path, source)}
    assert {each["id"]: each["text"] for each in run(tmp_path, source)} == before
    articles(source, [long("cat"), long("fox"), long("owl").replace("village 7 ", "town 7 "), long("elk")])
    after = {each["id"] for each in run(tmp_path, source)}
    assert len(before.keys() - after) == 1


def test_repeats_are_left_out_and_counted(tmp_path):
    near = long("fox", 9).replace("village 14", "town 14")
    source = articles(tmp_path / "a.jsonl", [long("fox", 9), "too short", long("fox", 9), near, long("owl", 9)])
    assert len(run(tmp_path, source)) == 3
    assert summary(tmp_path)["dropped"] == {
        "too short": {"passages": 1, "words": 2},
        "equal to an earlier one": {"passages": 1, "words": 90},
    }
    assert len(run(tmp_path, source, "--near_duplicates")) == 2
    facts = summary(tmp_path)
    assert facts["dropped"]["nearly equal to an earlier one"] == {"passages": 1, "words": 90}
    assert facts["words_read"] == facts["words"] + sum(each["words"] for each in facts["dropped"].values())
    kept = run(tmp_path, source, "--keep_duplicates")
    assert len(kept) == 4 and kept[1]["id"] == f"{kept[0]['id']}-2"


def test_a_stopped_run_resumes(tmp_path, monkeypatch, capsys):
    sources = [articles(tmp_path / f"{name}.jsonl", [long(name)]) for name in ("fox", "owl", "elk", "cat")]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text(long("hen"))
    whole = run(tmp_path, *sources, tmp_path / "notes")
    real, calls = ingest.make_part, []

    def fails(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(batch)

    monkeypatch.setattr(ingest, "make_part", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *sources, tmp_path / "notes")
    assert made(tmp_path) == whole  # the old output stays until the new one is complete
    calls.clear()
    calls.extend([None] * 3)
    assert run(tmp_path, *sources, tmp_path / "notes") == whole
    assert len(calls) == 3 + 3 and "Resuming: 2 parts" in capsys.readouterr().err


def test_other_settings_or_changed_files_reuse_no_part(tmp_path, monkeypatch):
    source = articles(tmp_path / "a.jsonl", [long("fox")])
    monkeypatch.setattr(command, "assemble", lambda *_, **__: 1 / 0)
    for words in ("50", "100"):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, source, "--words", words)
    articles(source, [long("owl")])
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, source)
    assert len(list((tmp_path / "out.jsonl.parts").glob("*.parquet"))) == 3


@pytest.mark.slow
def test_two_workers_give_the_same_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "CHARACTERS", 4000)
    sources = [articles(tmp_path / f"{name}.jsonl", [long(name), long(f"{name} s")]) for name in ("fox", "owl", "elk")]
    one = run(tmp_path, *sources)
    passages([*map(str, sources), "--output", str(tmp_path / "two.jsonl"), "--workers", "2"])
    assert made(tmp_path, "two.jsonl") == one


# ---- what is removed or not read


@pytest.mark.parametrize(
    ("left", "clean"),
    [
        ("The pump (; from ) stands here.", "The pump stands here."),
        ("The pump () and (, ) and (; ; or ) stand here.", "The pump and and stand here."),
        ("A pressure of formula_1 where formula_22 (formula_3) is codice_4 high.", "A pressure of where is high."),
        ('References. &lt;templatestyles src="Reflist/styles.css" /&gt;', "References."),
        ("One&lt;br&gt;two &lt;ref name=x&gt;three&lt;/ref&gt; &lt;section begin=a /&gt;four.", "One two three four."),
        ('A &lt;span style="x"&gt;red&lt;/span &gt; pump.', "A red pump."),
        (
            "Call main() or f(x, ) in &lt;div&gt;; a &lt; b and c &gt; d.",
            "Call main() or f(x, ) in <div>; a < b and c > d.",
        ),
        ("It was (or) not (from here; there).", "It was (or) not (from here; there)."),
    ],
)
def test_what_wikiextractor_leaves_is_removed(tmp_path, left, clean):
    (tmp_path / "wiki_00").write_text(f'<doc id="1" url="u" title="T">\nT\n\n{left} {long("fox", 5)}\n</doc>\n')
    row = {"id": "1", "url": "https://en.wikipedia.org/wiki?curid=1", "title": "T"}
    row["text"] = f"{left} {long('fox', 5)}"
    (tmp_path / "wiki_01").write_text(json.dumps(row) + "\n")  # with --json
    for name in ("wiki_00", "wiki_01"):
        assert " ".join(run(tmp_path, tmp_path / name)[0]["text"].split()) == f"{clean} {long('fox', 5)}"


def test_tables_that_others_wrote_keep_what_looks_like_residue(tmp_path):
    text = f"Call main () with formula_1. {long('fox', 5)}"
    row = {"url": "https://example.org/a", "title": "T", "text": text}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert run(tmp_path, tmp_path / "a.jsonl")[0]["text"] == text


@pytest.mark.parametrize(("delimiter", "given"), [("^", "^"), ("|", "pipe"), (";", "semicolon"), ("\t", "tab")])
def test_a_table_is_read_with_the_delimiter_that_is_given(tmp_path, delimiter, given):
    text = f"{long('fox', 5)} a, b; c"
    quoted = f'"{text}"' if delimiter in text else text
    (tmp_path / "a.csv").write_text(f"title{delimiter}text\nT{delimiter}{quoted}\n")
    assert [row["text"] for row in run(tmp_path, tmp_path / "a.csv", "--delimiter", given)] == [text]


@pytest.mark.parametrize("run_of", ["QUJD" * 300, "ab12" * 100_000, "data:image/png;base64," + "A" * 2000, "x," * 900])
def test_data_within_a_text_is_left_out_and_counted(tmp_path, capsys, run_of):
    (tmp_path / "a.txt").write_text(f"{long('fox', 5)}\n\n{run_of}\n\n{long('owl', 5)} {run_of} {long('elk', 5)}")
    parts = run(tmp_path, tmp_path / "a.txt")
    assert max(len(word) for part in parts for word in part["text"].split()) < 20
    facts = summary(tmp_path)
    assert facts["dropped"] == {"longer than 1,000 characters": {"passages": 0, "words": 2}}
    assert facts["words_read"] == facts["words"] + 2
    assert "left out: 2 words (longer than 1,000 characters)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["维也纳是奥地利的首都。" * 200, "กรุงเทพ" * 300, "བོད་ཡིག་" * 300, "x" * 1000])
def test_scripts_without_spaces_keep_their_long_runs(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert squeezed("".join(part["text"] for part in run(tmp_path, tmp_path / "a.txt", "--keep_duplicates"))) == text


def test_files_that_are_not_read_are_listed_with_reasons(tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text(long("fox", 5))
    for name in ("old.doc", "old.ppt", "b.md.gz", *(f"photo{i:02}.jpg" for i in range(9))):
        (notes / name).write_bytes(b"\xff\xd8\x00")
    (notes / "gone").symlink_to(notes / "nothing")
    (notes / "none").write_bytes(b"")
    run(tmp_path, notes)
    shown = capsys.readouterr().out
    assert "1 article of 1 source, " in shown and "1 passage, " in shown and "not read: 14 files\n" in shown
    for why in (
        "gone: a link to nothing",
        "old.doc: the old .doc format; save it as .docx",
        "b.md.gz: a compressed doc",
    ):
        assert why in shown
    assert shown.count("\n  ") == 11 and "\n  ... and 4 more" in shown


def test_a_file_name_that_is_not_unicode_gives_a_title(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write(long("fox", 5))
    assert run(tmp_path, os.fsdecode(path))[0]["title"] == "caf\ufffd"
    assert "1 half characters" in summary(tmp_path)["notes"][0]


# ---- errors


def test_bad_rows_are_named_and_skipped_on_request(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"title": "T"}\n{"title": "T", "text": true}\n' + json.dumps({"text": long("fox")})
    )
    (tmp_path / "b.md").write_bytes("café, then ".encode() + b"caf\xe9 in another encoding")
    (tmp_path / "wiki_00").write_text(DOCS.removesuffix("</doc>\n") + '<doc id="1" title="X">\nx\n</doc>\nstray\n')
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.md", tmp_path / "wiki_00"]
    with pytest.raises(InputError) as refused:
        run(tmp_path, *inputs)
    message = str(refused.value)
    assert "5 rows cannot be used" in message and 'a.jsonl, line 1: no column "text"' in message
    assert "a.jsonl, line 2: text is a bool" in message and "b.md: line 1: expected UTF-8" in message
    assert "wiki_00, line 9: the article has no </doc>" in message and "wiki_00, line 16: text outside" in message
    assert not (tmp_path / "out.jsonl").exists()
    run(tmp_path, *inputs, "--skip_bad_rows")
    assert summary(tmp_path)["bad_rows"] == 5 and len(summary(tmp_path)["bad_rows_first"]) == 5


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.pdf", b"%PDF-1.4\n1 0 obj << /Type /Catalog /Pages 9 0 R >> endobj\ntrailer << /Root 1 0 R >>", "PDF"),
        ("cut.parquet", b"PAR1\0\0\0\0", "Parquet"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:40], "cut.jsonl.gz"),
        ("lines.jsonl", "é".encode() + b"\xff not UTF-8", "expected UTF-8"),
    ],
    ids=["pdf", "parquet", "gzip", "jsonl"],  # gzip's bytes contain the time
)
def test_one_bad_file_never_ends_the_command(tmp_path, name, content, reason):
    if name.endswith(".pdf"):
        pytest.importorskip("pypdf")
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "good.txt").write_text(long("fox"))
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="1 row cannot be used") as refused:
        run(tmp_path, folder)
    assert name in str(refused.value) and reason in str(refused.value)
    assert len(run(tmp_path, folder, "--skip_bad_rows")) >= 1
    assert summary(tmp_path)["bad_rows"] == 1 and name in summary(tmp_path)["bad_rows_first"][0]


@pytest.mark.parametrize(
    "fault", [RecursionError("too deep"), AssertionError(), AttributeError("no title"), OSError(5, "I/O")]
)
def test_whatever_a_reader_raises_is_one_named_row(tmp_path, monkeypatch, fault):
    def fail(source, note):
        if source.name.endswith("b.txt"):
            raise fault
        return read_document(source, note)

    monkeypatch.setattr(ingest_worker, "read_document", fail)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(long(name[0]))
    run(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", "--skip_bad_rows")
    (row,) = summary(tmp_path)["bad_rows_first"]
    assert row.startswith(f"{tmp_path / 'b.txt'}: the reader failed ({type(fault).__name__}")


def test_if_all_rows_are_skipped_the_refusal_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": true}\n{"text": 7.5e-1, "title": []}\n')
    with pytest.raises(InputError, match="found none.* 2 bad rows were skipped, the first: .*line 1: text is a bool"):
        run(tmp_path, tmp_path / "a.jsonl", "--skip_bad_rows")


def test_memory_that_runs_out_is_no_fault_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest_worker, "read_document", lambda *_: (_ for _ in ()).throw(MemoryError()))
    (tmp_path / "a.txt").write_text(long("fox"))
    with pytest.raises(MemoryError):
        run(tmp_path, tmp_path / "a.txt", "--skip_bad_rows")


def test_links_are_followed_once_and_links_to_nothing_are_counted(tmp_path):
    notes, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    (notes / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "far.txt").write_text(long("far"))
    (notes / "near.txt").write_text(long("near"))
    (notes / "linked").symlink_to(elsewhere)
    (notes / "linked-again").symlink_to(elsewhere)
    (notes / "sub" / "up").symlink_to(notes)  # a cycle
    (notes / "gone.txt").symlink_to(notes / "nothing.txt")
    os.mkfifo(notes / "pipe.txt")  # reading it would wait for ever
    run(tmp_path, notes)
    facts = summary(tmp_path)
    assert facts["files"] == facts["articles"] == 2 and facts["unknown_files"] == 2
    assert sorted(os.path.basename(name).split(":")[0] for name in facts["unknown_files_first"]) == [
        "gone.txt",
        "pipe.txt",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_one_named_row(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("a.txt", "b.txt", "c.csv"):
        (notes / name).write_text(long(name))
    (notes / "b.txt").chmod(0)
    (notes / "c.csv").chmod(0)
    run(tmp_path, notes, "--skip_bad_rows")
    assert summary(tmp_path)["bad_rows"] == 2


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["nothing/here/now"], "out.jsonl", "found nothing at"),
        (["a.bin"], "out.jsonl", "expected files of a known format .* found 1 whose names"),
        (["empty"], "out.jsonl", "expected files of a known format .* found 0 whose names"),
        (["a.jsonl"], "out.txt", "expected a name that ends in .parquet or .jsonl or .jsonl.gz"),
        (["a.jsonl"], "a.jsonl", "is an input as well"),
        (["a.jsonl"], "none/out.jsonl", "there is no folder"),
        (["short.jsonl"], "out.jsonl", "texts of at least 30 characters"),
    ],
)
def test_unusable_inputs_and_outputs(tmp_path, monkeypatch, inputs, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    articles(tmp_path / "a.jsonl", [long("fox")])
    articles(tmp_path / "short.jsonl", ["short"])
    with pytest.raises(InputError, match=message):
        passages([*inputs, "--output", output, "--workers", "1"])


@pytest.mark.parametrize(
    "words", [["--words", "5"], ["--near_duplicates", "80"], ["--overlap", "-1"], ["--format", "doc"]]
)
def test_invalid_arguments(words, capsys):
    with pytest.raises(SystemExit):
        passages(["a.md", "--output", "x.jsonl", *words])
    assert "error: argument" in capsys.readouterr().err


def test_the_format_can_be_forced(tmp_path):
    (tmp_path / "data.bin").write_text(
        json.dumps({"title": "T", "text": "The leaves fall on the ground and the days grow."})
    )
    assert [each["title"] for each in run(tmp_path, tmp_path / "data.bin", "--format", "jsonl")] == ["T"]
