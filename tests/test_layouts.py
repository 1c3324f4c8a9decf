"""Known data sets, answers written into cells, folders of data sets, and several files for one setting."""

import gzip
import json
import math
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from cozyrag.data.literals import literal
from cozyrag.data.passages import passage_id, read_passages
from cozyrag.data.questions import read_questions
from cozyrag.data.readers import described, size_of, sources_of
from cozyrag.data.rows import BadValue, Columns
from cozyrag.errors import InputError

WELL = "The well was dug in 1790 by a miller."
SONG = "The song was written in 1911."
OTHER = "A bell hangs above the door."


def write(path, value, lines=False):
    text = "".join(json.dumps(each) + "\n" for each in value) if lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(source, **options):
    """(questions without generated ids, texts of the passages by title) of a source."""
    found = read_questions(source, **options)
    rows = [{name: cell for name, cell in row.items() if cell != []} for row in found.table.to_list()]
    kept = [row if len(row["id"]) < 16 else {name: cell for name, cell in row.items() if name != "id"} for row in rows]
    passages = found.passages.to_list() if found.passages else []
    return kept, [(row["title"], row["text"]) for row in passages]


def asked(answer="a miller", gold=None, question="Who dug the well?", **more):
    return {"question": question, "answers": [answer], "passage_id": gold and passage_id(gold)} | more


# ---- layouts of rows, as a list, as the list in an object, as JSON lines and as Parquet

KILT = {
    "id": "k",
    "input": "Who dug the well?",
    "output": [{"answer": "a miller"}, {"provenance": [{"wikipedia_id": "9"}]}],
}
HOTPOT = {
    "_id": "h",
    "question": "Who dug the well?",
    "answer": "a miller",
    "supporting_facts": [["Song", 0], ["Well", 0]],
    "context": [
        ["Song", ["The song was", " written in 1911."]],
        ["Well", ["The well was dug", "in 1790 by a miller."]],
    ],
}
HOTPOT_HUB = HOTPOT | {
    "supporting_facts": {"title": ["Well"], "sent_id": [0]},
    "context": {"title": ["Song", "Well"], "sentences": [[SONG], [WELL]]},
}
TRIVIA = {"Question": "Who dug the well?", "QuestionId": "t", "Answer": {"Value": "a miller", "Aliases": ["a miller"]}}
TRIVIA_HUB = {
    "question": "Who dug the well?",
    "question_id": "t",
    "answer": {"aliases": ["a miller"], "normalized_aliases": ["miller"], "value": "a miller", "type": "x"},
}
BOOLQ = {"question": "is the well old", "title": "Well", "answer": True, "passage": WELL}
DPR = {
    "question": "Who dug the well?",
    "answers": ["a miller"],
    "positive_ctxs": [{"title": "Well", "text": WELL, "score": 1.5, "passage_id": "3"}],
    "negative_ctxs": [{"title": "Bell", "text": OTHER}],
    "hard_negative_ctxs": [{"title": "Song", "text": SONG}],
}
COQA_HUB = {"story": WELL, "questions": ["Who dug it?", "When?"], "answers": {"input_text": ["a miller", "1790"]}}
PLAIN = {"question": "Who dug the well?", "answer": "a miller"}
TWO = [("Song", SONG), ("Well", WELL)]
ROWS = {
    "kilt": (KILT, [asked(id="k")], []),
    "hotpot": (HOTPOT, [asked(id="h", gold=WELL)], [*reversed(TWO)]),
    "hotpot of the Hub": (HOTPOT_HUB, [asked(id="h", gold=WELL)], [*reversed(TWO)]),
    "trivia": (TRIVIA, [asked(id="t")], []),
    "trivia of the Hub": (TRIVIA_HUB, [asked(id="t")], []),
    "boolq": (BOOLQ, [asked("yes", WELL, "is the well old")], [("Well", WELL)]),
    "dpr": (
        DPR,
        [asked(gold=WELL, negative_ids=[passage_id(SONG)])],
        [("Well", WELL), ("Song", SONG), ("Bell", OTHER)],
    ),
    "fid": ({**asked(), "ctxs": [{"title": "Song", "text": SONG, "score": "1"}]}, [asked()], [("Song", SONG)]),
    "coqa of the Hub": (
        COQA_HUB,
        [asked(gold=WELL, question="Who dug it?"), asked("1790", WELL, "When?")],
        [("", WELL)],
    ),
    "one text": ({**PLAIN, "context": [WELL]}, [asked(gold=WELL)], [("", WELL)]),
    "two texts": ({**PLAIN, "context": [WELL, SONG]}, [asked()], [("", WELL), ("", SONG)]),
}


