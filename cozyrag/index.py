"""Passages and their vectors, made searchable: build, search, save and load.

This is the one place that owns the Dataset with the attached FAISS index: `map`, `filter` and `save_to_disk` drop or
refuse such a Dataset, so nothing else may touch it. Left out: where vectors come from (retriever.py) and what is done
with the passages found (contexts.py).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import faiss
import numpy as np
import pyarrow
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from cozyrag.errors import InputError
from cozyrag.sentences import SentenceVectors, sentence_spans, split_sentences

COLUMN = "vectors"
SPARE = 16
_COPY_AGAIN = "Copy the whole folder again, or run train.py again."
FILES = ("passages.parquet", "vectors.safetensors", "index.faiss", "index.json")
BYTES = {"Flat": 4, "SQ8": 1}  # of memory for each dimension of a vector, by FAISS index; the first one is exact
TRAINED_ON = 100_000  # vectors, evenly spread, that a quantised index learns its ranges from
ADDED = 65_536  # vectors handed to FAISS at once
NEEDED = tuple(
    name for name in FILES if name != "index.faiss"
)  # which is written for other programs and never read here


def passage_text(title: str, text: str) -> str:
    """What the retriever reads of a passage: its title, which often names what the text only calls "it", then the text."""
    return f"{title.replace('_', ' ')}\n{text}" if title else text


def made_by(folder: str | Path) -> str | None:
    """Fingerprint of the retriever whose vectors lie in a folder; None when no whole index is there."""
    facts = _facts(Path(folder))
    return facts and facts["retriever_fingerprint"]


def _facts(folder: Path) -> dict | None:
    """What index.json says; None when it is missing or no longer readable."""
    try:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "retriever_fingerprint" in facts else None


def write_facts(
    path: Path, fingerprint: str, shape: tuple[int, int], factory: str, *, sizes: dict[str, int] | None = None
) -> None:
    """Write index.json: whose vectors, how many (`shape`: (n, dim)), which FAISS index, and the `sizes` of the other files."""
    facts = {
        "retriever_fingerprint": fingerprint,
        "passages": shape[0],
        "dimensions": shape[1],
        "metric": "inner product",
        "factory": factory,
    } | ({"bytes": sizes} if sizes else {})
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def choose_index(count: int, dimensions: int, memory: int | None) -> str:
    """The FAISS index, a key of BYTES, for `count` vectors within `memory` bytes: the most exact one that fits; None: no limit.

    Raises InputError if none fits.
    """
    for factory, size in BYTES.items():
        if memory is None or count * dimensions * size <= memory:
            return factory
    raise InputError(
        f"--index_memory: {count} vectors of {dimensions} dimensions need at least {count * dimensions * size / 1e6:,.2f} MB ({factory}), "
        f"found {memory / 1e6:,.2f} MB. Give more, or index fewer passages."
    )


def build_faiss(vectors: np.ndarray, factory: str) -> faiss.Index:
    """A FAISS index of vectors (n, dim), which may be memory-mapped; the same vectors give the same index."""
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        sample = np.unique(np.linspace(0, len(vectors) - 1, min(TRAINED_ON, len(vectors))).astype(np.int64))
        index.train(np.ascontiguousarray(vectors[sample], dtype=np.float32))
    for start in range(0, len(vectors), ADDED):
        index.add(np.ascontiguousarray(vectors[start : start + ADDED], dtype=np.float32))
    return index


def open_vectors(path: str | Path) -> np.ndarray:
    """The vectors (n, dim) float32 of a vectors.safetensors, memory-mapped: only what is touched is read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        facts = json.loads(file.read(length))[COLUMN]
    return np.memmap(path, np.float32, "r", offset=8 + length + facts["data_offsets"][0], shape=tuple(facts["shape"]))


