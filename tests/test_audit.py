"""The leak audit: overlap with training, checked against a comparison of all pairs, and the audit of a run."""

import json
import random
import sys

import pytest

from cozyrag import cli
from cozyrag.evaluation.metrics import normalize_answer
from cozyrag.evaluation.overlap_audit import (
    PARTS,
    audit,
    audit_table,
    base_notes,
    brief,
    examples_alike,
    near_duplicates,
    part_of,
    part_scores,
)

TRAIN = {
    "id": ["t1", "t2", "t3"],
    "question": ["Who was the first man in space?", "How long is the river Nile?", "What is a lamp?"],
    "answers": [["Yuri Gagarin"], ["6,650 km", "about 6,650 km"], ["a light"]],
    "passage_id": ["p1", "p2", None],
}
EVALUATED = {
    "id": ["q1", "q2", "q3", "q4", "q5"],
    "question": [
        "who was the FIRST man in space",  # the same question in another form
        "Who was it that flew with Vostok?",  # another question with a known answer
        "In which sea does it end?",  # about a gold passage of training
        "How long is the river Rhine?",  # one word of five is another: 3 of 9 word pairs differ on each side
        "Who painted this?",
    ],
    "answers": [["Gagarin"], ["the Yuri Gagarin!"], ["Mediterranean"], ["1,230 km"], ["", "the"]],
    "passage_id": ["p7", None, "p2-again", "p9", None],
}
TEXTS = {"p1": "One.", "p2": "The Nile is long.", "p2-again": "Nile is long", "p7": "Seven.", "p9": "Nine."}


def pairs_of(text):
    words = ["", *normalize_answer(text).split(), ""]
    return set(zip(words, words[1:], strict=False))


def test_overlaps_by_hand():
    found = audit(TRAIN, EVALUATED, TEXTS)
    assert found["overlaps"] == {"q1": ["question"], "q2": ["answer"], "q3": ["passage"]}
    assert found["counts"] == {"question": 1, "passage": 1, "answer": 1, "nothing seen": 2}
    assert (found["train_questions"], found["questions"], found["similarity"]) == (3, 5, 0.6)
    [near] = found["near_duplicates"]
    assert (near["id"], near["train_id"], near["similarity"]) == ("q1", "t1", 1.0)
    assert "q4" in audit(TRAIN, EVALUATED, TEXTS, similarity=0.4)["overlaps"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9, 1.0])
def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(similarity):
    rng = random.Random(11)
    words = "who what is the of river lamp long man first in space tower".split()
    train, asked = ([" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(150)] for _ in range(2))
    found = dict(near_duplicates(train, asked, similarity))
    for row, question in enumerate(asked):
        own = pairs_of(question)
        likeness = [len(own & pairs_of(other)) / len(own | pairs_of(other)) for other in train]
        best = max(likeness)
        if best >= similarity:
            assert found[row] == (likeness.index(best), pytest.approx(best)), question
        else:
            assert row not in found


def test_parts_and_their_scores():
    assert [part_of(kinds) for kinds in (["question", "answer"], ["passage"], ["answer"], [])] == [
        PARTS[1], PARTS[1], PARTS[2], PARTS[3],
    ]  # fmt: skip
    names = ("f1", "recall@1", "recall@5", "recall@20", "mrr@10", "answer_in_context", "ndcg@10")
    rows = [{"id": key, "em": float(key == "q5")} | dict.fromkeys(names, 1.0) for key in EVALUATED["id"]]
    scores = part_scores(audit(TRAIN, EVALUATED, TEXTS), rows)
    assert {part: (own["questions"], own["em"]) for part, own in scores.items()} == {
        "all": (5, 20.0), PARTS[1]: (2, 0.0), PARTS[2]: (1, 0.0), PARTS[3]: (2, 50.0),
    }  # fmt: skip
    table = audit_table(scores).splitlines()
    assert table[0] == "| part of the questions | questions | em | f1 | recall@5 |"
    assert table[-1] == "| nothing seen | 2 | 50.0 (0.0 to 100.0) | 100.0 (100.0 to 100.0) | 100.0 |"


def test_what_base_models_are_known_to_be_trained_on():
    notes = base_notes("sentence-transformers/all-MiniLM-L6-v2", "someone/unknown")
    assert set(notes) == {"retriever"} and "SQuAD" in notes["retriever"]["trained_on"]
    assert base_notes("embedded", "embedded")["retriever"] == notes["retriever"]
    assert base_notes("embedded", "embedded")["generator"]["source"].endswith("README.md")
    assert base_notes("", "") == {}
    text = brief(audit(TRAIN, EVALUATED, TEXTS, bases=notes))
    assert "1 (20.0 %) have nearly the same question" in text and "2 (40.0 %) share nothing" in text
    assert "Note: the retriever, all-MiniLM-L6-v2, was itself trained on" in text
    assert "who was the FIRST man in space" in examples_alike(audit(TRAIN, EVALUATED, TEXTS))


@pytest.fixture(scope="module")
def output(tmp_path_factory, corpus_files, generator_path, retriever_path):
    """Output folder of a run that only evaluates."""
    from cozyrag.run import train

    folder = tmp_path_factory.mktemp("audited") / "out"
    files = [part for name, path in corpus_files.items() for part in (f"--{name}", str(path))]
    models = ["--retriever", str(retriever_path), "--generator", str(generator_path)]
    train([*files, *models, "--rounds", "0", "--threads", "1", "--output_dir", str(folder)])
    return folder


def test_a_run_writes_its_audit(output):
    written = json.loads((output / "audit.json").read_text())
    assert (written["train_questions"], written["questions"]) == (64, 16)
    assert (
        written["counts"]["passage"] == 0 and 0 < written["counts"]["answer"] < 16
    )  # colours come again, years do not
    assert written["parts"]["all"]["questions"] == 16


def test_the_command_audits_a_folder_and_settings(output, corpus_files, monkeypatch, capsys):
    before = (output / "audit.json").read_text()
    (output / "audit.json").unlink()
    monkeypatch.setattr(sys, "argv", ["cozyrag", "audit", str(output)])
    cli.main()
    out = capsys.readouterr().out
    assert "Leak audit of 16 questions against 64" in out and "| answer seen | " in out
    assert (output / "audit.json").read_text() == before
    settings = ["--questions", str(corpus_files["questions"]), "--passages", str(corpus_files["passages"])]
    monkeypatch.setattr(sys, "argv", ["cozyrag", "audit", *settings])
    cli.main()
    assert "Leak audit of " in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [(["nowhere"], "settings.json"), (["a", "b"], "one folder")])
def test_the_command_refuses_with_a_sentence(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cozyrag", "audit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
