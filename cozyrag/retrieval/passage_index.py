"""Passages and their vectors, made searchable: build, search, save and load.

This is the one place that owns the Dataset with the attached FAISS index: `map`, `filter` and `save_to_disk` drop or
refuse such a Dataset, so nothing else may touch it. Left out: where vectors come from (retriever.py) and what is done
with the passages found (contexts.py).
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
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

from cozyrag.data.sentences import RULES, SentenceVectors, Span, sentence_spans, split_sentences
from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import FLOAT32
from cozyrag.retrieval.faiss_index import (
    COLUMN,
    SENTENCE_ENDS,
    SENTENCE_VECTORS,
    STRETCH,
    Lists,
    Tuned,
    best,
    build_faiss,
    choose_index,
    is_known,
    listed,
    open_vectors,
    rescored,
    search_shards,
    stretches,
    tune,
)

_COPY_AGAIN = "Copy the whole folder again, or run train.py again."
FILES = ("passages.parquet", "vectors.safetensors", "index.faiss", "index.json")
LISTS = "lists.safetensors"  # beside the others where the index has lists
EXACT = ("Flat", "Mapped")
NEEDED = tuple(
    name for name in FILES if name != "index.faiss"
)  # which is written for other programs and never read here


def passage_text(title: str, text: str) -> str:
    """What the retriever reads of a passage: its title, which often names what the text only calls "it", then the
    text."""
    return f"{title.replace('_', ' ')}\n{text}" if title else text


def made_by(folder: str | Path) -> str | None:
    """Fingerprint of the retriever whose vectors lie in a folder; None when no whole index is there."""
    facts = _facts(Path(folder))
    return facts and facts["retriever_fingerprint"]


def precision_of(folder: Path) -> str:
    """In which precision the vectors in a folder were made."""
    return (_facts(folder) or {}).get("precision", FLOAT32)


def keeps_sentences(folder: Path) -> bool:
    """Whether vectors of sentences lie in a folder, and pair up with sentences as they are told apart now."""
    return (_facts(folder) or {}).get("sentence_rules") == RULES


def _facts(folder: Path) -> dict | None:
    """What index.json says; None when it is missing or no longer readable."""
    try:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "retriever_fingerprint" in facts else None


def write_facts(
    path: Path, fingerprint: str, shape: tuple[int, int], factory: str, *, tuned: Tuned | None = None, sizes: dict[str, int] | None = None,
    sentences: bool = False, precision: str = FLOAT32,
) -> None:  # fmt: skip
    """Write index.json: whose vectors, how many (`shape`: (n, dim)), which FAISS index, how it is searched, the `sizes` of the other files.

    `sentences`: whether vectors of sentences lie there too; then also by which rules those were told apart. `precision`: in which
    the passages were encoded.
    """
    facts = {
        "retriever_fingerprint": fingerprint,
        "passages": shape[0],
        "dimensions": shape[1],
        "metric": "inner product",
        "factory": factory,
    }
    facts |= ({"search": vars(tuned)} if listed(factory) else {}) | ({"bytes": sizes} if sizes else {})
    facts |= ({"sentence_rules": RULES} if sentences else {}) | (
        {"precision": precision} if precision != FLOAT32 else {}
    )
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_index(
    place: Path, fingerprint: str, vectors: np.ndarray, memory: int | None, *, beside: int = 0, precision: str = FLOAT32
) -> tuple[str, float | None]:
    """Choose, make, tune and write the index of vectors (n, dim) that lie in `place` already, memory-mapped.

    `beside`: bytes of the vectors of sentences there; `precision`: in which all were made.

    Returns the kind, and the share of the 10 exact nearest that it finds, None where it finds them all. Raises InputError if
    none fits into `memory` bytes.
    """
    factory, tuned, share = choose_index(*vectors.shape, memory, beside=beside), None, None
    lists = Lists.of(vectors, factory) if listed(factory) else None
    built = lists.faiss() if lists else build_faiss(vectors, factory)
    if lists:
        lists.save(place / LISTS)
    if factory not in EXACT:
        tuned, share = tune(built, vectors)
    faiss.write_index(built, str(place / "index.faiss"))
    write_facts(
        place / "index.json",
        fingerprint,
        vectors.shape,
        factory,
        tuned=tuned,
        sentences=bool(beside),
        precision=precision,
    )
    return factory, share


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of datasets, which here would flash by and say nothing."""
    hidden = are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not hidden:
        datasets.enable_progress_bars()


