"""Which FAISS index suits so many vectors and so much memory, and how it is made, tuned and measured.

Four kinds. "Flat" holds the vectors themselves: exact. "SQ8" holds a byte for each dimension. "IVF1024,PQ96x4fs" holds half a byte for
every four dimensions, in lists by nearest centroid, of which a search reads some. "Mapped" holds nothing: an exact search
that reads all vectors from the disk. SQ8 and IVF find candidates, which the caller scores by vectors on the disk. Left out:
passages, and files other than that of the lists (passage_index.py).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from safetensors.numpy import save_file

from cozyrag.errors import InputError

SPARE = 16
COLUMN = "vectors"
SENTENCE_VECTORS, SENTENCE_ENDS = "sentence_vectors", "sentence_ends"  # the other tensors beside it
TRAINED_ON = 100_000  # vectors, evenly spread, that a quantised index learns its ranges from
ADDED = 65_536  # vectors handed to FAISS at once
# From how many numbers in a batch of questions on FAISS multiplies matrices. Newer versions wait for 128,000, 333
# questions of 384
# dimensions, and take ten times as long for 256 of them; older ones count questions, and their 20 is right.
MULTIPLIED = 3 * 384
STRETCH = 4096  # vectors read at once from the disk by "Mapped"
MANY = 100_000  # vectors from which reading all codes for a question takes too long (SQ8: some 10 ms)
FEWEST = 4096  # vectors for lists: below, there is nothing to gain
PER_LIST = 64  # vectors that each centroid is trained on
TARGET = 0.99  # of the 10 nearest
MOVED = np.float32(1)  # how far from a passage a question is imitated, in differences of two passages
FACTORS = (10, 20, 40)  # candidates for each passage wanted
TYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I32": np.int32, "I64": np.int64}
_LISTED = re.compile(r"IVF(\d+),PQ(\d+)x4fs")


def listed(factory: str) -> tuple[int, int] | None:
    """(lists, sub-vectors) of a factory string of that kind, else None."""
    found = _LISTED.fullmatch(factory)
    return found and (int(found[1]), int(found[2]))


def is_known(factory: object) -> bool:
    """Whether this is one of the four kinds."""
    return isinstance(factory, str) and (factory in ("Flat", "SQ8", "Mapped") or listed(factory) is not None)


def memory_of(factory: str, count: int, dimensions: int) -> int:
    """Bytes of memory that an index of `count` vectors holds."""
    if shape := listed(factory):
        lists, parts = shape
        # Codes lie in blocks of 32, half filled at the end of a list; then row numbers, centroids and codebooks.
        return (count + 16 * lists) * ((parts + 1) // 2) + count * 8 + (lists + 16) * dimensions * 4
    return {"Flat": 4 * count, "SQ8": count, "Mapped": 4 * min(count, STRETCH)}[factory] * dimensions


def choose_index(count: int, dimensions: int, memory: int | None, *, beside: int = 0) -> str:
    """The kind of index for `count` vectors within `memory` bytes; None: no limit, "Flat".

    `beside`: bytes of vectors of sentences, which are in memory too beside Flat, and on the disk beside the others. Flat, which is exact, wherever it fits. Else SQ8 up to `MANY` vectors, then lists, then the vectors on the disk.

    Raises InputError if none fits.
    """
    parts = next(parts for parts in range(max(1, dimensions // 4), 0, -1) if dimensions % parts == 0)
    lists = f"IVF{2 ** round(np.log2(max(count, 1)) / 2)},PQ{parts}x4fs"
    kinds = ["Flat", *(["SQ8"] if count < MANY else []), *([lists] if count >= FEWEST else []), "Mapped"]
    sizes = {kind: memory_of(kind, count, dimensions) + (beside if kind == "Flat" else 0) for kind in kinds}
    for kind, size in sizes.items():
        if memory is None or size <= memory:
            return kind
    least = min(sizes, key=sizes.__getitem__)
    raise InputError(
        f"--index_memory: {count} vectors of {dimensions} dimensions need at least {sizes[least] / 1e6:,.2f} MB "
        f"({least}), found {memory / 1e6:,.2f} MB. Give more, or index fewer passages."
    )


# ------------------------------------------------------------------------------------------------------------- built


def evenly(vectors: np.ndarray, count: int) -> np.ndarray:
    """Rows of `count` of the vectors, or of all, evenly spread."""
    return np.unique(np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(np.int64))


def _plain(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def stretches(vectors: np.ndarray, size: int = ADDED) -> Iterable[np.ndarray]:
    """The vectors, a stretch at a time."""
    return (vectors[start : start + size] for start in range(0, len(vectors), size))


def build_faiss(vectors: np.ndarray, factory: str) -> faiss.Index:
    """A FAISS index of vectors (n, dim), which may be memory-mapped; the same vectors give the same index. "Mapped":
    an empty one."""
    if listed(factory):
        return Lists.of(vectors, factory).faiss()
    if faiss.cvar.distance_compute_blas_threshold > 20:
        faiss.cvar.distance_compute_blas_threshold = MULTIPLIED
    index = faiss.index_factory(vectors.shape[1], "Flat" if factory == "Mapped" else factory, faiss.METRIC_INNER_PRODUCT)  # fmt: skip
    if not index.is_trained:
        index.train(_plain(vectors[evenly(vectors, TRAINED_ON)]))
    for some in stretches(vectors) if factory != "Mapped" else ():
        index.add(_plain(some))
    return index


@dataclass(frozen=True)
class Lists:
    """An inverted file of 4-bit product codes as plain arrays (Jegou et al., "Product quantization for nearest neighbor search", 2011).

    They are kept as arrays so that nothing of a stranger's file is parsed by FAISS, and a million need not be encoded anew.

    `centroids`: (lists, dim) float32; `codebooks`: (parts, 16, dim / parts) float32; `codes`: (n, (parts + 1) // 2) uint8, row i =
    vector i; `places`: (n,) int32, the list of each.
    """

    centroids: np.ndarray
    codebooks: np.ndarray
    codes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, factory: str) -> "Lists":
        """Learn centroids and codebooks from some of the vectors (n, dim), then encode all of them, a stretch at a
        time."""
        lists, parts = listed(factory)
        sample = _plain(vectors[evenly(vectors, max(lists * PER_LIST, 16_384))])
        means = faiss.Kmeans(
            vectors.shape[1], lists, niter=10, seed=1234, spherical=True, min_points_per_centroid=1, max_points_per_centroid=PER_LIST * 16
        )  # fmt: skip
        means.train(sample)
        product = faiss.ProductQuantizer(vectors.shape[1], parts, 4)
        product.train(sample[evenly(sample, 16_384)])
        books = faiss.vector_to_array(product.centroids).reshape(parts, 16, -1)
        nearest = faiss.IndexFlatIP(vectors.shape[1])
        nearest.add(means.centroids)
        codes, places = np.empty((len(vectors), product.code_size), np.uint8), np.empty(len(vectors), np.int32)
        for start in range(0, len(vectors), ADDED):
            some = _plain(vectors[start : start + ADDED])
            codes[start : start + ADDED] = product.compute_codes(some)
            places[start : start + ADDED] = nearest.search(some, 1)[1][:, 0]
        return cls(means.centroids, books, codes, places)

    def faiss(self) -> faiss.Index:
        """The index to search in; the arrays may be memory-mapped and are not kept."""
        (lists, dimensions), parts = self.centroids.shape, len(self.codebooks)
        nearest = faiss.IndexFlatIP(dimensions)
        nearest.add(_plain(self.centroids))
        plain = faiss.IndexIVFPQ(nearest, dimensions, lists, parts, 4, faiss.METRIC_INNER_PRODUCT)
        plain.by_residual = False
        faiss.copy_array_to_vector(_plain(self.codebooks).ravel(), plain.pq.centroids)
        rows = np.argsort(self.places, kind="stable")
        ends = np.cumsum(np.bincount(self.places, minlength=lists))
        for place, mine in enumerate(np.split(rows, ends[:-1])):
            codes = np.ascontiguousarray(self.codes[mine])
            plain.invlists.add_entries(place, len(mine), faiss.swig_ptr(mine), faiss.swig_ptr(codes))
        plain.ntotal, plain.is_trained = len(rows), True
        fast = faiss.IndexIVFPQFastScan(plain)
        nearest.this.disown()  # the index that is given back outlives the Python objects of the others
        fast.own_fields = True
        return fast

    def save(self, path: Path) -> None:
        """Write the arrays as safetensors."""
        save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, factory: str, shape: tuple[int, int]) -> "Lists":
        """Memory-map what `save` wrote for `shape` (n, dim) vectors.

        Raises ValueError if the arrays do not fit together: FAISS would read beyond them.
        """
        (lists, parts), (count, dimensions) = listed(factory), shape
        made = cls(**{name: open_vectors(path, name) for name in cls.__annotations__})
        expected = ((lists, dimensions), (parts, 16, dimensions // parts), (count, (parts + 1) // 2), (count,))
        found = tuple(array.shape for array in vars(made).values())
        types = [array.dtype for array in vars(made).values()]
        if found != expected or types != [np.float32, np.float32, np.uint8, np.int32]:
            raise ValueError(f"expected arrays of the shapes {expected}, found {found}")
        if count and not 0 <= made.places.min() <= made.places.max() < lists:
            raise ValueError(f"expected places among {lists} lists, found {made.places.min()} to {made.places.max()}")
        return made


def open_vectors(path: str | Path, name: str = COLUMN, *, mode: str = "r") -> np.ndarray:
    """A tensor of a safetensors file, the vectors (n, dim) float32 unless named, memory-mapped: only what is touched
    is read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        facts = json.loads(file.read(length))[name]
    kind, start = TYPES[facts["dtype"]], 8 + length + facts["data_offsets"][0]
    if not np.prod(facts["shape"]):  # nothing to map
        return np.zeros(facts["shape"], kind)
    return np.memmap(path, kind, mode, offset=start, shape=tuple(facts["shape"]))


# ---------------------------------------------------------------------------------------------------------- searched


@dataclass(frozen=True)
class Tuned:
    """How much an index with lists reads: `lists` of them for a question, and `factor` candidates for each passage
    wanted."""

    lists: int = 1
    factor: int = 1

    def __post_init__(self) -> None:
        if any(not isinstance(value, int) or value < 1 for value in vars(self).values()):
            raise ValueError(f"expected whole numbers from 1 on, found {vars(self)}")

    def candidates(self, k: int, count: int) -> int:
        """How many candidates are scored by the vectors themselves. FAISS keeps any of those that tie for the last
        place, hence `SPARE`."""
        return min(count, max(k + SPARE, k * self.factor))

    def parameters(self) -> dict:
        """What a search in lists takes beside questions and k."""
        return {"params": faiss.SearchParametersIVF(nprobe=self.lists)}


def rescored(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, k) and rows (n, k) of the best among candidates (n, c) by vectors that may be memory-mapped; -1: no
    candidate."""
    scores = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), 64):  # some at a time: candidates of a thousand questions are a gigabyte
        some = slice(start, start + 64)
        scores[some] = np.einsum("nkd,nd->nk", vectors[rows[some]], queries[some])
    scores[rows < 0] = -np.inf
    return best(scores, rows, k)


def search_shards(shards: Iterable[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search over vectors that lie in several arrays, as `PassageIndex.search` over one that holds them all in order.

    Args:
        shards: each (n, dim) float32, may be memory-mapped; one at a time is held in memory.

    Returns:
        scores (n, k) descending and rows (n, k), counted over all shards; equal scores stand in the order of the rows.
    """
    queries = _plain(queries)
    scores, rows = np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
    before = 0
    for shard in filter(len, shards):
        found, places = build_faiss(shard, "Flat").search(queries, min(k + SPARE, len(shard)))
        scores, rows = np.hstack([scores, found]), np.hstack([rows, places + before])
        scores, rows = best(scores, rows, k + SPARE)
        before += len(shard)
    return scores[:, :k], rows[:, :k]


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each line, equal scores in the order of the rows."""
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1)


# ------------------------------------------------------------------------------------------------- tuned and measured


def tune(index: faiss.Index, vectors: np.ndarray, *, asked: int = 200, k: int = 10) -> tuple[Tuned, float]:
    """The cheapest search that finds `TARGET` of the k exact nearest, and the share that it finds.

    No question is known here, so `asked` are imitated: vectors, evenly spread, each moved by a part of the difference of two
    others, since questions lie farther from passages than those from one another. Where even all lists fall short, the best that
    was seen. An index without lists is measured only.
    """
    queries, k = _imitated(vectors, asked), min(k, len(vectors))
    exact = search_shards(stretches(vectors), queries, k)[1]
    if not isinstance(index, faiss.IndexIVF):
        return Tuned(), _share(exact, _found(index, vectors, queries, Tuned(), k))
    reading = [2**power for power in range(2, 40) if 2**power < index.nlist] + [index.nlist]
    most = (Tuned(), -1.0)
    for tuned in (Tuned(lists, factor) for lists in reading for factor in FACTORS):
        share = _share(exact, _found(index, vectors, queries, tuned, k))
        most = max(most, (tuned, share), key=lambda each: each[1])
        if share >= TARGET:
            break
    return most


def _imitated(vectors: np.ndarray, asked: int) -> np.ndarray:
    rows = evenly(vectors, asked)
    to, off = np.random.default_rng(0).integers(0, len(vectors), (2, len(rows)))
    moved = _plain(vectors[rows]) + MOVED * (_plain(vectors[to]) - _plain(vectors[off]))
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)


def _found(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray, tuned: Tuned, k: int) -> np.ndarray:
    more = tuned.parameters() if isinstance(index, faiss.IndexIVF) else {}
    rows = index.search(queries, tuned.candidates(k, len(vectors)), **more)[1]
    return rescored(vectors, queries, rows, k)[1]


def _share(exact: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)])) if exact.size else 1.0
