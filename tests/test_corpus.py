"""Which passages are searched, and which questions train and validate, for every way of giving the files."""

import pytest
import tiny

from cozyrag.data.corpus import load_corpus
from cozyrag.data.passages import passage_id
from cozyrag.data.rows import COLUMNS, Columns
from cozyrag.errors import InputError

PASSAGES, QUESTIONS = tiny.corpus(20)  # 20 passages, two questions each


def load(questions, **options):
    options = {
        "eval_questions": None,
        "passages": None,
        "questions_split": "train",
        "eval_split": "validation",
        "passages_split": "train",
        "columns": COLUMNS,
        "max_questions": None,
        "max_eval_questions": None,
        "eval_share": 0.1,
        "skip_bad_rows": False,
        "seed": 1,
        "info": lambda text: None,
    } | options
    return load_corpus(
        questions=str(questions),
        **{name: str(value) if hasattr(value, "joinpath") else value for name, value in options.items()},
    )


def with_context(rows, *, drop=("passage_id",)):
    """Question rows that carry their passage instead of naming it."""
    texts = {passage["id"]: passage for passage in PASSAGES}
    carried = [
        row | {"context": texts[row["passage_id"]]["text"], "title": texts[row["passage_id"]]["title"]} for row in rows
    ]
    return [{name: value for name, value in row.items() if name not in drop} for row in carried]


@pytest.fixture
def write(tmp_path):
    return lambda name, rows: tiny.write_jsonl(tmp_path / name, rows)


@pytest.fixture
def passages(write):
    return write("passages.jsonl", PASSAGES)


# ---- where passages come from


def test_passages_come_from_the_contexts_of_both_question_files(write):
    train, validation = QUESTIONS[:24], QUESTIONS[20:30]  # passages 0 to 11 and 10 to 14
    corpus = load(
        write("train.jsonl", with_context(train)), eval_questions=write("eval.jsonl", with_context(validation))
    )
    assert corpus.passages["text"][:] == [passage["text"] for passage in PASSAGES[:15]]
    assert corpus.passages["title"][:] == [passage["title"] for passage in PASSAGES[:15]]
    assert corpus.passages["id"][:] == [passage_id(passage["text"]) for passage in PASSAGES[:15]]
    assert corpus.eval_questions["passage_id"][:] == [
        passage_id(PASSAGES[number]["text"]) for number in (10, 10, 11, 11, 12, 12, 13, 13, 14, 14)
    ]


def test_contexts_of_one_of_the_files_are_enough(write):
    plain = [{name: value for name, value in row.items() if name != "passage_id"} for row in QUESTIONS[20:]]
    corpus = load(write("train.jsonl", with_context(QUESTIONS[:20])), eval_questions=write("eval.jsonl", plain))
    assert len(corpus.passages) == 10 and corpus.eval_questions["passage_id"][:] == [None] * 20
    corpus = load(write("train.jsonl", plain), eval_questions=write("eval.jsonl", with_context(QUESTIONS[:20])))
    assert len(corpus.passages) == 10


def test_a_passage_file_is_taken_whole_and_in_order(write, passages):
    corpus = load(write("q.jsonl", QUESTIONS[:4]), eval_questions=write("e.jsonl", QUESTIONS[4:6]), passages=passages)
    assert [dict(row) for row in corpus.passages] == PASSAGES
    assert corpus.questions["id"][:] == ["q0a", "q0b", "q1a", "q1b"] and corpus.eval_questions["id"][:] == [
        "q2a",
        "q2b",
    ]


def test_a_passage_file_takes_precedence_over_the_contexts(write):
    pool = write("pool.jsonl", [{"title": "", "text": passage["text"]} for passage in PASSAGES])
    corpus = load(write("q.jsonl", with_context(QUESTIONS[:6])), passages=pool)
    assert corpus.passages["text"][:] == [passage["text"] for passage in PASSAGES]


def test_no_passages_anywhere_is_refused_with_both_remedies(write):
    questions = write("q.jsonl", [{"question": "a?", "answers": ["b"]}, {"question": "c?", "answers": ["d"]}])
    with pytest.raises(InputError) as caught:
        load(questions)
    assert all(
        word in str(caught.value)
        for word in (str(questions), "'context'", "--passages FILE", "question file with contexts")
    )


def test_an_unknown_gold_passage_is_refused_naming_file_question_and_passage(write, passages):
    good, bad = (
        write("good.jsonl", QUESTIONS[:4]),
        write("bad.jsonl", [*QUESTIONS[4:6], QUESTIONS[6] | {"passage_id": "p99"}]),
    )
    for options in (
        {"questions": bad},
        {"questions": bad, "eval_questions": good},
        {"questions": good, "eval_questions": bad},
    ):
        with pytest.raises(InputError) as caught:
            load(**options, passages=passages)
        message = str(caught.value)
        assert all(word in message for word in (f"{bad}, question 'q3a'", "'p99'", "20 passages")), message


