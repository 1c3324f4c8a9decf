"""Kinds of indexes: the choice, search in lists compared with NumPy, files of lists, vectors on the disk."""

import json

import faiss
import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from cozyrag.errors import InputError
from cozyrag.retrieval.faiss_index import (
    STRETCH,
    TARGET,
    Lists,
    Tuned,
    build_faiss,
    choose_index,
    is_known,
    memory_of,
    open_vectors,
    rescored,
    search_shards,
    tune,
)
from cozyrag.retrieval.index_file import LISTS
from cozyrag.retrieval.passage_index import PassageIndex, Passages, write_index

LISTED = "IVF16,PQ8x4fs"


def drawn(count, dimensions=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def index_of(vectors, factory="Flat"):
    numbers = range(len(vectors))
    columns = {name: [f"{name} {n}" for n in numbers] for name in ("id", "title", "text")}
    return PassageIndex(Dataset.from_dict(columns), vectors, fingerprint="f", factory=factory)


@pytest.fixture(scope="module")
def vectors():
    return drawn(1000, 32)


@pytest.fixture(scope="module")
def made(vectors):
    return index_of(vectors, LISTED)


def recall(index, vectors, asked, k=10):
    exact = np.argsort(-(asked @ vectors.T), axis=1)[:, :k]
    return np.mean([np.isin(a, b).mean() for a, b in zip(exact, index.search(asked, k)[1], strict=True)])


# ---- choice


@pytest.mark.parametrize(
    ("count", "memory", "expected"),
    [
        (1000, None, "Flat"),
        (1000, 128_000, "Flat"),
        (1000, 127_999, "SQ8"),
        (1000, 32_000, "SQ8"),
        (50_000, 2_000_000, "SQ8"),
        (50_000, 700_000, "IVF256,PQ8x4fs"),
        (50_000, 600_000, "Mapped"),
        (1_000_000, None, "Flat"),
        (1_000_000, 128_000_000, "Flat"),
        (1_000_000, 100_000_000, "IVF1024,PQ8x4fs"),  # not SQ8, which would read a million codes for a question
        (1_000_000, 600_000, "Mapped"),
    ],
)
def test_the_first_kind_that_fits_is_chosen(count, memory, expected):
    assert choose_index(count, 32, memory) == expected
    assert is_known(expected)
    assert memory is None or memory_of(expected, count, 32) <= memory


def test_sentence_vectors_count_only_if_they_are_in_memory():
    assert choose_index(1000, 32, 128_000, beside=1) == "SQ8"
    assert choose_index(1000, 32, 128_001, beside=1) == "Flat"
    assert choose_index(1000, 32, 32_000, beside=10**9) == "SQ8"  # they stay on the disk


def test_an_error_if_no_kind_fits():
    with pytest.raises(InputError, match="1000 vectors of 32 dimensions need at least 0.03 MB .SQ8."):
        choose_index(1000, 32, 31_999)
    with pytest.raises(InputError, match=r"need at least 0.52 MB \(Mapped\), found 0.50 MB"):
        choose_index(1_000_000, 32, 500_000)


@pytest.mark.parametrize(("dimensions", "parts"), [(384, 96), (7, 1), (50, 10)])
def test_parts_divide_the_dimensions(dimensions, parts):
    assert choose_index(10**6, dimensions, dimensions * 10**6 * 3).endswith(f",PQ{parts}x4fs")


@pytest.mark.parametrize(
    "factory", ["HNSW32", "IVF16,PQ8x4fsr", "IVF16,PQ8", "IVF16,PQ0x4fs", "IVF0,PQ8x4fs", 4, None, ["Flat"]]
)
def test_other_kinds_are_not_known(factory):
    assert not is_known(factory)


# ---- lists


def test_lists_reach_the_target_recall(made, vectors):
    near = vectors[:200] + 0.5 * drawn(200, 32, seed=1)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    assert made.tuned != Tuned() and tune(made._index, vectors)[1] >= TARGET
    assert recall(made, vectors, near) > TARGET - 0.04


def test_scores_are_those_of_the_vectors_themselves(made, vectors):
    asked = drawn(70, 32, seed=2)
    scores, rows = made.search(asked, 5)
    np.testing.assert_allclose(scores, np.take_along_axis(asked @ vectors.T, rows, axis=1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all() and scores.dtype == np.float32 and rows.dtype == np.int64


@pytest.mark.parametrize("k", [1, 700, 1000, 5000])
def test_k_results_even_if_the_lists_that_are_read_hold_fewer(made, k):
    rows = made.search(drawn(3, 32, seed=3), k)[1]
    assert rows.shape == (3, min(k, 1000))
    assert all(len(set(line)) == len(line) and min(line) >= 0 for line in rows.tolist())


def test_the_same_vectors_give_the_same_lists(vectors):
    one, two = Lists.of(vectors, LISTED), Lists.of(vectors, LISTED)
    for name, array in vars(one).items():
        np.testing.assert_array_equal(array, vars(two)[name])


def test_the_faiss_index_holds_each_vector_in_its_nearest_list(made, vectors):
    index = made._index
    assert (index.ntotal, index.nlist, index.pq.M, index.pq.nbits) == (1000, 16, 8, 4)
    places = made.lists.places
    nearest = np.argmax(vectors @ made.lists.centroids.T, axis=1)
    np.testing.assert_array_equal(places, nearest)
    assert [index.get_list_size(place) for place in range(16)] == np.bincount(places, minlength=16).tolist()


def test_an_index_with_lists_survives_saving_and_loading(made, vectors, tmp_path):
    made.save(tmp_path)
    asked, loaded = drawn(20, 32, seed=4), PassageIndex.load(tmp_path, fingerprint="f")
    assert loaded.factory == LISTED and loaded.tuned == made.tuned
    assert isinstance(loaded.vectors, np.memmap) and isinstance(loaded.lists.codes, np.memmap)
    for before, after in zip(made.search(asked, 10), loaded.search(asked, 10), strict=True):
        np.testing.assert_array_equal(before, after)
    loaded.save(tmp_path)  # onto the files it reads
    again = PassageIndex.load(tmp_path, fingerprint="f", expected=made.passages)
    np.testing.assert_array_equal(again.search(asked, 10)[1], made.search(asked, 10)[1])
    other = faiss.read_index(str(tmp_path / "index.faiss"))
    assert (other.ntotal, other.metric_type) == (1000, faiss.METRIC_INNER_PRODUCT)


def test_texts_stay_on_the_disk(made, tmp_path):
    made.save(tmp_path)
    passages = PassageIndex.load(tmp_path, fingerprint="f").passages
    assert not isinstance(passages.texts, list) and len(passages.texts) == 1000
    assert (passages.texts[7], passages.texts[np.int64(999)]) == ("text 7", "text 999")
    assert passages.ids[2:4] == ["id 2", "id 3"]
    plain = Passages(*(list(column) for column in (passages.ids, passages.titles, passages.texts)))
    assert passages == plain and plain == passages and passages.select([5]) == ["title 5\ntext 5"]
    assert passages != Passages(plain.ids, plain.titles, [*plain.texts[:-1], "other"])
    assert passages.texts != 3


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"places": tensors["places"] + 9},
        lambda tensors: tensors | {"places": tensors["places"] - 1},
        lambda tensors: tensors | {"codes": tensors["codes"][:-1]},
        lambda tensors: tensors | {"codebooks": tensors["codebooks"][:, :8]},
        lambda tensors: tensors | {"places": tensors["places"].astype(np.float32)},
        lambda tensors: tensors | {"places": tensors["places"].astype(np.int64)},
        lambda tensors: {name: array for name, array in tensors.items() if name != "centroids"},
    ],
)
def test_lists_that_do_not_fit_are_refused_before_faiss_reads_beyond_them(made, tmp_path, change):
    made.save(tmp_path)
    save_file(change(load_file(tmp_path / LISTS)), tmp_path / LISTS)
    facts = json.loads((tmp_path / "index.json").read_text())
    facts = {name: value for name, value in facts.items() if name not in ("files", "checksum")}
    (tmp_path / "index.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="is damaged"):
        PassageIndex.load(tmp_path, fingerprint="f")


@pytest.mark.parametrize("search", [{"lists": 0}, {"lists": 2.5}, {"other": 1}, None])
def test_impossible_search_parameters_are_refused(made, tmp_path, search):
    made.save(tmp_path)
    facts = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(facts | {"search": search}))
    with pytest.raises(InputError, match="expected (an entry .)?search"):
        PassageIndex.load(tmp_path, fingerprint="f")


