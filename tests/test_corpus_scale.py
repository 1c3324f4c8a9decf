"""The benchmark of large corpora on a tiny pair: what it makes, finds and measures."""

from argparse import Namespace

import datasets
import pytest

from benchmarks.speed import corpus_scale
from cozyrag.retrieval.passage_index import PassageIndex

COUNT = 300


@pytest.fixture
def task(pair_folder, corpus_files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = Namespace(
        model=str(pair_folder), questions=str(corpus_files["eval_questions"]), texts=str(corpus_files["passages"]),
        passages=COUNT, limit=5, threads=1, index_memory=30_000,
    )  # fmt: skip
    (tmp_path / "index").mkdir()
    made = corpus_scale._task(options, tmp_path / "index")
    corpus_scale._write(options, tmp_path / "index")
    return made


@pytest.mark.skipif(not corpus_scale.LINUX, reason="reads /proc")
def test_a_made_corpus_is_built_searched_and_compared(task, pair_folder):
    built = corpus_scale._built(task)
    assert built["index"] == "SQ8" and built["build_own_MB"] >= 0
    searched = corpus_scale._searched(task, None)
    assert searched["warm_ms"]["p50"] > 0 and set(searched["warm_parts_ms"]) == {"dense", "sparse"}
    recall = corpus_scale._compared(task)["recall"]
    assert recall["exact"]["@20"] >= recall["exact"]["@1"] and set(recall) == {"hybrid", "exact"}
    index = PassageIndex.load(task.folder, fingerprint=corpus_scale.NAME)
    real = corpus_scale._real(pair_folder / "index")
    assert len(index) == COUNT and list(index.passages.ids[: len(real)]) == list(real.passages.ids)
    assert list(index.passages.texts[: len(real)]) == list(real.passages.texts)
    assert (index.vectors[: len(real)] == real.vectors).all()