def test_questions_without_gold_passage_are_accepted(write, passages):
    rows = [{"question": row["question"], "answers": row["answers"]} for row in QUESTIONS]
    corpus = load(write("q.jsonl", rows), passages=passages)
    assert set(corpus.questions["passage_id"][:]) == {None}


def test_contexts_are_found_by_their_text_in_a_passage_file_with_ids_of_its_own(write, passages):
    rows = with_context(QUESTIONS[:4])
    rows[0]["context"] = "A text that the passage file does not have."
    lines = []
    corpus = load(
        write("q.jsonl", rows), passages=passages, eval_questions=write("e.jsonl", QUESTIONS[4:6]), info=lines.append
    )
    assert corpus.questions["passage_id"][:] == [None, *(row["passage_id"] for row in QUESTIONS[1:4])]
    assert any("1 of 4 questions are not among the passages" in text for text in lines)


# ---- which questions


@pytest.mark.parametrize(("share", "held"), [(0.1, 4), (0.5, 20), (0.04, 2)])
def test_a_share_is_held_out_and_no_gold_passage_is_on_both_sides(write, passages, share, held):
    corpus = load(write("q.jsonl", QUESTIONS), passages=passages, eval_share=share)
    train, validation = corpus.questions, corpus.eval_questions
    assert (len(train), len(validation)) == (40 - held, held)
    assert sorted(train["id"][:] + validation["id"][:]) == sorted(row["id"] for row in QUESTIONS)
    assert not set(train["passage_id"][:]) & set(validation["passage_id"][:])


def test_max_eval_questions_caps_the_hold_out_and_leaves_the_rest_for_training(write, passages):
    corpus = load(write("q.jsonl", QUESTIONS), passages=passages, eval_share=0.5, max_eval_questions=6)
    assert (len(corpus.questions), len(corpus.eval_questions)) == (34, 6)


def test_max_questions_samples_after_the_hold_out(write, passages):
    whole = load(write("q.jsonl", QUESTIONS), passages=passages)
    few = load(write("q.jsonl", QUESTIONS), passages=passages, max_questions=7)
    assert few.eval_questions["id"][:] == whole.eval_questions["id"][:]
    assert len(few.questions) == 7 and set(few.questions["id"][:]) < set(whole.questions["id"][:])
    assert not set(few.questions["passage_id"][:]) & set(few.eval_questions["passage_id"][:])


def test_limits_sample_both_given_files_and_keep_all_passages(write, passages):
    options = {"eval_questions": write("e.jsonl", QUESTIONS[20:]), "passages": passages}
    corpus = load(write("q.jsonl", QUESTIONS[:20]), **options, max_questions=5, max_eval_questions=3)
    assert (len(corpus.questions), len(corpus.eval_questions), len(corpus.passages)) == (5, 3, 20)
    everything = load(write("q.jsonl", QUESTIONS[:20]), **options)
    assert (len(everything.questions), len(everything.eval_questions)) == (20, 20)


@pytest.mark.parametrize("options", [{"max_questions": 10}, {"max_questions": 10, "eval_share": 0.3}])
def test_only_the_seed_changes_the_sample(write, passages, options):
    path = write("q.jsonl", QUESTIONS)

    def ids(seed):
        corpus = load(path, passages=passages, seed=seed, **options)
        return corpus.questions["id"][:], corpus.eval_questions["id"][:]

    assert ids(1) == ids(1)
    assert ids(1)[0] != ids(2)[0] and ids(1)[1] != ids(2)[1]


# ---- columns, bad rows


def test_column_names_reach_both_readers(write):
    renamed = [
        {"q": row["question"], "a": row["answers"], "key": row["id"], "gold": row["passage_id"]} for row in QUESTIONS
    ]
    pool = write("p.jsonl", [{"key": row["id"], "name": row["title"], "body": row["text"]} for row in PASSAGES])
    columns = Columns(question="q", answer="a", context="c", title="name", id="key", passage_id="gold", text="body")
    validation = write("e.jsonl", renamed[30:])
    corpus = load(write("q.jsonl", renamed[:30]), eval_questions=validation, passages=pool, columns=columns)
    assert [dict(row) for row in corpus.passages] == PASSAGES
    read = [dict(row) for row in corpus.questions] + [dict(row) for row in corpus.eval_questions]
    assert read == [row | {"negative_ids": []} for row in QUESTIONS]


