"""The benchmark of made questions with tiny models: what each pair is trained on, the tables, and resuming."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from test_made_questions import Known

from benchmarks.quality import made_questions
from cozyrag.errors import InputError
from cozyrag.synthesis import running

SMALL = "--use_cpu --threads 1 --context_tokens 48 --answer_tokens 6 --rounds 1 --generator_steps 2 --retriever_steps 1"


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def known(monkeypatch):
    """A writer that knows the corpus; its reader is wrong about foxes, so the round trip rejects them."""
    writer, places = Known(), {each["text"]: each["id"] for each in tiny.corpus()[0]}
    own = writer._of
    writer._of = lambda passage: own(replace(passage, id=places[passage.text]))
    writer.answers = {each: "orange" if "fox" in each else answer for each, answer in writer.answers.items()}
    monkeypatch.setattr(running, "default_generator", lambda: "known")
    monkeypatch.setattr(running, "load_writer", lambda name, way, **how: writer)
    return writer


@pytest.fixture
def words(tmp_path, generator_path, retriever_path):
    """The command line of a study of 20 of 30 paragraphs, whose pairs are asked 8 questions about others."""
    passages, questions = tiny.corpus()
    of = {each["id"]: each for each in passages}
    rows = [
        each | {"title": of[each["passage_id"]]["title"], "context": of[each["passage_id"]]["text"]}
        for each in questions
    ]
    files = {
        "train": [each for each in rows if int(each["passage_id"][1:]) < 30],
        "dev": [each for each in rows if int(each["passage_id"][1:]) >= 30],
    }
    given = [
        part for name in files for part in (f"--{name}", str(tiny.write_jsonl(tmp_path / f"{name}.jsonl", files[name])))
    ]
    base = f"--generator {generator_path} --retriever {retriever_path} {SMALL}"
    return [*given, "--folder", str(tmp_path / "study"), "--paragraphs", "20", "--questions", "8", "--base", base]


def study(words):
    made_questions.Study(made_questions.parse(words)).run()


def test_a_study_trains_on_as_many_questions_of_each_kind_and_compares(tmp_path, words, known, capsys):
    study(words)
    folder, out = tmp_path / "study", capsys.readouterr().out
    asked, dev = (rows_of(folder / f"{name}.jsonl") for name in ("asked", "dev"))
    assert len(asked) == 20 and len(dev) == 8
    own = {each["id"] for each in asked}
    assert not own & {each["passage_id"] for each in dev} and len(rows_of(folder / "passages.jsonl")) > 20
    kinds = {name: rows_of(folder / "questions" / f"{name}.jsonl") for name in ("made", "unread", "real")}
    assert len({len(rows) for rows in kinds.values()}) == 1 and len(kinds["made"]) > 5
    assert all({each["passage_id"] for each in rows} <= own for rows in kinds.values())
    assert not any("fox" in each["question"] for each in kinds["made"])
    assert any("fox" in each["question"] for each in kinds["unread"])
    held = {each["passage_id"] for each in rows_of(folder / "questions" / "real.validation.jsonl")}
    assert held and not held & {each["passage_id"] for each in (*kinds["real"], *kinds["made"])}
    settings = {
        name: json.loads((folder / "pairs" / name / "settings.json").read_text()) for name in made_questions.VARIANTS
    }
    assert settings["untuned"]["rounds"] == 0 and settings["real"]["rounds"] == 1
    noise = {name: each["context_noise"] for name, each in settings.items()}
    assert noise == dict.fromkeys(noise, 0.0) | {"noise": 0.2}
    report = json.loads((folder / "report.json").read_text())
    assert set(report["scores"]) == set(made_questions.VARIANTS)
    pairs = {(test["first"], test["second"]) for test in report["tests"]}
    assert {("made", other) for other in ("untuned", "real", "unread", "noise")} <= pairs
    assert "| made against | EM | F1 | recall@5 |" in out and "over untuned" in out
    stages = {row["stage"]: row for row in rows_of(folder / "stages.jsonl")}
    assert stages["draft"]["questions"] == stages["draft"]["drafts"] == 40 and stages["draft"]["questions_a_minute"] > 0
    assert all(row["seconds"] >= 0 and row["processor_seconds"] >= 0 for row in stages.values())
    assert len(known.written) == 20


def test_a_stopped_study_does_no_stage_twice(tmp_path, words, known, monkeypatch, capsys):
    run, begun = made_questions.run, []

    def stopped(settings):
        begun.append(Path(settings.output.output_dir).name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        run(settings)

    monkeypatch.setattr(made_questions, "run", stopped)
    words = [*words, "--variants", "untuned", "made"]
    with pytest.raises(KeyboardInterrupt):
        study(words)
    known.written.clear()
    study(words)
    assert begun == ["untuned", "made", "made"] and known.written == []
    assert [row["stage"] for row in rows_of(tmp_path / "study" / "stages.jsonl")].count("train: untuned") == 1
    monkeypatch.setattr(made_questions, "run", None)
    capsys.readouterr()
    study(words)
    assert "train: made: done before" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"found other options: paragraphs \(was 20, now 19\)"):
        study([*words, "--paragraphs", "19"])


def test_drafting_resumes_and_its_rate_is_of_what_is_new(tmp_path, words, known):
    draft = known.draft

    def stopped(passages, count):
        if len(known.written) >= 16:
            raise KeyboardInterrupt
        return draft(passages, count)

    known.draft = stopped
    with pytest.raises(KeyboardInterrupt):
        study(words)
    known.draft = draft
    study([*words, "--variants", "untuned"])
    assert len(known.written) == 20
    (row,) = [row for row in rows_of(tmp_path / "study" / "stages.jsonl") if row["stage"] == "draft"]
    assert row["drafts"] == 40 and row["questions"] == 8


def test_the_share_of_the_gain_is_told_only_if_there_is_one():
    def scores(**means):
        return {name: {"em": {"mean": mean}, "f1": {"mean": mean}} for name, mean in means.items()}

    assert made_questions.gain_lines(scores(untuned=10.0, real=20.0, made=16.0, unread=12.0, noise=9.0), ["em"])[0] == (
        "em: real questions gain +10.0 points over untuned; of that made 60 %, unread 20 %, noise -10 %."
    )
    lines = made_questions.gain_lines(scores(untuned=10.0, real=11.0, made=16.0, unread=12.0, noise=9.0), [])
    assert lines[0] == "em: real questions gain +1.0 points over untuned, no more than noise."
    assert made_questions.gain_lines(scores(made=10.0), []) == []
