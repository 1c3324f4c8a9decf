"""The benchmark scripts on a tiny corpus: that their rows are what they say, and that an index is made once."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import corpus, write_jsonl

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(questions to ask, questions whose passages are searched too)."""
    folder = tmp_path_factory.mktemp("benchmark")
    passages, questions = corpus(24)
    rows = [
        {"id": q["id"], "question": q["question"], "answers": q["answers"], "title": p["title"], "context": p["text"]}
        for q, p in ((q, passages[n // 2]) for n, q in enumerate(questions))
    ]
    return write_jsonl(folder / "asked.jsonl", rows[:24]), write_jsonl(folder / "others.jsonl", rows[24:])


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()


def lines_of(table):
    return {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table.splitlines() if line.startswith("| ")
    }


def test_reciprocal_rank_fusion_by_hand(benchmark):
    rankings = np.array([[4, 7, 9]]), np.array([[7, 5, 4]])
    # 7: 1/62 + 1/61; 4: 1/61 + 1/63; 5: 1/62; 9: 1/63
    assert benchmark("retrieval").reciprocal_rank_fusion(rankings, 3).tolist() == [[7, 4, 5]]


def test_scores_of_a_table_line_by_hand(benchmark):
    rows = np.array([[5, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 9], [8, 7, 0, 1, 2, 3]])
    line = benchmark("retrieval").scores_of(rows, np.array([5, 9, 100]))
    assert [cell.split(" (")[0] for cell in line.split(" | ")] == ["33.3", "33.3", "66.7", "38.9"]


def test_retrieval_prints_its_rows_and_makes_the_index_once(
    benchmark, files, retriever_path, tmp_path, monkeypatch, capsys
):
    arguments = [
        *("--questions", files[0], "--also_passages", files[1], "--weigh_on", files[1]),
        *("--index", tmp_path / "index", "--retriever", retriever_path),
    ]
    module = benchmark("retrieval")
    run(module, monkeypatch, *arguments)
    first = capsys.readouterr().out
    assert "24 questions, 24 passages" in first
    rows = lines_of(first)
    assert list(rows)[1:3] == ["BM25", "vectors"] and len(rows) == 6  # with the header
    assert any(name.startswith("both, best sentences") for name in rows)
    assert rows["BM25"][0].startswith("100.0")  # every question names its thing and number
    made = (tmp_path / "index" / "vectors.safetensors").stat().st_mtime_ns
    run(module, monkeypatch, *arguments)
    assert capsys.readouterr().out == first
    assert (tmp_path / "index" / "vectors.safetensors").stat().st_mtime_ns == made


def test_filter_prints_every_way_and_what_survives(
    benchmark, files, retriever_path, generator_path, tmp_path, monkeypatch, capsys
):
    module = benchmark("filter")
    run(
        module, monkeypatch, "--questions", files[0], "--also_passages", files[1], "--index", tmp_path / "index",
        "--retriever", retriever_path, "--generator", generator_path, "--budgets", 8, 400, "--answer_at", 400,
    )  # fmt: skip
    out = capsys.readouterr().out
    survival, answers = out.split("| EM | F1 |")
    rows = lines_of(survival)
    for way in module.WAYS:
        assert float(rows[way][1].split()[0]) == 1.0, way  # room for everything: nothing is lost
        assert float(rows[way][0].split()[0]) < 1.0, way
        assert way in answers
