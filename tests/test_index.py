"""PassageIndex: FAISS compared with NumPy on hand-written and random vectors, passages, and files."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from cozyrag.errors import InputError
from cozyrag.retrieval.faiss_index import RUN, in_runs, open_vectors
from cozyrag.retrieval.index_file import FILES, NEEDED, made_by
from cozyrag.retrieval.passage_index import PassageIndex, Passages, passage_text

SEALS = ("checksum", "files", "bytes")
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def table(size):
    numbers = range(size)
    return Dataset.from_dict(
        {
            "id": [f"p{n}" for n in numbers],
            "title": [f"Title_{n}" for n in numbers],
            "text": [f"Text {n}." for n in numbers],
        }
    )


def make(vectors, fingerprint="f" * 16):
    return PassageIndex(table(len(vectors)), np.array(vectors, dtype=np.float32), fingerprint=fingerprint)


def drawn(count, dimensions=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---- search ----


def test_search_by_hand():
    scores, rows = make([WEST, EAST, [0.6, 0.8], NORTH]).search(np.array([EAST, NORTH]), 3)
    assert rows.tolist() == [[1, 2, 3], [3, 2, 0]]
    np.testing.assert_allclose(scores, [[1, 0.6, 0], [1, 0.8, 0]], atol=1e-6)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64


@pytest.mark.parametrize("queries", [1, 7, 64])  # FAISS takes another path for many queries
def test_search_is_exact(queries):
    vectors, asked = drawn(500), drawn(queries, seed=1)
    scores, rows = make(vectors).search(asked, 60)
    expected = asked @ vectors.T
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1, kind="stable")[:, :60])
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :60], atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("queries", [1, 64])
def test_equal_scores_keep_the_order_of_the_rows(k, queries):
    vectors = [NORTH, EAST, EAST, NORTH, EAST]
    scores, rows = make(vectors).search(np.array([EAST] * queries), k)
    assert rows.tolist() == [[1, 2, 4, 0, 3][:k]] * queries
    np.testing.assert_array_equal(scores, [[1, 1, 1, 0, 0][:k]] * queries)


@pytest.mark.parametrize("queries", [1, 64])
def test_a_tie_for_the_last_place_goes_to_the_first_rows(queries):
    """FAISS alone keeps a later row whenever a better one comes after it."""
    vectors = [WEST] + [NORTH] * 9 + [EAST] * 3
    for k in range(1, 14):
        rows = make(vectors).search(np.array([EAST] * queries), k)[1]
        assert rows.tolist() == [[10, 11, 12, *range(1, 10), 0][:k]] * queries


def test_k_larger_than_the_corpus_returns_all_passages():
    scores, rows = make([NORTH, EAST]).search(np.array([EAST]), 60)
    assert rows.tolist() == [[1, 0]]
    assert scores.shape == (1, 2)


def test_queries_of_any_layout():
    queries = np.asfortranarray(drawn(6, seed=2).astype(np.float64))[::2]
    index = make(drawn(50))
    np.testing.assert_array_equal(index.search(queries, 5)[1], index.search(queries.astype(np.float32).copy(), 5)[1])


def test_no_queries_give_no_rows():
    assert [result.shape for result in make([NORTH, EAST]).search(np.zeros((0, 2), dtype=np.float32), 2)] == [
        (0, 2),
        (0, 2),
    ]


@pytest.mark.parametrize("count", [2, 4, 0])
def test_a_wrong_number_of_vectors_is_refused(count):
    with pytest.raises(ValueError, match=rf"each of 3 passages, found {count}"):
        PassageIndex(table(3), np.zeros((count, 2), dtype=np.float32), fingerprint="f")


def test_indexes_of_one_table_are_independent(tmp_path):
    """datasets stores an index by name inside the Dataset, so the caller's Dataset must not get one."""
    passages = table(2)
    before = PassageIndex(passages, np.array([EAST, NORTH], dtype=np.float32), fingerprint="before")
    after = PassageIndex(passages, np.array([NORTH, EAST], dtype=np.float32), fingerprint="after")
    assert [index.search(np.array([EAST]), 1)[1].tolist() for index in (before, after)] == [[[0]], [[1]]]
    assert passages.list_indexes() == []
    passages.save_to_disk(str(tmp_path / "table"))


# ---- passages ----


def test_passages_as_the_retriever_reads_them():
    assert passage_text("Ada_Lovelace", "She wrote_notes.") == "Ada Lovelace\nShe wrote_notes."
    assert passage_text("", "No title.") == "No title."
    passages = Passages.of(table(2))
    assert passages == Passages(["p0", "p1"], ["Title_0", "Title_1"], ["Text 0.", "Text 1."])
    assert passages.to_read() == ["Title 0\nText 0.", "Title 1\nText 1."]


# ---- files ----