def search_shards(shards: Iterable[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search over vectors that lie in several arrays, as `PassageIndex.search` over one that holds them all in order.

    Args:
        shards: each (n, dim) float32, may be memory-mapped; one at a time is held in memory.

    Returns:
        scores (n, k) descending and rows (n, k), counted over all shards; equal scores stand in the order of the rows.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    scores, rows = np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
    before = 0
    for shard in filter(len, shards):
        found, places = build_faiss(shard, "Flat").search(queries, min(k + SPARE, len(shard)))
        scores, rows = np.hstack([scores, found]), np.hstack([rows, places + before])
        scores, rows = _best(scores, rows, k + SPARE)
        before += len(shard)
    return scores[:, :k], rows[:, :k]


def share_found(index: faiss.Index, vectors: np.ndarray, *, asked: int = 100, k: int = 10) -> float:
    """Recall of a quantised index: the share of the `k` exact nearest that it finds for `asked` of the vectors, evenly spread."""
    queries = vectors[np.unique(np.linspace(0, len(vectors) - 1, asked).astype(np.int64))]
    shards = (vectors[start : start + ADDED] for start in range(0, len(vectors), ADDED))
    exact = search_shards(shards, queries, k)[1]
    found = index.search(np.ascontiguousarray(queries), min(k + SPARE, len(vectors)))[1]
    scores = np.einsum("nkd,nd->nk", vectors[found], queries)
    rows = _best(scores, found, k)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, rows, strict=True)]))