@pytest.mark.parametrize("form", ["json", "data", "jsonl", "parquet", "hub"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_known_data_sets(tmp_path, monkeypatch, name, form):
    row, expected, passages = ROWS[name]
    if form == "parquet":
        if name == "hotpot":
            return  # its pairs of a title and sentences have no type in Parquet
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
        source = str(tmp_path / "q.parquet")
    elif form == "hub":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: [row])
        source = "user/name"
    else:
        value = {"data": [row], "version": "1", "json": [row], "jsonl": [row]} if form == "data" else [row]
        source = write(tmp_path / f"q.{'json' if form == 'data' else form}", value, lines=form == "jsonl")
    assert read(source) == (expected, passages)


def test_coqa_as_published_pairs_by_turn(tmp_path):
    turns = [{"input_text": "Who dug it?", "turn_id": 1}, {"input_text": "When?", "turn_id": 2}]
    answers = [{"input_text": "1790", "turn_id": 2}, {"input_text": "a miller", "turn_id": 1}]
    more = {"0": [{"input_text": "the miller", "turn_id": 1}]}
    row = {"id": "c", "story": WELL, "questions": turns, "answers": answers, "additional_answers": more}
    other = {"id": 7, "story": WELL, "questions": turns, "answers": answers[:1]}
    source = write(tmp_path / "coqa.json", {"data": [other, row]})
    with pytest.raises(InputError, match=r"data\[0\], turn 1: empty answer"):
        read_questions(source)
    found = read_questions(source, skip_bad_rows=True).table
    assert found["id"][:] == ["7-2", "c-1", "c-2"]
    assert found["answers"][:] == [["1790"], ["a miller", "the miller"], ["1790"]]


def test_the_gold_paragraph_is_a_supporting_one_with_the_answer_as_whole_words(tmp_path):
    context = [["A", ["Northern lights are green."]], ["B", ["No, it is not."]], ["C", ["no"]]]
    row = {"question": "Is it?", "answer": "no", "context": context}
    for facts, gold in [
        ([["A", 0], ["B", 0]], "No, it is not."),
        ([["A", 0]], "Northern lights are green."),
        ([], None),
        ([["D", 0]], None),
        ([["C", 0], ["B", 0]], "No, it is not."),
    ]:
        found = read_questions(write(tmp_path / "q.json", [row | {"supporting_facts": facts}]))
        assert found.table["passage_id"][:] == [gold and passage_id(gold)]
        assert len(found.passages) == 3


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (HOTPOT | {"context": [["Song", "no list"]]}, "a paragraph that is not a list of sentences"),
        (HOTPOT | {"context": {"a": [1]}}, "context is a dict, expected text"),
        (DPR | {"positive_ctxs": ["text"]}, "positive_ctxs is not a list of objects"),
        (DPR | {"hard_negative_ctxs": [{"title": "no text"}]}, "hard_negative_ctxs is not a list of objects"),
        (COQA_HUB | {"story": [WELL]}, "not those of CoQA"),
        (COQA_HUB | {"questions": []}, "not those of CoQA"),
        (KILT | {"output": [{"provenance": []}]}, "empty answer"),
        (TRIVIA_HUB | {"answer": {"value": "<unk>", "aliases": []}}, "empty answer"),
        (TRIVIA_HUB | {"answer": {"norm": "x"}}, "answer is a dict, expected text"),
        ({"question": "Who?", "answer": "x", "negative_ids": "p1"}, "negative_ids is a str, expected a list"),
    ],
)
def test_rows_that_break_their_layout_are_bad_rows(tmp_path, row, why):
    source = write(tmp_path / "q.jsonl", [row, asked() | {"input": "Who?"}], lines=True)
    with pytest.raises(InputError, match=f"line 1: .*{why}"):
        read_questions(source)
    assert len(read_questions(source, skip_bad_rows=True).table) == 1