class TextColumn(Sequence):
    """A column of texts that Arrow reads from a memory-mapped file; equal to any sequence of the same texts."""

    def __init__(self, column: pyarrow.ChunkedArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, at: int | slice) -> str | list[str]:
        return self._column[at].to_pylist() if isinstance(at, slice) else self._column[int(at)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(str.__eq__, self, other))


@dataclass(frozen=True)
class Passages:
    """The columns of the passages table for reading rows fast; row i is row i of the vectors.

    Plain lists, or, beside an index that is to need little memory, columns that stay on the disk.
    """

    ids: Sequence[str]
    titles: Sequence[str]
    texts: Sequence[str]

    @classmethod
    def of(cls, table: Dataset, *, mapped: bool = False) -> "Passages":
        if mapped:
            return cls(*(TextColumn(table.data.column(name)) for name in ("id", "title", "text")))
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

    def spans(self, rows: Sequence[int]) -> list[list[Span]]:
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
        factory: one of the kinds of faiss_index.py. A quantised index finds candidates, which are then scored by the vectors themselves.
        precision: in which the retriever encoded the passages, "float32" or "int8".
        lists: what an index with lists holds, if it was made before; tuned: how that is searched. Both are found if not given.
    """

    def __init__(
        self,
        table: Dataset,
        vectors: np.ndarray,
        *,
        fingerprint: str,
        sentences: SentenceVectors | None = None,
        factory: str = "Flat",
        precision: str = FLOAT32,
        lists: Lists | None = None,
        tuned: Tuned | None = None,
    ):
        if len(table) != len(vectors):  # datasets would attach a wrong number of vectors without a word
            raise ValueError(f"expected one vector for each of {len(table)} passages, found {len(vectors)}")
        self.passages = Passages.of(table, mapped=factory != "Flat")
        self.vectors = vectors
        self.sentences = sentences
        self.fingerprint = fingerprint
        self.factory = factory
        self.precision = precision
        self.lists = (lists or Lists.of(vectors, factory)) if listed(factory) else None
        self._index = self.lists.faiss() if self.lists else build_faiss(vectors, factory)
        self.tuned = tuned or (tune(self._index, vectors)[0] if self.lists else Tuned())
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
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.factory == "Mapped":
            return search_shards(stretches(self.vectors, STRETCH), queries, k)
        # FAISS keeps any of those that tie for the last place, so a few more are asked for and cut off after sorting.
        more = self.tuned.parameters() if self.lists else {}
        scores, rows = self._table.search_batch(COLUMN, queries, self.tuned.candidates(k, len(self)), **more)
        if self.factory == "Flat":
            return best(scores, rows, k)
        scores, rows = rescored(self.vectors, queries, rows, k)
        few = np.flatnonzero((rows < 0).any(axis=1))  # the lists that were read hold less than k
        if len(few):
            more = Tuned(len(self.lists.centroids)).parameters()
            found = self._table.search_batch(COLUMN, queries[few], self.tuned.candidates(k, len(self)), **more)[1]
            scores[few], rows[few] = rescored(self.vectors, queries[few], found, k)
        return scores, rows

    def save(self, folder: str | Path) -> None:
        """Write passages, vectors, FAISS file and index.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns = ("id", self.passages.ids), ("title", self.passages.titles), ("text", self.passages.texts)
        table = Dataset.from_dict({name: list(column) for name, column in columns})
        table.to_parquet(str(folder / "passages.parquet"))
        tensors = {COLUMN: np.ascontiguousarray(self.vectors)}
        if self.sentences is not None:
            tensors |= {SENTENCE_VECTORS: self.sentences.vectors, SENTENCE_ENDS: self.sentences.ends}
        # Beside its place first: the vectors that are written may be read from the very file that is there.
        save_file(tensors, folder / "vectors.safetensors.new")
        os.replace(folder / "vectors.safetensors.new", folder / "vectors.safetensors")
        (folder / LISTS).unlink(missing_ok=True)  # what is mapped from it stays readable
        if self.lists:
            self.lists.save(folder / LISTS)
        faiss.write_index(self._index, str(folder / "index.faiss"))
        sizes = {name: (folder / name).stat().st_size for name in (*FILES[:-1], *([LISTS] if self.lists else []))}
        write_facts(folder / "index.json", self.fingerprint, self.vectors.shape, self.factory, tuned=self.tuned, sizes=sizes, sentences=self.sentences is not None, precision=self.precision)  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path, *, fingerprint: str, expected: Passages | None = None) -> "PassageIndex":
        """Read what `save` or `cozyrag index` wrote; the FAISS index is rebuilt from the vectors (flat: milliseconds) or from its lists.

        Beside an index that is not flat the vectors stay on the disk, memory-mapped, and so do the texts, in an Arrow file that
        `datasets` makes in its cache.

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
                    f"Expected {size} bytes in {folder / name}, found {(folder / name).stat().st_size}: the file was "
                    f"cut short or replaced. {_COPY_AGAIN}"
                )
        found = facts["retriever_fingerprint"]
        if found != fingerprint:
            raise InputError(
                f"The index in {folder} was made by retriever {found}, but the retriever in use is {fingerprint}: "
                "their vectors do not compare. Use the retriever that was saved with the index, or index the "
                "passages again."
            )
        factory, mapped = _factory(folder), _factory(folder) != "Flat"
        try:
            with _no_bars():
                table = Dataset.from_parquet(str(folder / "passages.parquet"), keep_in_memory=not mapped)
            tensors = _tensors(folder / "vectors.safetensors", mapped=mapped)
            lists = Lists.load(folder / LISTS, factory, tensors[COLUMN].shape) if listed(factory) else None
            tuned = Tuned(**facts["search"]) if lists else None
        except (SafetensorError, datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:  # fmt: skip
            raise InputError(
                f"The index in {folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
                f"{_COPY_AGAIN}"
            ) from error
        if len(table) != len(tensors[COLUMN]):
            raise InputError(
                f"Expected one vector for each of the {len(table)} passages in {folder}, found "
                f"{len(tensors[COLUMN])}: the files are not of one index, and passages would be found under the "
                "vectors of others. Copy the whole folder again, or run train.py again."
            )
        if expected is not None and Passages.of(table) != expected:
            raise InputError(
                f"Expected the index in {folder} to be of the {len(expected.ids)} passages that are searched, found "
                f"{len(table)} passages that are not the same. Run `cozyrag index` again with that passage file: only "
                "what has changed is encoded."
            )
        kept = SENTENCE_VECTORS in tensors and keeps_sentences(folder)
        if SENTENCE_VECTORS in tensors and not kept:
            warnings.warn(
                f"The vectors of sentences in {folder} are of another version of cozyrag, which told sentences apart "
                "differently. They are not used: whole passages are compared, and less is found. Make the index "
                "again with `cozyrag index`.",
                stacklevel=2,
            )
        sentences = SentenceVectors(tensors[SENTENCE_VECTORS], tensors[SENTENCE_ENDS]) if kept else None
        precision = precision_of(folder)
        return cls(table, tensors[COLUMN], fingerprint=found, sentences=sentences, factory=factory, precision=precision, lists=lists, tuned=tuned)  # fmt: skip


def _factory(folder: Path) -> str:
    facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    factory = facts.get("factory", "Flat")
    if not is_known(factory):
        raise InputError(
            f"{folder / 'index.json'}: expected a FAISS index such as Flat, SQ8, IVF1024,PQ96x4fs or Mapped, found "
            f"{factory!r}. Update cozyrag, or make the index again."
        )
    return factory


def _tensors(path: Path, *, mapped: bool) -> dict[str, np.ndarray]:
    """The tensors of a file; `mapped`: they stay in it until they are touched."""
    if not mapped:
        return load_file(path)
    with safe_open(path, framework="numpy") as file:
        return {name: open_vectors(path, name) for name in file.keys()}
