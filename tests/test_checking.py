"""`cozyrag questions`: problems are found, named by file and line, and left out only on request."""

import gzip
import json

import pytest
import tiny

from cozyrag import cli
from cozyrag.commands.questions import AnswerSearch
from cozyrag.data.questions import read_questions
from cozyrag.errors import InputError

PASSAGES = [
    {"id": "p1", "title": "Vienna", "text": "Vienna is the capital of Austria. The Danube flows through it."},
    {"id": "p2", "title": "Graz", "text": "Graz lies on the Mur and has 300,000 people."},
    {"id": "p3", "title": "维也纳", "text": "维也纳是奥地利的首都。"},
]


def questions(arguments):
    cli.run("questions", arguments)


@pytest.fixture
def passages(tmp_path):
    return str(tiny.write_jsonl(tmp_path / "passages.jsonl", PASSAGES))


def write(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [
    ("Which river flows through Vienna?", "The Danube"),
    ("Which river is in Graz?", "Mur"),
    ("which river  is in graz?", "Mur"),
    ("Which river is in Graz?", "the Enns"),
    ("How many people live in Graz?", "300,000"),
    ("Who founded Linz?", "the Romans"),
    ("奥地利的首都是哪里？", "维也纳"),
]


def test_problems_are_counted_with_file_and_line(tmp_path, passages, capsys):
    questions([write(tmp_path / "qa.tsv", ROWS), "--check_only", "--passages", passages])
    out = capsys.readouterr().out
    assert "repeated: 1 of 7" in out and 'qa.tsv, line 3: "which river is in graz?" was asked at' in out
    assert "disagreeing: 1 of 7" in out and "qa.tsv, line 4" in out
    assert "no_passage: 2 of 7" in out and 'qa.tsv, line 6: no answer ("the Romans") in any passage' in out
    assert "length" not in out and "7 questions read, 6 would be kept." in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passages.jsonl", "qa.tsv"]


def test_questions_with_problems_are_left_out_on_request(tmp_path, passages):
    output = tmp_path / "q.jsonl"
    questions(
        [write(tmp_path / "qa.tsv", ROWS), "--output", str(output), "--passages", passages, "--drop", "no_passage"]
    )
    assert [each["question"] for each in made(output)] == [ROWS[i][0] for i in (0, 1, 4, 6)]
    facts = json.loads((tmp_path / "q.summary.json").read_text())
    assert (facts["read"], facts["kept"], facts["odd"]) == (7, 4, {"repeated": 1, "disagreeing": 1, "no_passage": 2})
    assert len(read_questions(str(output)).table) == 4


def test_no_problems_are_reported_too(tmp_path, passages, capsys):
    source = write(tmp_path / "qa.tsv", ROWS[:2])
    questions([source, "--check_only"])
    assert "No problems; answers were not looked up (no --passages)." in capsys.readouterr().out
    questions([source, "--check_only", "--passages", passages])
    assert "No problems.\n" in capsys.readouterr().out


def test_unusual_lengths(tmp_path, capsys):
    usual = [(f"What is the name of thing number {i}?", f"name {i}") for i in range(30)]
    odd = [("dd", "name"), ("What is it?", "word " * 60)]
    questions([write(tmp_path / "qa.tsv", [*usual, *odd]), "--check_only"])
    out = capsys.readouterr().out
    assert 'line 31: question of 1 words, most have about 8: "dd"' in out
    assert "line 32: answer of 60 words, most have about 2" in out and "length: 2 of 32" in out


def squad(path, context, answer):
    paragraph = {"context": context, "qas": [{"id": "a", "question": "Where?", "answers": [{"text": answer}]}]}
    path.write_text(json.dumps({"data": [{"title": "Vienna", "paragraphs": [paragraph]}]}))
    return str(path)


def test_squad_layout_keeps_its_contexts(tmp_path, capsys):
    source, output = squad(tmp_path / "s.json", "Vienna lies on the Danube.", "the Danube"), tmp_path / "q.jsonl.gz"
    questions([source, "--output", str(output)])
    rows = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
    assert rows == [
        {"id": "a", "question": "Where?", "answers": ["the Danube"], "title": "Vienna",
         "context": "Vienna lies on the Danube."}
    ]  # fmt: skip
    assert read_questions(str(output)).passages["text"][:] == ["Vienna lies on the Danube."]
    questions([squad(tmp_path / "t.json", "Vienna lies on a river.", "the Danube"), "--check_only"])
    assert "not_in_gold: 1 of 1" in capsys.readouterr().out


def test_gold_passages_by_id(tmp_path, passages, capsys):
    rows = [{"question": f"Q{i}?", "answer": "Mur", "passage_id": f"p{i}"} for i in (1, 2, 9)]
    source, output = tiny.write_jsonl(tmp_path / "q.jsonl", rows), tmp_path / "out.jsonl"
    questions([str(source), "--output", str(output), "--passages", passages])
    out = capsys.readouterr().out
    assert 'q.jsonl, line 1: no answer ("Mur") in its passage p1' in out and "not_in_gold: 1 of 3" in out
    assert "q.jsonl, line 3: its passage p9 is not among the passages" in out
    assert [each["passage_id"] for each in made(output)] == ["p1", "p2", "p9"]


def test_several_sources_and_one_id_twice(tmp_path):
    first = tiny.write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "question": "A?", "answers": ["a", "b"]}])
    rows = [{"id": "x", "question": "B?", "answer": "b"}, {"question": "C?", "answer": "c"}]
    second = tiny.write_jsonl(tmp_path / "b.jsonl", rows)
    output = tmp_path / "q.jsonl"
    with pytest.raises(InputError, match='b.jsonl, line 1: the id "x" was given at .*a.jsonl, line 1 already'):
        questions([str(first), str(second), "--output", str(output)])
    questions([str(first), str(second), "--output", str(output), "--skip_bad_rows"])
    assert [(each["question"], each["answers"]) for each in made(output)] == [("A?", ["a", "b"]), ("C?", ["c"])]


