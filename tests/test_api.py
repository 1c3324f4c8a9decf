"""Training from Python, as in a notebook: rows of any form, calls repeated, off the main thread; wrong values."""

import json
import signal
import threading
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from kill_run import differences, left
from short_run import at_step, send

import cozyrag
from cozyrag.data.given import lines_of
from cozyrag.errors import InputError
from cozyrag.runtime.signals import Interrupted

PASSAGES, QUESTIONS = tiny.corpus()
TRAIN, HELD_OUT = QUESTIONS[:64], QUESTIONS[64:]


@pytest.fixture(scope="module")
def small(generator_path, retriever_path):
    """Settings of a run of one round, as keywords; those of the fixture `short_run`."""
    return {
        "generator": generator_path, "retriever": str(retriever_path), "rounds": 1, "generator_steps": 5,
        "retriever_steps": 3, "generator_batch_size": 8, "retriever_batch_size": 8, "context_tokens": 48, "top_k": 2,
        "answer_tokens": 4, "threads": 1, "logging_steps": 2, "generator_learning_rate": 1e-3,
        "retriever_learning_rate": 1e-3, "feedback_weight": 0.5, "mixed_precision": "no",
    }  # fmt: skip


def untrained(small):
    return small | {"rounds": 0}


def test_rows_train_the_same_pair_as_files_on_the_command_line(small, undisturbed, tmp_path):
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
    pair = cozyrag.train(
        datasets.Dataset.from_list(TRAIN), PASSAGES, eval_questions=HELD_OUT, output_dir=tmp_path / "out", **small
    )
    assert isinstance(pair, cozyrag.CozyRAG) and pair.answer("What colour is the fox 0?").passages
    found = left(tmp_path / "out", rounds=1)
    assert differences(undisturbed, found) == []
    assert not datasets.are_progress_bars_disabled() and transformers.utils.logging.is_progress_bar_enabled()


def test_a_notebook_can_train_twice_with_other_precisions_and_off_the_main_thread(small, tmp_path, monkeypatch):
    """Accelerate's state of the first run would refuse the second; signals are the main thread's."""
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests of this process leave theirs
    monkeypatch.delenv("COZYRAG_FLOAT32")
    monkeypatch.setattr("cozyrag.runtime.precision.native_bf16", lambda device: True)
    before, made = signal.getsignal(signal.SIGINT), []

    def work(precision):
        settings = untrained(small) | {"mixed_precision": precision, "output_dir": tmp_path / precision}
        made.append(cozyrag.train(TRAIN, PASSAGES, eval_questions=HELD_OUT, **settings))

    for precision in ("no", "bf16"):
        thread = threading.Thread(target=work, args=(precision,))
        thread.start()
        thread.join()
    assert len(made) == 2 and signal.getsignal(signal.SIGINT) is before and not PartialState._shared_state


def test_an_interrupted_call_resumes_with_the_same_rows_and_refuses_others(small, undisturbed, tmp_path, monkeypatch):
    settings = small | {"output_dir": str(tmp_path / "out"), "eval_questions": HELD_OUT, "passages": PASSAGES}
    with monkeypatch.context() as patched:
        at_step(patched, 3, send(signal.SIGTERM))
        with pytest.raises(Interrupted, match="is saved in"):
            cozyrag.train(TRAIN, **settings)
    with pytest.raises(InputError, match="Expected the questions that the interrupted run was given.*out/given"):
        cozyrag.train(TRAIN[1:], **settings)
    cozyrag.train(TRAIN, **settings)
    assert differences(undisturbed, left(tmp_path / "out", rounds=1)) == []
    with pytest.raises(InputError, match="holds a finished run"):
        cozyrag.train(TRAIN[1:], **settings)
    assert len((tmp_path / "out" / "given" / "questions.jsonl").read_text().splitlines()) == len(TRAIN)


def test_paths_are_read_where_they_are(small, corpus_files, tmp_path):
    pair = cozyrag.train(
        Path(corpus_files["questions"]), [str(corpus_files["passages"])], eval_questions=corpus_files["eval_questions"],
        output_dir=tmp_path / "out", **untrained(small),
    )  # fmt: skip
    assert len(pair.index.passages.ids) == 40 and not (tmp_path / "out" / "given").exists()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["questions"] == str(corpus_files["questions"])


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"roundz": 2}, r"unknown setting 'roundz' \(did you mean 'rounds'\?\)"),
        ({"generator_step": 2}, "did you mean 'generator_steps'"),
        ({"rounds": 2.5}, "train: argument --rounds: invalid int value: '2.5'"),
        ({"rounds": None}, "a value of the kind int for rounds, found None"),
        ({"rounds": [1]}, "a value of the kind int for rounds"),
        ({"output_dir": 3}, "a value of the kind str for output_dir, found 3"),
        ({"retrieval": "densee"}, "invalid choice: 'densee'"),
        ({"report_to": [1]}, "for report_to, found 1"),
        ({"top_k": 0}, "--top_k: expected a value of at least 1, found 0"),
        ({"plan": True}, "Use `cozyrag plan` instead"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence_and_nothing_is_written(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        cozyrag.train(TRAIN, PASSAGES, **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "questions: expected a path.*found None"),
        (3, "found a int"),
        (b"qa.tsv", "found a bytes"),
        ("", "questions: expected a path or a Hub name, found ''"),
        ([], "at least one row or path, found an empty list"),
        ({"question": "a?"}, "found a dict. Put the rows into a list"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_list(TRAIN)),
            r"DatasetDict. Choose a split, such as questions",
        ),
        (pd.DataFrame(TRAIN), "DataFrame. Give Dataset.from_pandas"),
        (["qa.tsv", {"question": "a?"}], "questions, row 1: expected a dictionary .*found 'qa.tsv'"),
        ([TRAIN[0], ("a?", "b")], "questions, row 2: expected a dictionary"),
        ([{"question": "a?", "answer": {("b",): 1}}], "questions, row 1: .* what JSON cannot hold"),
        ([{"question": "a?", "answer": ["b"]}, {"question": ""}], "questions.jsonl, line 2: empty question"),
    ],
)
def test_questions_of_another_kind_are_refused(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        cozyrag.train(given, PASSAGES, output_dir=tmp_path / "out", generator="scratch", use_cpu=True)


def test_values_of_arrow_numpy_and_calendars_become_text_numbers_and_lists():
    table = datasets.Dataset.from_dict(
        {"question": ["a?"], "answers": [["b", "c"]], "when": [np.datetime64("2020-01-01", "s")]}
    )
    assert json.loads(lines_of("questions", table))["when"].startswith("2020-01-01")
    rows = [{"question": "a\u2028b\ud800?", "answers": np.array(["b"]), "n": np.int64(3)}]
    text = lines_of("questions", rows)
    assert text.count("\n") == 1 and text.isascii()
    assert json.loads(text) == {"question": "a\u2028b\ud800?", "answers": ["b"], "n": 3}
