"""A typical first use: a folder of Markdown notes and a TSV of questions, from files to an answer in four commands."""

import json
from pathlib import Path

import pytest

from cozyrag import cli
from cozyrag.pipeline import CozyRAG
from cozyrag.run import train

NOTES, ASKED = Path(__file__).parent / "notes", Path(__file__).parent / "notes-questions.tsv"


def test_the_notes_become_passages_with_every_answer(tmp_path, capsys):
    output = tmp_path / "passages.jsonl"
    cli.run("passages", [str(NOTES), "--output", str(output), "--workers", "1"])
    assert "12 articles of 12 sources" in capsys.readouterr().out
    titles = {json.loads(line)["title"] for line in output.read_text(encoding="utf-8").splitlines()}
    assert {"Rain barrels", "Beehives", "The cat", "Bicycles"} <= titles
    cli.run("questions", [str(ASKED), "--check_only", "--passages", str(output)])
    assert "No problems.\n50 questions read" in capsys.readouterr().out


@pytest.mark.slow
def test_from_notes_to_an_answer(tmp_path, generator_path, retriever_path):
    """The models are tiny, so only the source of the answer is checked."""
    output, folder = tmp_path / "passages.jsonl", tmp_path / "my-rag"
    cli.run("passages", [str(NOTES), "--output", str(output), "--words", "40", "--workers", "1"])
    cli.run("questions", [str(ASKED), "--output", str(tmp_path / "questions.jsonl"), "--passages", str(output)])
    words = {
        "questions": tmp_path / "questions.jsonl",
        "passages": output,
        "output_dir": folder,
        "generator": generator_path,
    }
    words |= {"retriever": retriever_path, "rounds": 1, "generator_steps": 2, "retriever_steps": 2, "threads": 1}
    train([word for name, value in words.items() for word in (f"--{name}", str(value))])
    answer = CozyRAG.from_pretrained(folder).answer("Who is the vet of the cat?")
    assert isinstance(answer.text, str) and answer.passages[0].title == "The cat"