def test_an_index_without_its_lists_file_is_refused(made, tmp_path):
    made.save(tmp_path)
    (tmp_path / LISTS).unlink()
    with pytest.raises(InputError, match=LISTS):
        PassageIndex.load(tmp_path, fingerprint="f")


def test_a_flat_index_saved_over_it_removes_the_lists(made, tmp_path, vectors):
    made.save(tmp_path)
    index_of(vectors).save(tmp_path)
    assert not (tmp_path / LISTS).exists()
    assert PassageIndex.load(tmp_path, fingerprint="f").factory == "Flat"


# ---- SQ8, Mapped, several shards


def test_sq8_finds_candidates_and_scores_them_exactly(vectors, tmp_path):
    asked = drawn(5, 32, seed=1)
    built = index_of(vectors, "SQ8")
    built.save(tmp_path)
    loaded = PassageIndex.load(tmp_path, fingerprint="f")
    assert loaded.factory == "SQ8" and isinstance(loaded.vectors, np.memmap)
    (scores, rows), also = built.search(asked, 10), loaded.search(asked, 10)[1]
    np.testing.assert_array_equal(rows, also)
    np.testing.assert_allclose(scores, np.take_along_axis(asked @ vectors.T, rows, axis=1), atol=1e-6)
    assert tune(build_faiss(vectors, "SQ8"), vectors)[1] > 0.95
    assert tune(build_faiss(vectors, "Flat"), vectors) == (Tuned(), 1)