def test_rows_without_answer(tmp_path, capsys):
    source, output = write(tmp_path / "qa.tsv", [("A?", "a"), ("B?", " "), ("", "c")]), tmp_path / "q.jsonl"
    with pytest.raises(InputError, match="line 2: empty answer; .*line 3: empty question"):
        questions([source, "--output", str(output)])
    questions([source, "--check_only"])
    assert "2 rows skipped" in capsys.readouterr().out
    questions([source, "--output", str(output), "--no_answer", "--skip_bad_rows"])
    assert [each["answers"] for each in made(output)] == [["a"], []]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qa.tsv", "--output", "q.csv"], "ends in .jsonl or .jsonl.gz"),
        (["q.jsonl", "--output", "q.jsonl"], "is an input as well"),
        (["none.tsv", "--check_only"], "none.tsv, found none"),
    ],
)
def test_unusable_inputs_and_outputs(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "qa.tsv", ROWS)
    (tmp_path / "q.jsonl").write_text('{"question": "A?", "answer": "a"}\n')
    with pytest.raises(InputError, match=message):
        questions(words)


def test_an_output_or_a_check_is_required(capsys):
    with pytest.raises(SystemExit):
        questions(["qa.tsv"])
    assert "give --output FILE, or --check_only" in capsys.readouterr().err


# ---- searching for answers


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("The Danube", "On the danube, in spring.", True),
        ("Danube", "Danubes are many.", False),
        ("New York City", "in New York and York City", False),
        ("New York", "new new york", True),
        ("维也纳", "维也纳是奥地利的首都", True),
        ("维纳", "维也纳是奥地利的首都", False),
        ("...", "anything", False),
    ],
)
def test_answers_are_found_as_whole_words(answer, text, found):
    assert AnswerSearch([[answer]]).found_in(text) is found
    assert AnswerSearch([["nowhere", answer]]).found_in(text) is found


def test_one_of_the_answers_is_enough_and_every_question_has_its_own():
    search = AnswerSearch([["Mur", "Enns"], ["Danube"]])
    search.add_text("The Enns is green.")
    assert search.has_found(["Mur", "Enns"]) and not search.has_found(["Danube"]) and not search.has_found(["Mur"])


def test_layouts_keep_their_passages_and_several_files_of_passages_are_searched(tmp_path, capsys):
    contexts = {
        "positive_ctxs": [{"title": "Vienna", "text": PASSAGES[0]["text"]}],
        "negative_ctxs": [{"title": "", "text": "Linz is old."}],
        "hard_negative_ctxs": [{"title": "Graz", "text": PASSAGES[1]["text"]}],
    }
    source = tiny.write_jsonl(tmp_path / "dpr.jsonl", [{"question": "Which river?", "answers": ["Danube"]} | contexts])
    files = [str(tiny.write_jsonl(tmp_path / f"p{part}.jsonl", PASSAGES[part:][:2])) for part in range(2)]
    questions([str(source), "--output", str(tmp_path / "q.jsonl"), "--passages", *files])
    assert "No problems." in capsys.readouterr().out
    before, after = read_questions(str(source)), read_questions(str(tmp_path / "q.jsonl"))
    assert after.table[:] == before.table[:] and after.passages[:] == before.passages[:]
    assert len(after.passages) == 3 and len(after.table["negative_ids"][0]) == 1


def test_patterns_delimiters_and_folders(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"q{number}.csv").write_text(f"question:answer\nWho is {number}?:Ada\n")
    questions([str(tmp_path / "q*.csv"), "--check_only", "--delimiter", ":"])
    assert "3 questions read, 3 would be kept." in capsys.readouterr().out
    with pytest.raises(InputError, match="Expected files that fit .*z"):
        questions([str(tmp_path / "z*.csv"), "--check_only"])
    (tmp_path / "beir").mkdir()
    rows = [{"_id": "q", "text": "Which river?", "metadata": {"answer": "Mur"}}]
    tiny.write_jsonl(tmp_path / "beir" / "queries.jsonl", rows)
    tiny.write_jsonl(tmp_path / "beir" / "corpus.jsonl", [{"_id": "d", "text": "The Mur is a river."}])
    questions([str(tmp_path / "beir"), "--check_only", "--passages", str(tmp_path / "beir")])
    assert "no qrels" in (out := capsys.readouterr().out) and "No problems." in out


def test_named_negatives_are_kept(tmp_path):
    row = {"question": "Who?", "answer": "Ada", "passage_id": "p1", "negative_ids": ["p2"]}
    source = tiny.write_jsonl(tmp_path / "q.jsonl", [row])
    questions([str(source), "--output", str(tmp_path / "out.jsonl")])
    assert made(tmp_path / "out.jsonl")[0] == {
        "question": "Who?",
        "answers": ["Ada"],
        "passage_id": "p1",
        "negative_ids": ["p2"],
    }