def test_own_names_of_columns_come_before_layouts(tmp_path):
    row = {"input": "Who dug the well?", "output": "a miller", "q": "Why?", "title": "x", "key": "7"}
    source = write(tmp_path / "q.json", [row])
    assert read(source, columns=Columns(question="input", answer="output")) == ([asked()], [])
    with pytest.raises(InputError, match='"question", found "input", "output"'):
        read_questions(source)
    kilt = write(tmp_path / "k.json", [KILT])
    named = read_questions(kilt, columns=Columns(passage_id="wikipedia_id")).table
    assert named["passage_id"][:] == ["9"]
    assert read(kilt, columns=Columns(answer="answer")) == ([asked(id="k")], [])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"_id": "a", "question": "Who?", "golden_answers": ["x"]}, {"id": "a", "answers": ["x"]}),
        ({"_id": "a", "id": "b", "question": "Who?", "answer": "x"}, {"id": "b", "answers": ["x"]}),
        ({"id": "b", "question": "Who?", "answer": "x", "possible_answers": ["y"]}, {"id": "b", "answers": ["x"]}),
        ({"id": "b", "question": "Who?", "possible_answers": '["x", "y"]'}, {"id": "b", "answers": ["x", "y"]}),
        ({"id": "b", "question": "Who?", "ground_truth": "x", "passage": "p7"}, {"id": "b", "answers": ["x"]}),
    ],
)
def test_other_names_are_read_where_the_usual_ones_are_missing(tmp_path, row, expected):
    found = read_questions(write(tmp_path / "q.json", [row]))
    assert found.table.to_list() == [{"question": "Who?", "passage_id": None, "negative_ids": []} | expected]
    assert found.passages is None


@pytest.mark.parametrize("name", ["text", "passage", "content", "contents"])
def test_other_names_of_passages(tmp_path, name):
    source = write(tmp_path / "p.jsonl", [{"_id": "d1", "title": "Well", name: WELL}], lines=True)
    assert read_passages(source)[0].to_list() == [{"id": "d1", "title": "Well", "text": WELL}]
    (tmp_path / "p.csv").write_text(f"_ID,{name.upper()}\nd1,{SONG}\n")
    assert read_passages(str(tmp_path / "p.csv"))[0].to_list() == [{"id": "d1", "title": "", "text": SONG}]


# ---- whole JSON files


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ({"version": "0.1", "data": [{"question": "Who?", "answer": "x"}] * 2}, 2),
        ({"Data": [TRIVIA], "Domain": "Web"}, 1),
        ({"schema": {}, "data": [{"index": 0, "question": "Who?", "answer": "x"}]}, 1),
        ({"question": {"0": "Who?", "1": "When?"}, "answer": {"0": "x", "1": "y"}}, 2),
        ({"question": "Who?", "answer": "x", "data": {"a": 1}}, 1),
    ],
)
def test_rows_in_one_object(tmp_path, value, count):
    assert len(read_questions(write(tmp_path / "q.json", value)).table) == count


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"data": {"train": [], "test": []}}, 'expected "data" to be a list of rows, found an object (train, test)'),
        ({"data": ["x"]}, "data[0]: expected the SQuAD layout"),
        ({"data": [[1, 2]], "columns": ["a", "b"]}, "data[0]: expected the SQuAD layout"),
        ({"data": [{"question": "Who?"}, {"paragraphs": []}]}, "data[0]: expected the SQuAD layout"),
        ({"rows": [], "more": 1}, 'expected a column "question", found "rows", "more"'),
    ],
)
def test_objects_without_clear_rows_are_refused(tmp_path, value, words):
    with pytest.raises(InputError) as refused:
        read_questions(write(tmp_path / "q.json", value))
    assert words in str(refused.value)