def test_bad_rows_stop_the_run_or_are_reported_once_for_each_file(write):
    bad = {"id": "x", "question": "", "answers": ["y"]}
    files = {
        "eval_questions": write("e.jsonl", [*QUESTIONS[4:6], bad]),
        "passages": write("p.jsonl", [*PASSAGES, {"id": "p77", "text": " "}]),
    }
    questions = write("q.jsonl", [*QUESTIONS[:4], bad])
    with pytest.raises(InputError, match="q.jsonl, line 5: empty question.*--skip_bad_rows"):
        load(questions, **files)
    lines = []
    corpus = load(questions, **files, skip_bad_rows=True, info=lines.append)
    assert [len(table) for table in (corpus.questions, corpus.eval_questions, corpus.passages)] == [4, 2, 20]
    assert [
        name in text and "1 row skipped" in text
        for name, text in zip(("q.jsonl", "e.jsonl", "p.jsonl"), lines, strict=True)
    ] == [True] * 3


def test_a_held_out_file_reports_its_bad_rows_once(write, passages):
    lines = []
    load(
        write("q.jsonl", [*QUESTIONS, {"question": "", "answers": ["y"]}]),
        passages=passages,
        skip_bad_rows=True,
        info=lines.append,
    )
    assert len(lines) == 1


# ---- several files, questions without answers, hard negatives


def test_several_files_and_patterns_are_one_corpus(write, tmp_path):
    for name, rows in {"q1": QUESTIONS[:20], "q2": QUESTIONS[20:30], "e": QUESTIONS[30:]}.items():
        write(f"{name}.jsonl", rows)
    for name, rows in {"p1": PASSAGES[:7], "p2": PASSAGES[7:]}.items():
        write(f"{name}.jsonl", rows)
    whole = {"questions": write("q.jsonl", QUESTIONS[:30]), "eval_questions": tmp_path / "e.jsonl"}
    one = load(**whole, passages=write("p.jsonl", PASSAGES))
    several = load(
        str(tmp_path / "q[12].jsonl"),
        eval_questions=[str(tmp_path / "e.jsonl")],
        passages=[str(tmp_path / "p1.jsonl"), str(tmp_path / "p2.jsonl")],
    )
    for table in ("questions", "eval_questions", "passages"):
        assert getattr(several, table)[:] == getattr(one, table)[:]


def test_questions_without_an_answer_are_read_if_asked_for(write, passages):
    rows = [*QUESTIONS[:10], {"id": "x", "question": "Who?", "answers": []}]
    source = write("q.jsonl", rows)
    with pytest.raises(InputError, match="line 11: empty answer.*--no_answer reads them"):
        load(source, passages=passages)
    corpus = load(source, passages=passages, needs_answer=False, eval_questions=source)
    assert corpus.questions["answers"][:][-1] == [] and len(corpus.eval_questions) == 11


def test_a_delimiter_is_used_for_all_files(write, tmp_path):
    for name, text in {"q": "question:answer\nWho?:Ada\nWhen?:now\n", "p": "title:text\nA:Ada is old.\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    files = {"passages": tmp_path / "p.csv", "eval_questions": tmp_path / "q.csv"}
    corpus = load(tmp_path / "q.csv", **files, delimiter=":")
    assert corpus.questions["question"][:] == ["Who?", "When?"] and corpus.passages["title"][:] == ["A"]


def dpr(number, negatives):
    texts = [row["text"] for row in PASSAGES]
    contexts = {
        "positive_ctxs": [{"title": "", "text": texts[number]}],
        "hard_negative_ctxs": [{"title": "", "text": text} for text in negatives],
    }
    return {"question": QUESTIONS[2 * number]["question"], "answers": QUESTIONS[2 * number]["answers"]} | contexts


def test_hard_negatives_are_among_the_passages_or_counted(write, passages):
    texts = [row["text"] for row in PASSAGES]
    source = write("dpr.jsonl", [dpr(0, [texts[5], "Not a passage."]), dpr(1, [texts[5], texts[6]])])
    lines = []
    corpus = load(source, passages=passages, eval_questions=source, info=lines.append)
    assert corpus.questions["passage_id"][:] == [PASSAGES[0]["id"], PASSAGES[1]["id"]]
    assert corpus.questions["negative_ids"][:] == [[PASSAGES[5]["id"]], [PASSAGES[5]["id"], PASSAGES[6]["id"]]]
    assert [text for text in lines if "1 hard negatives are not among the passages" in text]
    alone = load(source, eval_questions=source)
    assert sorted(alone.passages["text"][:]) == sorted([*texts[:2], *texts[5:7], "Not a passage."])
    assert [len(each) for each in alone.questions["negative_ids"]] == [2, 2]


def test_hard_negatives_may_be_named_by_their_ids(write, passages):
    rows = [row | {"negative_ids": ["p7", 7, "p8"]} for row in QUESTIONS[:4]]
    corpus = load(write("q.jsonl", rows), passages=passages, eval_questions=write("e.jsonl", rows))
    assert corpus.questions["negative_ids"][:] == [["p7", "p8"]] * 4