def test_vectors_on_the_disk_are_searched_exactly(tmp_path):
    many, asked = drawn(STRETCH + 500, 4), drawn(3, 4, seed=1)
    index_of(many, "Mapped").save(tmp_path)
    loaded = PassageIndex.load(tmp_path, fingerprint="f")
    assert loaded._index.ntotal == 0 and isinstance(loaded.vectors, np.memmap)
    np.testing.assert_array_equal(loaded.search(asked, 12)[1], index_of(many).search(asked, 12)[1])


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("cuts", [[], [1], [100, 101, 350], [0, 499]])
def test_search_over_shards_equals_search_over_one_array(queries, cuts):
    some, asked = drawn(500), drawn(queries, seed=1)
    scores, rows = search_shards(np.split(some, cuts), asked, 20)
    expected_scores, expected_rows = index_of(some).search(asked, 20)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 40])
def test_ties_across_shards_keep_the_order_of_the_rows(queries):
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    some = np.array([north, east, west, north, east, east, north, north] * 2, dtype=np.float32)
    whole, asked = index_of(some), np.array([east] * queries)
    for k in range(1, 17):
        for cuts in ([3], [1, 2, 8], list(range(1, 16))):
            np.testing.assert_array_equal(search_shards(np.split(some, cuts), asked, k)[1], whole.search(asked, k)[1])


def test_no_shards_give_no_rows():
    assert search_shards([], np.array([[1.0, 0.0]]), 3)[1].shape == (1, 0)


def test_missing_candidates_come_last():
    scores, rows = rescored(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:1], np.array([[-1, 1, 0]]), 3)
    assert rows.tolist() == [[0, 1, -1]] and scores.tolist() == [[1, 0, -np.inf]]


# ---- write_index, as `cozyrag index` calls it


def test_write_index_records_how_the_index_is_searched(tmp_path):
    many = drawn(5000, 32)
    save_file({"vectors": many}, tmp_path / "vectors.safetensors")
    columns = {name: [str(n) for n in range(5000)] for name in ("id", "title", "text")}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "passages.parquet"))
    mapped = open_vectors(tmp_path / "vectors.safetensors")
    factory, share = write_index(tmp_path, "f", mapped, 100_000)
    assert factory == "IVF64,PQ8x4fs" and share > 0.9
    loaded = PassageIndex.load(tmp_path, fingerprint="f")
    assert json.loads((tmp_path / "index.json").read_text())["search"] == vars(loaded.tuned)
    assert recall(loaded, many, many[:50]) > 0.8 and loaded.search(many[:50], 1)[1][:, 0].tolist() == list(range(50))
    assert write_index(tmp_path, "f", mapped, None) == ("Flat", None)