def test_unanswerable_questions_say_how_they_are_used(tmp_path):
    qas = [
        {"id": "1", "question": "Who dug it?", "answers": [{"text": "a miller"}]},
        {"id": "2", "question": "Who drew it?", "answers": [], "is_impossible": True, "plausible_answers": ["x"]},
        {"id": "3", "question": "Who ate it?", "answers": [], "is_impossible": True},
    ]
    squad = {"data": [{"title": "Well", "paragraphs": [{"context": WELL, "qas": qas}]}]}
    flat = [{"question": row["question"], "answers": {"text": [], "answer_start": []}} for row in qas[1:]]
    for source in (write(tmp_path / "s.json", squad), write(tmp_path / "f.jsonl", flat, lines=True)):
        with pytest.raises(InputError) as refused:
            read_questions(source)
        message = str(refused.value)
        for words in ("2 rows cannot be used", "--no_answer reads them", "--context_noise", "--skip_bad_rows leaves"):
            assert message.count(words) == 1, message
        assert read_questions(source, needs_answer=False).table["answers"][-2:] == [[], []]


# ---- answers written into cells


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('["a smith", "the smith"]', ["a smith", "the smith"]),
        ("['a smith', \"the smith's\"]", ["a smith", "the smith's"]),
        ("{'text': ['a smith'], 'answer_start': [37]}", ["a smith"]),
        ("{'text': array(['1911', 'x'], dtype=object), 'answer_start': array([4, 1], dtype=int32)}", ["1911", "x"]),
        ("{'answer_start': array([], dtype=int32), 'text': array(['x'], dtype='<U1')}", ["x"]),
        ("['a smith' 'the smith']", ["a smith", "the smith"]),
        ("['a smith'\n 'b, c' \"d's\"]", ["a smith", "b, c", "d's"]),
        ("[array(['a', 'b'], dtype=object)]", ["a", "b"]),
        ("[{'text': 'a', 'answer_start': 3}, {'text': 'b'}]", ["a", "b"]),
        ('[null, "a"]', ["a"]),
        ("[None, 'a']", ["a"]),
        ("[1812, 1813]", ["1812", "1813"]),
        ("[1.5 2]", ["1.5", "2"]),
        # These only begin with a bracket, or are no list.
        ("[1] foo", ["[1] foo"]),
        ("[sic] he wrote", ["[sic] he wrote"]),
        ("{x | x > 0}", ["{x | x > 0}"]),
        ("[a, b]", ["[a, b]"]),
        ("array(['a'])", ["array(['a'])"]),
        ("('a', 'b')", ["('a', 'b')"]),
        ("['a'] and ['b'] are lists", ["['a'] and ['b'] are lists"]),
        ("1, 2", ["1, 2"]),
        ("True", ["True"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_lists_in_a_cell_are_lists_of_answers(tmp_path, cell, answers, extension):
    path = tmp_path / f"q.{extension}"
    quoted = '"' + cell.replace('"', '""') + '"'
    path.write_text(
        'question{0}answer\nWho?{0}{1}\nWho else?{0}"b"\n'.format("," if extension == "csv" else "\t", quoted)
    )
    assert read_questions(str(path)).table["answers"][:] == [answers, ["b"]]


@pytest.mark.parametrize(
    "cell", ["['a', 'b'", "['a' 'b' ... 'y' 'z']", "['a'; 'b']", "{'a', 'b'}", "{'text': ['a'}", "['a', nan]", "[['a']"]
)
def test_lists_that_cannot_be_parsed_are_bad_rows(tmp_path, cell):
    (tmp_path / "q.csv").write_text(f'question,answer\nWho?,"{cell}"\nWhen?,1911\n')
    if not cell.endswith(("]", "}")):
        assert read_questions(str(tmp_path / "q.csv")).table["answers"][0] == [cell]
        return
    with pytest.raises(InputError, match=r"q.csv, line 2: answer looks like a list or dict and cannot be parsed \("):
        read_questions(str(tmp_path / "q.csv"))


def test_formats_with_lists_keep_numbers_in_brackets(tmp_path):
    rows = [{"question": f"Q{n}?", "answer": text} for n, text in enumerate(["[1, 2]", "['a', 'b']", '["a"]', "[]"])]
    found = read_questions(write(tmp_path / "q.json", rows)).table["answers"][:]
    assert found == [["[1, 2]"], ["a", "b"], ["a"], ["[]"]]


NO_LITERALS = {
    "deep": "[" * 3000 + "'a'" + "]" * 3000,
    "escapes": "['" + "\\" * 999 + "']",
    "open": "{'a': " * 200 + "}",
    "surrogate": "['\ud800']",
    "numbers": "[" + "1 " * 50_000 + "x]",
    "quotes": "['" + "'' " * 50_000 + "]",
}


@pytest.mark.parametrize("name", NO_LITERALS)
def test_no_literal_crashes_or_takes_long(name):
    started = time.process_time()
    try:
        literal(NO_LITERALS[name], "answer", numbers=True)
    except BadValue as error:
        assert len(str(error)) < 250
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("answer", "read_as"),
    [
        (True, ["yes"]),
        (False, ["no"]),
        ([True, "indeed"], ["yes", "indeed"]),
        (1911.0, ["1911"]),
        (3.5, ["3.5"]),
        (-0.0, ["0"]),
    ],
)
def test_booleans_and_numbers_of_pandas(tmp_path, answer, read_as):
    missing = {"question": "R?", "answer": "x", "passage_id": math.nan, "id": math.nan}
    rows = [{"question": "Q?", "answer": answer, "passage_id": 2.0, "id": 1.0}, missing]
    found = read_questions(write(tmp_path / "q.jsonl", rows, lines=True)).table
    assert found["answers"][:] == [read_as, ["x"]]
    assert found["passage_id"][:] == ["2", None] and found["id"][0] == "1"
    with pytest.raises(InputError, match="question is a bool"):
        read_questions(write(tmp_path / "b.jsonl", [{"question": True, "answer": "x"}], lines=True))


# ---- BEIR folders


QUERIES = [
    {"_id": "q1", "text": "Who dug the well?", "metadata": {"answer": "a miller"}},
    {"_id": "q2", "text": "When was the song written?", "answers": ["1911"], "metadata": {}},
    {"_id": "q3", "text": "Who rang?", "metadata": {"answers": ["Ada", "Eve"]}},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td1\t2\nq2\td2\t1\nq3\td3\t0\n"


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "my [beir] set"
    (folder / "qrels").mkdir(parents=True)
    (folder / "qrels" / "train.tsv").write_text(QRELS)
    (folder / "qrels" / "dev.tsv").write_text("q3 0 d3 1\n".replace(" ", "\t"))
    write(folder / "queries.jsonl", QUERIES, lines=True)
    texts = [{"_id": f"d{n}", "title": "T", "text": text} for n, text in enumerate((WELL, SONG, OTHER), start=1)]
    packed = gzip.compress("".join(json.dumps(each) + "\n" for each in texts).encode())
    (folder / "corpus.jsonl.gz").write_bytes(packed)
    return folder


def test_beir_folders(beir):
    assert read_passages(str(beir))[0]["id"][:] == ["d1", "d2", "d3"]
    found = read_questions(str(beir))
    assert [(row["id"], row["answers"], row["passage_id"]) for row in found.table] == [
        ("q1", ["a miller"], "d1"),
        ("q2", ["1911"], "d2"),
    ]
    assert "1 queries without a relevant passage in the split train are left out" in found.report
    assert "1 queries have several relevant passages" in found.report
    held = read_questions(str(beir), split="validation").table
    assert [(row["id"], row["answers"], row["passage_id"]) for row in held] == [("q3", ["Ada", "Eve"], "d3")]


def test_faults_of_beir_folders(beir):
    with pytest.raises(InputError, match=r"expected qrels/test.tsv, found dev.tsv, train.tsv there.*--questions_split"):
        read_questions(str(beir), split="test")
    (beir / "qrels" / "train.tsv").write_text(QRELS + "q9\td1\t1\nq1\td1\tgood\n")
    with pytest.raises(InputError, match='the judged query "q9" is not in queries.jsonl') as refused:
        read_questions(str(beir))
    assert "line 7: expected query-id, corpus-id, score, found q1, d1, good" in str(refused.value)
    (beir / "qrels" / "train.tsv").write_text(QRELS)
    write(beir / "queries.jsonl", [{"_id": row["_id"], "text": row["text"]} for row in QUERIES], lines=True)
    with pytest.raises(InputError, match="queries.jsonl: expected answers, found none.*metadata"):
        read_questions(str(beir))
    assert len(read_questions(str(beir), needs_answer=False).table) == 2


def test_a_beir_folder_without_judgements_has_no_gold_passages(beir):
    for path in (beir / "qrels").iterdir():
        path.unlink()
    (beir / "qrels").rmdir()
    found = read_questions(str(beir))
    assert found.table["passage_id"][:] == [None] * 3 and "no qrels" in found.report


# ---- folders of save_to_disk, Arrow files

SAVED = [{"question": "Who dug it?", "answer": "a miller"}, {"question": "When?", "answer": "1790"}]


@pytest.mark.parametrize("name", ["plain", "with [1] brackets", "star *", "a.tsv", "q?"])
def test_saved_data_sets(tmp_path, name):
    folder, table = tmp_path / name, datasets.Dataset.from_list(SAVED)
    table.save_to_disk(str(folder / "one"))
    datasets.DatasetDict({"train": table, "validation": table.select([1])}).save_to_disk(str(folder / "two"))
    arrow = next((folder / "one").glob("*.arrow"))
    for source in (folder / "one", folder / "two", arrow):
        assert read_questions(str(source)).table["question"][:] == ["Who dug it?", "When?"]
    assert read_questions(str(folder / "two"), split="validation").table["answers"][:] == [["1790"]]
    with pytest.raises(InputError, match=r"the split test, found train, validation. Name one with --questions_split"):
        read_questions(str(folder / "two"), split="test")
    with pytest.raises(InputError, match=r"is a directory of another kind"):
        read_questions(str(folder))


def test_arrow_files_of_other_programs_and_broken_ones(tmp_path):
    table = pa.Table.from_pylist(SAVED)
    with pa.ipc.new_file(tmp_path / "q.arrow", table.schema) as writer:
        writer.write_table(table)
    assert len(read_questions(str(tmp_path / "q.arrow")).table) == 2
    whole = (tmp_path / "q.arrow").read_bytes()
    for broken in (b"no arrow", whole[:60], whole[:-20], whole[8:200]):
        (tmp_path / "b.arrow").write_bytes(broken)
        with pytest.raises(InputError, match="b.arrow: expected (an Arrow file, found a broken one|at least one row)"):
            read_questions(str(tmp_path / "b.arrow"))


def test_broken_saved_data_sets(tmp_path):
    datasets.Dataset.from_list(SAVED).save_to_disk(str(tmp_path / "s"))
    for name, content in (("state.json", "{}"), ("state.json", "no"), ("dataset_info.json", "[]")):
        kept = (tmp_path / "s" / name).read_text()
        (tmp_path / "s" / name).write_text(content)
        with pytest.raises(InputError, match="s: expected a data set of save_to_disk, found a broken one"):
            read_questions(str(tmp_path / "s"))
        (tmp_path / "s" / name).write_text(kept)
    next((tmp_path / "s").glob("*.arrow")).unlink()
    with pytest.raises(InputError, match="s: expected a data set of save_to_disk, found a broken one"):
        read_questions(str(tmp_path / "s"))


def test_a_folder_of_tables_names_the_pattern(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(SAVED[number:]), tmp_path / "data" / f"train-{number}.parquet")
    with pytest.raises(InputError, match=r'Name a file, or ".*/data/\*\.parquet"'):
        read_questions(str(tmp_path / "data"))
    assert len(read_questions(str(tmp_path / "data" / "*.parquet")).table) == 3


# ---- several files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four files of one question each, in a folder and under names with brackets."""
    place = tmp_path / "data [1]"
    place.mkdir()
    for name in ("a.tsv", "b.tsv", "c[1].tsv", "c1.tsv"):
        (place / name).write_text(f"What is in {name}?\tit\n")
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("a.tsv", ["a.tsv"]),
        (["b.tsv", "a.tsv"], ["b.tsv", "a.tsv"]),
        ("*.tsv", ["a.tsv", "b.tsv", "c1.tsv", "c[1].tsv"]),
        ("c[1].tsv", ["c[1].tsv"]),  # exists, so it is no pattern
        ("[ab].tsv", ["a.tsv", "b.tsv"]),
        (["?.tsv", "b.tsv", "c1.tsv"], ["a.tsv", "b.tsv", "c1.tsv"]),
        ("../data [1]/a.*", ["../data [1]/a.tsv"]),
        ("../**/b.tsv", ["../data [1]/b.tsv"]),
        ("user/name:config", ["user/name:config"]),
        ("missing.tsv", ["missing.tsv"]),
    ],
)
def test_sources(folder, given, names):
    assert sources_of(given) == names