def _best(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each line, equal scores in the order of the rows."""
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of datasets, which here would flash by and say nothing."""
    hidden = are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not hidden:
        datasets.enable_progress_bars()


@dataclass(frozen=True)
class Passages:
    """The columns of the passages table as plain lists, for reading rows fast; row i is row i of the vectors."""

    ids: list[str]
    titles: list[str]
    texts: list[str]

    @classmethod
    def of(cls, table: Dataset) -> "Passages":
        columns = table[:]
        return cls(columns["id"], columns["title"], columns["text"])

    def to_read(self) -> list[str]:
        """Every passage as the retriever reads it."""
        return self.select(range(len(self.ids)))

    def select(self, rows: Sequence[int]) -> list[str]:
        """Some passages as the retriever reads them."""
        return [passage_text(self.titles[row], self.texts[row]) for row in rows]

    def sentences(self) -> list[list[str]]:
        """The sentences of every passage."""
        return [split_sentences(text) for text in self.texts]

    def spans(self, rows: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Where the sentences of these passages stand in what the retriever reads, in characters."""
        shifts = [len(read) - len(self.texts[row]) for read, row in zip(self.select(rows), rows, strict=True)]
        return [
            [(start + shift, end + shift) for start, end in sentence_spans(self.texts[row])]
            for row, shift in zip(rows, shifts, strict=True)
        ]


class PassageIndex:
    """Inner-product search over L2-normalised vectors, exact unless `factory` names a quantised index.

    Args:
        table: passages, columns id, title, text.
        vectors: (n_passages, dim) float32, row i = passage i.
        fingerprint: that of the retriever that made the vectors.
        sentences: vectors of the passages' sentences, for the context filter; None where they are made on the fly.
        factory: a key of BYTES. A quantised index finds candidates, which are then scored by the vectors themselves.
    """

    def __init__(
        self,
        table: Dataset,
        vectors: np.ndarray,
        *,
        fingerprint: str,
        sentences: SentenceVectors | None = None,
        factory: str = "Flat",
    ):
        if len(table) != len(vectors):  # datasets would attach a wrong number of vectors without a word
            raise ValueError(f"expected one vector for each of {len(table)} passages, found {len(vectors)}")
        self.passages = Passages.of(table)
        self.vectors = vectors
        self.sentences = sentences
        self.fingerprint = fingerprint
        self.factory = factory
        self._index = build_faiss(vectors, factory)
        self._table = table.select_columns(
            ["id"]
        )  # a Dataset of our own: the caller's stays free of the index, which goes by name
        no_vectors = np.zeros((0, vectors.shape[1]), dtype=np.float32)  # the index is already filled: no second copy
        with _no_bars():
            self._table.add_faiss_index_from_external_arrays(no_vectors, index_name=COLUMN, custom_index=self._index)

    def __len__(self) -> int:
        return len(self.passages.ids)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query.

        Args:
            queries: (n, dim) float32. k larger than the number of passages gives all of them.

        Returns:
            scores (n, k) float32, descending, and rows (n, k) int64; equal scores stand in the order of the rows, and the
            first of them are in (of up to `SPARE` that the cut would leave out).
        """
        k = min(k, len(self))
        # FAISS keeps any of those that tie for the last place, so a few more are asked for and cut off after sorting.
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        scores, rows = self._table.search_batch(COLUMN, queries, min(k + SPARE, len(self)))
        if self.factory != "Flat":
            scores = np.einsum("nkd,nd->nk", self.vectors[rows], queries)
        return _best(scores, rows, k)

    def save(self, folder: str | Path) -> None:
        """Write passages, vectors, FAISS file and index.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict({"id": self.passages.ids, "title": self.passages.titles, "text": self.passages.texts})
        table.to_parquet(str(folder / "passages.parquet"))
        tensors = {COLUMN: np.ascontiguousarray(self.vectors)}
        if self.sentences is not None:
            tensors |= {"sentence_vectors": self.sentences.vectors, "sentence_ends": self.sentences.ends}
        # Beside its place first: the vectors that are written may be read from the very file that is there.
        save_file(tensors, folder / "vectors.safetensors.new")
        os.replace(folder / "vectors.safetensors.new", folder / "vectors.safetensors")
        faiss.write_index(self._index, str(folder / "index.faiss"))
        sizes = {name: (folder / name).stat().st_size for name in FILES[:-1]}
        write_facts(folder / "index.json", self.fingerprint, self.vectors.shape, self.factory, sizes=sizes)

    @classmethod
    def load(cls, folder: str | Path, *, fingerprint: str, expected: Passages | None = None) -> "PassageIndex":
        """Read what `save` or `cozyrag index` wrote; the FAISS index is rebuilt from the vectors (flat: milliseconds).

        Beside a quantised index the vectors stay on the disk, memory-mapped.

        Raises:
            InputError: a file is missing, the vectors were made by another retriever than `fingerprint`'s, they are not as
                many as the passages, or those are not the `expected` ones.
        """
        folder = Path(folder)
        missing = [name for name in NEEDED if not (folder / name).exists()]
        if missing:
            raise InputError(
                f"Expected an index in {folder}, {missing[0]} is missing. Run train.py again, or copy the whole folder."
            )
        facts = _facts(folder)
        if facts is None:
            raise InputError(f"{folder / 'index.json'} is damaged. {_COPY_AGAIN}")
        for name, size in facts.get("bytes", {}).items():
            if (folder / name).exists() and (folder / name).stat().st_size != size:
                raise InputError(
                    f"Expected {size} bytes in {folder / name}, found {(folder / name).stat().st_size}: the file was cut short or replaced. {_COPY_AGAIN}"
                )
        found = facts["retriever_fingerprint"]
        if found != fingerprint:
            raise InputError(
                f"The index in {folder} was made by retriever {found}, but the retriever in use is {fingerprint}: their vectors do not "
                "compare. Use the retriever that was saved with the index, or index the passages again."
            )
        factory = _factory(folder)
        try:
            with _no_bars():
                table = Dataset.from_parquet(str(folder / "passages.parquet"), keep_in_memory=True)
            tensors = _tensors(folder / "vectors.safetensors", mapped=factory != "Flat")
        except (SafetensorError, datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(
                f"The index in {folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}). {_COPY_AGAIN}"
            ) from error
        if len(table) != len(tensors[COLUMN]):
            raise InputError(
                f"Expected one vector for each of the {len(table)} passages in {folder}, found {len(tensors[COLUMN])}: the files are not of "
                "one index, and passages would be found under the vectors of others. Copy the whole folder again, or run train.py again."
            )
        if expected is not None and Passages.of(table) != expected:
            raise InputError(
                f"Expected the index in {folder} to be of the {len(expected.ids)} passages that are searched, found {len(table)} passages that are not "
                "the same. Run `cozyrag index` again with that passage file: only what has changed is encoded."
            )
        kept = "sentence_vectors" in tensors
        sentences = SentenceVectors(tensors["sentence_vectors"], tensors["sentence_ends"]) if kept else None
        return cls(table, tensors[COLUMN], fingerprint=found, sentences=sentences, factory=factory)


def _factory(folder: Path) -> str:
    facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    factory = facts.get("factory", "Flat")
    if factory not in BYTES:
        raise InputError(
            f"{folder / 'index.json'}: expected a FAISS index among {', '.join(BYTES)}, found {factory!r}. Update cozyrag, or make the index again."
        )
    return factory


def _tensors(path: Path, *, mapped: bool) -> dict[str, np.ndarray]:
    """The tensors of a file; `mapped`: the vectors stay in it until they are touched."""
    if not mapped:
        return load_file(path)
    with safe_open(path, framework="numpy") as file:
        others = {name: file.get_tensor(name) for name in file.keys() if name != COLUMN}
    return {COLUMN: open_vectors(path), **others}
