"""Choose, build, tune and measure the FAISS index for so many vectors and so much memory.

There are four kinds. "Flat" holds the vectors: exact. "SQ8" holds a byte for each dimension. "IVF1024,PQ96x4fs" holds
half a byte for every four dimensions, in lists by nearest centroid, some of which a search reads. "Mapped" holds
nothing: an exact search reads all vectors from the disk. SQ8 and IVF find candidates, which the caller scores by the
vectors on the disk. Left out: passages, and all files but that of the lists (passage_index.py).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import faiss
import numpy as np

from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import save_tensors
from cozyrag.runtime.tensor_files import TYPES, read_header

SPARE = 16  # candidates beyond k, among which ties are broken by row
COLUMN = "vectors"
SENTENCE_VECTORS, SENTENCE_ENDS = "sentence_vectors", "sentence_ends"  # the other tensors beside it
TRAINED_ON = 100_000  # vectors, evenly spread, on which a quantised index is trained
RUN = 32  # neighbouring rows read together from a mapped file
ADDED = 65_536  # vectors passed to FAISS at once
# Numbers in a batch of questions from which FAISS multiplies matrices. The default of newer versions, 128,000 (333
# questions of 384 dimensions), makes 256 questions ten times as slow; older ones count questions: their 20 is right.
MULTIPLIED = 3 * 384
STRETCH = 4096  # vectors read at once from the disk by "Mapped"
MANY = 100_000  # from this many vectors on, reading all codes for a question takes too long (SQ8: some 10 ms)
FEWEST = 4096  # vectors for lists: with fewer there is nothing to gain
PER_LIST = 64  # vectors on which each centroid is trained
TARGET = 0.99  # share of the 10 nearest to be found
MOVED = np.float32(1)  # distance of an imitated question from its passage, in differences of two passages
FACTORS = (10, 20, 40)  # candidates for each passage wanted
_LISTED = re.compile(r"IVF([1-9]\d*),PQ([1-9]\d*)x4fs")


def listed(factory: str) -> tuple[int, int] | None:
    """(lists, sub-vectors) of an index with lists, None for another kind."""
    found = _LISTED.fullmatch(factory)
    return (int(found[1]), int(found[2])) if found else None


def is_known(factory: object) -> bool:
    """Whether this is one of the four kinds."""
    return isinstance(factory, str) and (factory in ("Flat", "SQ8", "Mapped") or listed(factory) is not None)


def memory_of(factory: str, count: int, dimensions: int) -> int:
    """Bytes of memory that an index of `count` vectors takes."""
    if shape := listed(factory):
        lists, parts = shape
        # Codes are stored in blocks of 32, half filled at the end of a list; then row numbers, centroids and codebooks.
        return (count + 16 * lists) * ((parts + 1) // 2) + count * 8 + (lists + 16) * dimensions * 4
    return {"Flat": 4 * count, "SQ8": count, "Mapped": 4 * min(count, STRETCH)}[factory] * dimensions


def choose_index(count: int, dimensions: int, memory: int | None, *, beside: int = 0) -> str:
    """The kind of index for `count` vectors within `memory` bytes; None: no limit.

    Flat, which is exact, if it fits, else SQ8 up to `MANY` vectors, else lists, else Mapped. `beside`: bytes of the
    sentence vectors, which are in memory beside Flat and on the disk beside the others. Raises InputError if none fits.
    """
    if memory is None:
        return "Flat"
    parts = next(parts for parts in range(max(1, dimensions // 4), 0, -1) if dimensions % parts == 0)
    lists = f"IVF{2 ** round(np.log2(max(count, 1)) / 2)},PQ{parts}x4fs"
    kinds = ["Flat", *(["SQ8"] if count < MANY else []), *([lists] if count >= FEWEST else []), "Mapped"]
    sizes = {kind: memory_of(kind, count, dimensions) + (beside if kind == "Flat" else 0) for kind in kinds}
    for kind, size in sizes.items():
        if size <= memory:
            return kind
    least = min(sizes, key=sizes.__getitem__)
    raise InputError(
        f"--index_memory: {count} vectors of {dimensions} dimensions need at least {sizes[least] / 1e6:,.2f} MB "
        f"({least}), found {memory / 1e6:,.2f} MB. Give more, or index fewer passages."
    )


def evenly(vectors: np.ndarray, count: int) -> np.ndarray:
    """Rows of `count` of the vectors, evenly spread, or of all."""
    return np.unique(np.linspace(0, len(vectors) - 1, min(count, len(vectors))).astype(np.int64))


def in_runs(vectors: np.ndarray, count: int) -> np.ndarray:
    """About `count` of the vectors in runs of `RUN`, evenly spread; all if there are no more.

    For one row of a mapped file the system reads 128 KB around it: single rows would read all of a large file.
    """
    if len(vectors) <= count:
        return vectors
    starts = evenly(vectors[RUN - 1 :], max(1, count // RUN))
    return vectors[np.unique(starts[:, None] + np.arange(RUN))]


def _float32(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def stretches(vectors: np.ndarray, size: int = ADDED) -> Iterable[np.ndarray]:
    """The vectors, `size` at a time."""
    return (vectors[start : start + size] for start in range(0, len(vectors), size))


def build_faiss(vectors: np.ndarray, factory: str) -> faiss.Index:
    """A Flat or SQ8 index of vectors (n, dim), which may be memory-mapped; an empty one for Mapped. Deterministic."""
    if faiss.cvar.distance_compute_blas_threshold > 20:
        faiss.cvar.distance_compute_blas_threshold = MULTIPLIED
    kind = "Flat" if factory == "Mapped" else factory
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(_float32(vectors[evenly(vectors, TRAINED_ON)]))
    for some in stretches(vectors) if factory != "Mapped" else ():
        index.add(_float32(some))
    return index


@dataclass(frozen=True)
class Lists:
    """An inverted file of 4-bit product codes (Jegou et al., "Product quantization for nearest neighbor search", 2011).

    Plain arrays, so that FAISS parses no untrusted file and a million vectors need not be encoded again.

    `centroids`: (lists, dim) float32; `codebooks`: (parts, 16, dim / parts) float32; `codes`: (n, (parts + 1) // 2)
    uint8, row i = vector i; `places`: (n,) int32, the list of each vector.
    """

    centroids: np.ndarray
    codebooks: np.ndarray
    codes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, factory: str) -> "Lists | None":
        """Train on some of the vectors (n, dim), then encode all of them. None for an index without lists."""
        if not (shape := listed(factory)):
            return None
        (lists, parts), dimensions = shape, vectors.shape[1]
        sample = _float32(vectors[evenly(vectors, max(lists * PER_LIST, 16_384))])
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": PER_LIST * 16}
        means = faiss.Kmeans(dimensions, lists, niter=10, seed=1234, spherical=True, **limits)
        means.train(sample)
        product = faiss.ProductQuantizer(dimensions, parts, 4)
        product.train(sample[evenly(sample, 16_384)])
        books = faiss.vector_to_array(product.centroids).reshape(parts, 16, -1)
        codes, places = np.empty((len(vectors), product.code_size), np.uint8), np.empty(len(vectors), np.int32)
        for start in range(0, len(vectors), ADDED):
            some = _float32(vectors[start : start + ADDED])
            codes[start : start + ADDED] = product.compute_codes(some)
            places[start : start + ADDED] = means.assign(some)[1]
        return cls(means.centroids, books, codes, places)  # type: ignore[arg-type]  # centroids are trained, not None

    def faiss(self) -> faiss.Index:
        """The index to search in. It copies the arrays, which may be memory-mapped."""
        (lists, dimensions), parts = self.centroids.shape, len(self.codebooks)
        nearest = faiss.IndexFlatIP(dimensions)
        nearest.add(_float32(self.centroids))
        plain = faiss.IndexIVFPQ(nearest, dimensions, lists, parts, 4, faiss.METRIC_INNER_PRODUCT)
        plain.by_residual = False
        faiss.copy_array_to_vector(_float32(self.codebooks).ravel(), plain.pq.centroids)
        rows = np.argsort(self.places, kind="stable")
        ends = np.cumsum(np.bincount(self.places, minlength=lists))
        add = plain.invlists.add_entries  # type: ignore[union-attr]  # the constructor has set it
        for place, mine in enumerate(np.split(rows, ends[:-1])):
            codes = np.ascontiguousarray(self.codes[mine])
            add(place, len(mine), faiss.swig_ptr(mine), faiss.swig_ptr(codes))
        plain.ntotal, plain.is_trained = len(rows), True
        fast = faiss.IndexIVFPQFastScan(plain)
        nearest.this.disown()  # type: ignore[attr-defined]  # SWIG's handle, not in the stubs: `fast` owns it from here
        fast.own_fields = True
        return fast

    def save(self, path: Path) -> None:
        """Write the arrays as safetensors."""
        save_tensors({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, factory: str, shape: tuple[int, ...]) -> "Lists | None":
        """Memory-map what `save` wrote for vectors of `shape` (n, dim). None for an index without lists.

        Raises ValueError if the arrays do not fit together: FAISS would read beyond them.
        """
        if not (kind := listed(factory)):
            return None
        (lists, parts), (count, dimensions) = kind, shape
        loaded = cls(**{name: open_vectors(path, name) for name in cls.__annotations__})
        expected = ((lists, dimensions), (parts, 16, dimensions // parts), (count, (parts + 1) // 2), (count,))
        found = tuple(array.shape for array in vars(loaded).values())
        types = [array.dtype for array in vars(loaded).values()]
        if found != expected or types != [np.float32, np.float32, np.uint8, np.int32]:
            raise ValueError(f"expected arrays of the shapes {expected}, found {found}")
        low, high = loaded.places.min(initial=0), loaded.places.max(initial=0)
        if not 0 <= low <= high < lists:
            raise ValueError(f"expected places among {lists} lists, found {low} to {high}")
        return loaded


def open_vectors(path: str | Path, name: str = COLUMN, *, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """A tensor of a safetensors file, by default the vectors (n, dim) float32, memory-mapped.

    Raises ValueError or KeyError if the file has no such tensor.
    """
    place = read_header(path)[name]
    kind = np.dtype(TYPES[place.dtype])
    if prod(place.shape) * kind.itemsize != place.end - place.start:
        raise ValueError(f"{name}: its shape {place.shape} does not have the size of its place in the file")
    if not prod(place.shape):  # an empty tensor cannot be mapped
        return np.zeros(place.shape, kind)
    return np.memmap(path, kind, mode, offset=place.start, shape=place.shape)


@dataclass(frozen=True)
class Tuned:
    """How much an index with lists reads: `lists` per question, and `factor` candidates per passage wanted."""

    lists: int = 1
    factor: int = 1

    def __post_init__(self) -> None:
        if any(not isinstance(value, int) or value < 1 for value in vars(self).values()):
            raise ValueError(f"expected whole numbers of at least 1, found {vars(self)}")

    def candidates(self, k: int, count: int) -> int:
        """How many candidates are scored. FAISS keeps any of those that tie for the last place, hence `SPARE`."""
        return min(count, max(k + SPARE, k * self.factor))

    def parameters(self, index: faiss.Index) -> faiss.SearchParameters | None:
        """The parameters of a search; None for an index without lists."""
        if not isinstance(index, faiss.IndexIVF):
            return None
        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = self.lists
        return parameters


def rescored(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, k) and rows (n, k) of the best candidates (n, c; -1: none), by vectors that may be memory-mapped."""
    scores = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), 64):  # in parts: the candidates of a thousand questions are a gigabyte
        some = slice(start, start + 64)
        scores[some] = np.einsum("nkd,nd->nk", vectors[rows[some]], queries[some])
    scores[rows < 0] = -np.inf
    return best(scores, rows, k)