@pytest.mark.parametrize("given", ["*.csv", "none/*.tsv", ["a.tsv", "z[0-9].tsv"]])
def test_a_pattern_without_files_is_refused(folder, given):
    with pytest.raises(InputError, match=r"Expected files that fit .*, found none. Check the pattern"):
        sources_of(given)


def test_questions_and_passages_of_several_files(folder):
    assert len(read_questions("*.tsv").table) == 4
    assert len(read_questions(["a.tsv", "b.tsv"]).table) == 2
    write(folder / "1.jsonl", [{"text": WELL}], lines=True)
    write(folder / "2.jsonl", [{"text": SONG}], lines=True)
    assert read_passages(["2.jsonl", "1.jsonl"])[0]["text"][:] == [SONG, WELL]
    (folder / "1.jsonl").unlink()
    (folder / "2.jsonl").unlink()
    assert size_of("*.tsv") == sum(path.stat().st_size for path in folder.iterdir()) and size_of(".") is None
    assert described(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more" and described("a") == "a"


def test_ids_are_unique_over_all_files(folder):
    row = {"id": "x", "question": "Who?", "answer": "y", "text": "one"}
    write(folder / "1.jsonl", [row], lines=True)
    write(folder / "2.jsonl", [row | {"text": "two"}], lines=True)
    with pytest.raises(InputError, match='2.jsonl, line 1: expected a new id, found "x", which 1.jsonl, line 1 has'):
        read_questions("*.jsonl")
    with pytest.raises(InputError, match='2.jsonl, line 1: expected a new id, found "x", which 1.jsonl, line 1 gave'):
        read_passages(["1.jsonl", "2.jsonl"])


def test_bad_rows_of_several_files_are_reported_together(folder):
    write(folder / "1.jsonl", [{"question": "", "answer": "y"}, {"question": "Q?", "answer": "y"}], lines=True)
    read = read_questions(["a.tsv", "1.jsonl"], skip_bad_rows=True)
    assert len(read.table) == 2 and read.report.startswith("a.tsv, 1.jsonl: 1 row skipped: 1.jsonl, line 1")
    write(folder / "2.jsonl", [{"frage": "Q?", "answer": "y"}], lines=True)
    with pytest.raises(InputError, match='2.jsonl: expected a column "question"'):
        read_questions(["1.jsonl", "2.jsonl"], skip_bad_rows=True)


def test_a_whole_run_over_several_files_is_read_as_one(tmp_path):
    passages, questions = tiny.corpus(10)
    for part in range(2):
        tiny.write_jsonl(tmp_path / f"q{part}.jsonl", questions[part::2])
    one = tiny.write_jsonl(tmp_path / "all.jsonl", questions[::2] + questions[1::2])
    tiny.write_jsonl(tmp_path / "p.jsonl", passages)
    assert read_questions(str(tmp_path / "q?.jsonl")).table[:] == read_questions(str(one)).table[:]