def test_save_and_load_round_trip(tmp_path):
    before = make(drawn(40), fingerprint="0123456789abcdef")
    before.save(tmp_path / "deep" / "index")
    after = PassageIndex.load(tmp_path / "deep" / "index", fingerprint="0123456789abcdef")
    assert after.passages == before.passages
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.vectors, before.vectors)
    for ours, theirs in zip(before.search(drawn(5, seed=1), 9), after.search(drawn(5, seed=1), 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(after) == 40


def test_other_libraries_can_read_the_files(tmp_path):
    index = make(drawn(40), fingerprint="0123456789abcdef")
    index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    scores, rows = faiss.read_index(str(tmp_path / "index.faiss")).search(drawn(5, seed=1), 9)
    np.testing.assert_array_equal(rows, index.search(drawn(5, seed=1), 9)[1])
    facts = json.loads((tmp_path / "index.json").read_text())
    assert {name: held["bytes"] for name, held in facts.pop("files").items()} == {
        name: (tmp_path / name).stat().st_size for name in FILES[:-1]
    }
    assert len(facts.pop("checksum")) == 32
    assert facts == {
        "retriever_fingerprint": "0123456789abcdef",
        "passages": 40,
        "dimensions": 8,
        "metric": "inner product",
        "factory": "Flat",
    }
    assert Dataset.from_parquet(str(tmp_path / "passages.parquet"), keep_in_memory=True)[3] == table(40)[3]


def test_an_index_of_another_retriever_is_refused_naming_both(tmp_path):
    make([EAST, NORTH], fingerprint="aaaa").save(tmp_path)
    with pytest.raises(InputError) as error:
        PassageIndex.load(tmp_path, fingerprint="bbbb")
    for word in (str(tmp_path), "made by retriever aaaa", "in use is bbbb", "index the passages again"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(tmp_path, name):
    make([EAST, NORTH], fingerprint="aaaa").save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing\. Copy the whole folder again, or train again"):
        PassageIndex.load(tmp_path, fingerprint="aaaa")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=f"Expected an index in {tmp_path / 'none'}"):
        PassageIndex.load(tmp_path / "none", fingerprint="aaaa")


def test_made_by_reads_the_fingerprint_of_a_folder(tmp_path):
    assert made_by(tmp_path) is None
    assert made_by(Path(tmp_path) / "none") is None
    make([EAST, NORTH], fingerprint="aaaa").save(tmp_path)
    assert made_by(tmp_path) == made_by(str(tmp_path)) == "aaaa"


def test_saving_over_an_index_replaces_it(tmp_path):
    make([EAST, NORTH, WEST], fingerprint="aaaa").save(tmp_path)
    make([NORTH, EAST], fingerprint="bbbb").save(tmp_path)
    index = PassageIndex.load(tmp_path, fingerprint="bbbb")
    assert len(index) == 2
    assert index.search(np.array([EAST]), 9)[1].tolist() == [[1, 0]]


# ---- unknown kinds, memory-mapped files ----


def test_an_index_of_unknown_kind_is_refused(tmp_path):
    make([EAST, NORTH]).save(tmp_path)
    facts = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(facts | {"factory": "HNSW64"}))
    with pytest.raises(InputError, match="found 'HNSW64'"):
        PassageIndex.load(tmp_path, fingerprint="f" * 16)


def test_vectors_are_mapped_from_the_file(tmp_path):
    index = make(drawn(10))
    index.save(tmp_path)
    np.testing.assert_array_equal(open_vectors(tmp_path / "vectors.safetensors"), index.vectors)


@pytest.mark.parametrize("name", ["run [1]", "run[a-z]", "b*", "who?", "a{1,2}"])
def test_the_name_of_a_folder_is_not_a_pattern(tmp_path, name):
    make([EAST, NORTH]).save(tmp_path / name / "index")
    assert PassageIndex.load(tmp_path / name / "index", fingerprint="f" * 16).passages.ids == ["p0", "p1"]


# ---- what is checked of many vectors


@pytest.mark.parametrize("count", [1, 64, 65, 300, 4096])
def test_a_sample_is_runs_of_neighbours_that_reach_from_the_first_to_the_last(count):
    rows = in_runs(np.arange(count), 64)
    assert len(rows) <= max(64, count) and rows[0] == 0 and rows[-1] == count - 1
    starts = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
    assert len(starts) <= 64 // RUN and (np.diff(rows) > 0).all()


def test_of_many_vectors_a_sample_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("cozyrag.retrieval.passage_index.CHECKED", 64)
    make(drawn(300)).save(tmp_path)
    facts = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({name: facts[name] for name in facts if name not in SEALS}))
    PassageIndex.load(tmp_path, fingerprint="f" * 16)
    tensors = load_file(tmp_path / "vectors.safetensors")
    tensors["vectors"][20] = np.nan
    save_file(tensors, tmp_path / "vectors.safetensors")
    with pytest.raises(InputError, match="expected vectors of length 1"):
        PassageIndex.load(tmp_path, fingerprint="f" * 16)