def search_shards(shards: Iterable[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search over several arrays, as `PassageIndex.search` over one that holds all vectors in order.

    Args:
        shards: each (n, dim) float32, may be memory-mapped; one at a time is held in memory.

    Returns:
        scores (n, k) descending and rows (n, k), counted over all shards; equal scores keep the order of the rows.
    """
    queries = _float32(queries)
    scores, rows = np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
    before = 0
    for shard in filter(len, shards):
        found, places = build_faiss(shard, "Flat").search(queries, min(k + SPARE, len(shard)))
        scores, rows = best(np.hstack([scores, found]), np.hstack([rows, places + before]), k + SPARE)
        before += len(shard)
    return scores[:, :k], rows[:, :k]


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each line; equal scores keep the order of the rows."""
    order = np.lexsort((rows, -scores), axis=-1)[..., :k]
    return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1)


def stacked(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best (scores, rows) of each of n questions as scores (n, k) float32 and rows (n, k) int64."""
    scores, rows = zip(*found, strict=True) if found else ((), ())
    shape = (len(found), k)
    return np.array(scores, np.float32).reshape(shape), np.array(rows, np.int64).reshape(shape)


def tune(index: faiss.Index, vectors: np.ndarray, *, asked: int = 200, k: int = 10) -> tuple[Tuned, float]:
    """The cheapest search that finds `TARGET` of the k exact nearest, and the share that it finds.

    `asked` questions are imitated: evenly spread vectors, each moved by a part of the difference of two others, since
    real questions are farther from passages than passages from each other. If even all lists do not reach the target,
    the best search seen is returned. An index without lists is only measured.
    """
    queries, k = imitated(vectors, asked), min(k, len(vectors))
    exact = search_shards(stretches(vectors), queries, k)[1]

    def share(tuned: Tuned) -> float:
        rows = index.search(queries, tuned.candidates(k, len(vectors)), params=tuned.parameters(index))[1]
        found = rescored(vectors, queries, rows, k)[1]
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)])) if exact.size else 1.0

    if not isinstance(index, faiss.IndexIVF):
        return Tuned(), share(Tuned())
    reading = [2**power for power in range(2, 40) if 2**power < index.nlist] + [index.nlist]
    most = (Tuned(), -1.0)
    for tuned in (Tuned(lists, factor) for lists in reading for factor in FACTORS):
        most = max(most, (tuned, share(tuned)), key=lambda each: each[1])
        if most[1] >= TARGET:
            break
    return most


def imitated(vectors: np.ndarray, asked: int) -> np.ndarray:
    """Vectors (n, dim) of imitated questions, see `tune`."""
    rows = evenly(vectors, asked)
    to, off = np.random.default_rng(0).integers(0, len(vectors), (2, len(rows)))
    moved = _float32(vectors[rows]) + MOVED * (_float32(vectors[to]) - _float32(vectors[off]))
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)
