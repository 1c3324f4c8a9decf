"""Passages and their vectors, made searchable: build, search, save and load.

Only this module owns the Dataset with the attached FAISS index, because `map`, `filter` and `save_to_disk` drop it or
fail. Left out: encoding (retriever.py), index.json (index_file.py), and the use of the passages found (contexts.py).
"""

import hashlib
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import datasets
import faiss
import numpy as np
import pyarrow
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled
from safetensors import SafetensorError, safe_open

from cozyrag.data.metadata import METADATA, metadata_in, with_metadata
from cozyrag.data.passages import rows_of
from cozyrag.data.sentences import SentenceVectors, Span, sentence_spans, split_sentences
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
    in_runs,
    open_vectors,
    rescored,
    search_shards,
    stretches,
    tune,
)
from cozyrag.retrieval.index_file import (
    CONTENTS,
    COPY_AGAIN,
    FILES,
    LISTS,
    checked_facts,
    hashed,
    keeps_sentences,
    made_by,
    write_facts,
)
from cozyrag.runtime.atomic_files import flush, save_tensors
from cozyrag.runtime.contents import HASH
from cozyrag.runtime.machine_faults import fault_sentence, is_environment
from cozyrag.runtime.terminal import one_line

PASSAGES = "passages.parquet"
HARMLESS, UNPACKED = 1 << 28, 200  # passages may unpack to so many bytes, or to so many times the bytes of their file
PART = 4096  # passages read at once
JOINED = 1 << 25  # bytes of a batch of the mapped file; opening reads the head of each, from all over the disk
UNIT = 1e-2  # tolerance of the length of a vector: bf16 and int8 round
CHECKED = 65_536  # vectors whose length is checked if there are more, to load in time
FIELDS = ["id", "title", "text"]


def passage_text(title: str, text: str) -> str:
    """The input of the retriever: the title, which often names what the text only calls "it", then the text."""
    return f"{title.replace('_', ' ')}\n{text}" if title else text


class Column(Sequence):
    """A column of texts that is not a list; equal to any sequence of the same texts."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(str.__eq__, self, other))


class TextColumn(Column):
    """A column of texts that Arrow reads from a memory-mapped file."""

    def __init__(self, column: pyarrow.ChunkedArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, at: int | slice) -> str | list[str]:
        return self._column[at].to_pylist() if isinstance(at, slice) else self._column[int(at)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            yield from chunk.to_pylist()


@dataclass(frozen=True)
class Passages:
    """The columns of the passages table, for fast reading of rows; row i belongs to row i of the vectors.

    They are plain lists, or columns that stay on the disk beside an index that saves memory.

    Args:
        metadata: the other columns of each passage as JSON, in Arrow's memory, where short texts take a third of what
            Python's take; None: there are none, as in indexes of earlier versions. Passages are the same without them.
    """

    ids: Sequence[str]
    titles: Sequence[str]
    texts: Sequence[str]
    metadata: Sequence[str] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, table: Dataset, *, mapped: bool = False) -> "Passages":
        columns = table.data.column if mapped else table.select_columns(FIELDS)[:].__getitem__
        ids, titles, texts = (TextColumn(columns(name)) if mapped else columns(name) for name in FIELDS)
        if METADATA not in table.column_names:
            return cls(ids, titles, texts)
        others = table.select_columns([METADATA]).with_format("arrow")[:].column(METADATA)
        return cls(ids, titles, texts, TextColumn(others) if others.null_count < len(others) else None)

    def rows_of(self, ids: Iterable[str | None]) -> dict[str, int]:
        """The row of each of these ids that is among the passages."""
        if isinstance(self.ids, Column):  # no table of all ids, which may be millions
            return rows_of(self.ids, ids)
        return {name: self._row_of[name] for name in ids if name is not None and name in self._row_of}

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def metadata_of(self, row: int) -> dict[str, str | int | float | bool]:
        """The other columns of a passage, such as its url."""
        return {} if self.metadata is None else metadata_in(self.metadata[row] or "")

    def to_read(self) -> list[str]:
        """The input of the retriever for every passage."""
        return self.select(range(len(self.ids)))

    def select(self, rows: Sequence[int]) -> list[str]:
        """The input of the retriever for some passages."""
        return [passage_text(self.titles[row], self.texts[row]) for row in rows]

    def sentences(self) -> list[list[str]]:
        """The sentences of every passage."""
        return [split_sentences(text) for text in self.texts]

    def spans(self, rows: Sequence[int]) -> list[list[Span]]:
        """The places of the sentences of these passages in the input of the retriever, in characters."""
        shifts = [len(passage_text(self.titles[row], "")) for row in rows]
        return [
            [(start + shift, end + shift) for start, end in sentence_spans(self.texts[row])]
            for row, shift in zip(rows, shifts, strict=True)
        ]


class PassageIndex:
    """Inner-product search over L2-normalised vectors, exact unless `factory` names a quantised index.

    Args:
        table: passages, columns id, title, text.
        vectors: (n_passages, dim) float32, row i = passage i.
        fingerprint: of the retriever that encoded the vectors.
        sentences: sentence vectors of the passages, for the context filter; None: they are computed when needed.
        factory: one of the kinds of faiss_index.py. A quantised index finds candidates, which are then scored by the
            vectors themselves.
        precision: in which the retriever encoded the passages, "float32" or "int8".
        lists, tuned: contents and search parameters of an index with lists; None: they are computed.
        source, cache: the folder whose files are mapped, and the beginning of the path of what is made of its passages
            on the disk; None: all is in memory.
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
        source: Path | None = None,
        cache: Path | None = None,
    ):
        if len(table) != len(vectors):  # datasets would attach a wrong number of vectors without an error
            raise ValueError(f"expected one vector for each of {len(table)} passages, found {len(vectors)}")
        self.passages = Passages.of(table, mapped=factory != "Flat")
        self.vectors, self.sentences, self.source, self.cache = vectors, sentences, source, cache
        self.fingerprint, self.factory, self.precision = fingerprint, factory, precision
        self.lists = lists or Lists.of(vectors, factory)
        self._index = self.lists.faiss() if self.lists else build_faiss(vectors, factory)
        self.tuned = tuned or (tune(self._index, vectors)[0] if self.lists else Tuned())
        self._table = table.select_columns(["id"])  # a new Dataset: the caller's must stay free of the index
        no_vectors = np.zeros((0, vectors.shape[1]), dtype=np.float32)  # the index is already filled: no second copy
        with _no_bars():
            self._table.add_faiss_index_from_external_arrays(no_vectors, index_name=COLUMN, custom_index=self._index)

    def __len__(self) -> int:
        return len(self.passages.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, as they are and in the FAISS index, and of the sentence vectors."""
        own = self.sentences
        return 2 * self.vectors.nbytes + (own.vectors.nbytes + own.ends.nbytes if own else 0)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query.

        Args:
            queries: (n, dim) float32. k larger than the number of passages gives all of them.

        Returns:
            scores (n, k) float32, descending, and rows (n, k) int64. Equal scores keep the order of the rows; if the
            last place is tied, the first rows are in (among up to `SPARE` more candidates).
        """
        k = min(k, len(self))
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self.factory == "Mapped":
            return search_shards(stretches(self.vectors, STRETCH), queries, k)
        scores, rows = self._candidates(queries, k, self.tuned)
        if self.factory == "Flat":
            return best(scores, rows, k)
        scores, rows = rescored(self.vectors, queries, rows, k)
        few = np.flatnonzero((rows < 0).any(axis=1))  # the lists that were read hold fewer than k
        if self.lists and len(few):
            every_list = replace(self.tuned, lists=len(self.lists.centroids))
            found = self._candidates(queries[few], k, every_list)[1]
            scores[few], rows[few] = rescored(self.vectors, queries[few], found, k)
        return scores, rows

    def _candidates(self, queries: np.ndarray, k: int, tuned: Tuned) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of what FAISS finds, more than k for the sake of ties."""
        params = tuned.parameters(self._index)
        return self._table.search_batch(COLUMN, queries, tuned.candidates(k, len(self)), params=params)

    def save(self, folder: str | Path) -> None:
        """Write passages, vectors, FAISS file and index.json. What is mapped from files is copied with them, so that it
        never is in memory as a whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.source is not None and made_by(self.source) == self.fingerprint:
            return _copy(self.source, folder)
        columns = (self.passages.ids, self.passages.titles, self.passages.texts)
        table = Dataset.from_dict({name: list(column) for name, column in zip(FIELDS, columns, strict=True)})
        if self.passages.metadata is not None:
            table = with_metadata(table, list(self.passages.metadata))
        with open(folder / PASSAGES, "wb") as file:  # a name would be read as an address: "a::b" is none
            table.to_parquet(file)
        tensors = {COLUMN: np.ascontiguousarray(self.vectors)}
        if self.sentences is not None:
            tensors |= {SENTENCE_VECTORS: self.sentences.vectors, SENTENCE_ENDS: self.sentences.ends}
        # A new file, moved at the end: the vectors may be memory-mapped from the old one.
        save_tensors(tensors, folder / "vectors.safetensors.new")
        os.replace(folder / "vectors.safetensors.new", folder / "vectors.safetensors")
        (folder / LISTS).unlink(missing_ok=True)  # arrays that are mapped from it stay readable
        if self.lists:
            self.lists.save(folder / LISTS)
        faiss.write_index(self._index, str(folder / "index.faiss"))
        write_facts(
            folder,
            self.fingerprint,
            self.vectors.shape,
            self.factory,
            tuned=self.tuned,
            sentences=self.sentences is not None,
            precision=self.precision,
        )

    @classmethod
    def load(cls, folder: str | Path, *, fingerprint: str, expected: Passages | None = None) -> "PassageIndex":
        """Read what `save` or `cozyrag index` wrote.

        The FAISS index is rebuilt from the vectors (Flat: milliseconds) or from its lists. Beside an index that is not
        Flat, the vectors stay on the disk, memory-mapped, as do the texts, in an Arrow file in the cache of `datasets`.

        Raises:
            InputError: a file is missing or damaged, another retriever than `fingerprint`'s encoded the vectors, the
                numbers of vectors and passages differ, or the passages are not the `expected` ones.
        """
        folder = Path(folder)
        facts = checked_facts(folder, fingerprint)
        factory = facts.get("factory", "Flat")
        with _damage_told(folder):
            table, cache = _passages_of(folder, facts)
            tensors = _tensors(folder / "vectors.safetensors", mapped=factory != "Flat")
            vectors = tensors[COLUMN]
            _check_tensors(tensors, len(table), facts, evident=hashed(folder))
            lists = Lists.load(folder / LISTS, factory, vectors.shape)
            tuned = Tuned(**facts["search"]) if lists else None
        if len(table) != len(vectors):
            raise InputError(
                f"Expected one vector for each of the {len(table)} passages in {folder}, found {len(vectors)}: the "
                f"files belong to different indexes, so wrong passages would be found. {COPY_AGAIN}"
            )
        if expected is not None and Passages.of(table, mapped=cache is not None) != expected:
            raise InputError(
                f"Expected the index in {folder} to hold the {len(expected.ids)} passages that are searched, found "
                f"{len(table)} passages that differ from them. Run `cozyrag index` again with that passage file: only "
                "what has changed is encoded."
            )
        return cls(
            table,
            vectors,
            fingerprint=fingerprint,
            sentences=_sentences(folder, tensors),
            factory=factory,
            precision=facts.get("precision", FLOAT32),
            lists=lists,
            tuned=tuned,
            source=folder if cache else None,
            cache=cache,
        )


def indexed_passages(folder: str | Path) -> Dataset:
    """The passages of an index, memory-mapped unless it is Flat. Raises InputError as `PassageIndex.load`."""
    folder = Path(folder)
    facts = checked_facts(folder, made_by(folder) or "")
    with _damage_told(folder):
        return _passages_of(folder, facts)[0]


def _passages_of(folder: Path, facts: dict) -> tuple[Dataset, Path | None]:
    """The passages of an index, and where what is made of them is on the disk; None: they are in memory."""
    if facts.get("factory", "Flat") == "Flat":
        return _in_memory(folder / PASSAGES), None
    return mapped_passages(folder, facts)


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise for a damaged file into an InputError."""
    try:
        yield
    except (
        SafetensorError,
        pyarrow.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        if is_environment(error):
            raise InputError(f"The index cannot be read. {fault_sentence(error, folder)}") from error
        raise InputError(
            f"The index in {folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            f"{COPY_AGAIN}"
        ) from error


def _copy(source: Path, folder: Path) -> None:
    """Copy the files of an index, index.json last; a file that is mapped stays readable."""
    if source.resolve() == folder.resolve():
        return
    (folder / LISTS).unlink(missing_ok=True)
    for name in (LISTS, *FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / f"{name}.new")
            os.replace(folder / f"{name}.new", folder / name)


def _in_memory(path: Path) -> Dataset:
    """The passages of a Parquet file. `Dataset.from_parquet` takes a path for a pattern and writes into a cache."""
    from datasets.table import InMemoryTable  # imported here: the benchmarks of speed run without datasets

    file = pq.ParquetFile(path)
    schema = pyarrow.schema([file.schema_arrow.field(name) for name in _kept_columns(file)])
    return Dataset(InMemoryTable(pyarrow.Table.from_batches(_batches(path, file), schema)))


def _kept_columns(file: pq.ParquetFile) -> list[str]:
    """The columns that are read from a file of passages: with the metadata, if it has them as text."""
    schema = file.schema_arrow
    own = schema.field(METADATA).type if METADATA in schema.names else None
    return [*FIELDS, METADATA] if own in (pyarrow.string(), pyarrow.large_string()) else FIELDS


def _batches(path: Path, file: pq.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    """The passages of a Parquet file, some at a time. Raises ValueError for what are no texts, or unpack to too much.

    A small file may stand for terabytes: its pages are packed, and a repeated text is stored once.
    """
    most, held = max(HARMLESS, UNPACKED * path.stat().st_size), 0
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    pages = [group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns)]
    rows = max(1, min(PART, HARMLESS // max([1, *pages])))  # of one text for each row
    names = _kept_columns(file)
    for batch in file.iter_batches(batch_size=rows, columns=names) if sum(pages) <= most else ():
        batch = batch.select(names)
        batch.validate(full=True)  # texts are valid UTF-8
        held += batch.nbytes
        if held > most:
            break
        if any(column.null_count or not _is_text(column.type) for column in batch.select(FIELDS).columns):
            raise ValueError(f"expected texts in {', '.join(FIELDS)} of every passage, found others")
        yield batch
    if held > most or sum(pages) > most:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, and its passages more than {most:,}")


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def mapped_passages(folder: Path, facts: dict) -> tuple[Dataset, Path]:
    """The passages of an index, memory-mapped, and the beginning of the path of what is made of them on the disk.

    That is in the cache of `datasets`, the same for copies of an index: it names the hash of the file, or its place,
    size and time if index.json (`facts`) is of a version without hashes. Raises as reading the Parquet file does.
    """
    path = folder / PASSAGES
    stat = path.stat()
    known = facts.get(CONTENTS, {}).get(PASSAGES, {}).get(HASH)
    key = known or f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "cozyrag" / hashlib.sha256(key.encode()).hexdigest()[:32]
    return _mapped(path, cache), cache


def _mapped(path: Path, cache: Path) -> Dataset:
    """The same, memory-mapped from an Arrow file in the cache, or, if that is read-only, a temporary one."""
    kept = cache.with_name(f"{cache.name}.arrow")
    if kept.exists():
        with suppress(pyarrow.ArrowException, OSError, ValueError):  # damaged: made again
            return _opened(kept)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as beside:
            made = _as_arrow(path, Path(beside))
            flush(made)
            os.replace(made, kept)
        return _opened(kept)
    except OSError:
        # Without its name the file stays readable while it is mapped.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as beside:
            return _opened(_as_arrow(path, Path(beside)))


def _opened(path: Path) -> Dataset:
    """An Arrow file, memory-mapped: `Dataset.from_file`, but the system is not asked to read all of it beforehand."""
    from datasets.table import MemoryMappedTable  # as in `_in_memory`

    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)).read_all()
    return Dataset(MemoryMappedTable(table, str(path)))


def _as_arrow(path: Path, folder: Path) -> Path:
    """Write the passages of a Parquet file as Arrow, some at a time; returns the file."""
    file = pq.ParquetFile(path, memory_map=True)
    names = _kept_columns(file)
    schema = pyarrow.schema([file.schema_arrow.field(name) for name in names])
    with pyarrow.ipc.new_stream(folder / "passages.arrow", schema) as writer:
        for table in _joined(_batches(path, file)):
            writer.write_table(table.cast(schema))
    return folder / "passages.arrow"


def _joined(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.Table]:
    """The rows of many batches, one after the other, in few that have at least `JOINED` bytes, except for the last."""
    held: list[pyarrow.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.nbytes
        if size >= JOINED:
            yield pyarrow.Table.from_batches(held).combine_chunks()
            held, size = [], 0
    if held:
        yield pyarrow.Table.from_batches(held).combine_chunks()


def write_index(
    folder: Path,
    fingerprint: str,
    vectors: np.ndarray,
    memory: int | None,
    *,
    beside: int = 0,
    precision: str = FLOAT32,
) -> tuple[str, float | None]:
    """Choose, build, tune and write the index of memory-mapped vectors (n, dim) that are already in the folder.

    Args:
        memory: limit in bytes. beside: bytes of the sentence vectors in the folder. precision: of all the vectors.

    Returns:
        the kind of index, and the share of the 10 exact nearest that it finds, None for an exact index.

    Raises:
        InputError: no kind fits into `memory`.
    """
    factory, tuned, share = choose_index(len(vectors), vectors.shape[1], memory, beside=beside), None, None
    lists = Lists.of(vectors, factory)
    index = lists.faiss() if lists else build_faiss(vectors, factory)
    if lists:
        lists.save(folder / LISTS)
    if factory not in ("Flat", "Mapped"):
        tuned, share = tune(index, vectors)
    faiss.write_index(index, str(folder / "index.faiss"))
    write_facts(folder, fingerprint, vectors.shape, factory, tuned=tuned, sentences=bool(beside), precision=precision)
    return factory, share


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of datasets, which would only flash by."""
    hidden = are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not hidden:
        datasets.enable_progress_bars()


def _tensors(path: Path, *, mapped: bool) -> dict[str, np.ndarray]:
    """The tensors of a file, in memory or memory-mapped."""
    with safe_open(path, framework="numpy") as file:
        return {name: open_vectors(path, name) if mapped else file.get_tensor(name) for name in file.keys()}


def _check_tensors(tensors: dict[str, np.ndarray], count: int, facts: dict, *, evident: bool) -> None:
    """Raise ValueError for tensors of another kind or size than `count` passages need, or no vectors of length 1.

    `evident`: the file has the hash that it was written with, so a vector of another length is what the retriever said.
    """
    vectors = tensors[COLUMN]
    shape = (facts.get("passages", count), facts.get("dimensions", vectors.shape[-1] if vectors.ndim else 0))
    if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape != shape:
        raise ValueError(f"expected vectors {shape} in float32, found {vectors.shape} in {vectors.dtype}")
    for some in stretches(in_runs(vectors, CHECKED)):
        lengths = np.sqrt(np.einsum("nd,nd->n", some, some))
        right = np.isfinite(lengths) if evident else np.abs(lengths - 1) <= UNIT  # false for NaN, too
        if not right.all():
            raise ValueError(f"expected vectors of length 1, found one of length {lengths[~right][0]:.4g}")
    if SENTENCE_VECTORS in tensors:
        _check_sentences(tensors[SENTENCE_VECTORS], tensors[SENTENCE_ENDS], *map(int, vectors.shape))


def _check_sentences(vectors: np.ndarray, ends: np.ndarray, count: int, dimensions: int) -> None:
    """Raise ValueError for sentence vectors that do not belong to `count` passages, or are not finite."""
    if vectors.dtype != np.float16 or vectors.shape[1:] != (dimensions,) or ends.dtype != np.int64:
        raise ValueError(f"expected sentence vectors of {dimensions} dimensions in float16, found {vectors.shape}")
    last = int(ends[-1]) if ends.shape == (count,) and count else 0
    if ends.shape != (count,) or last != len(vectors) or (np.diff(ends, prepend=0) < 0).any():
        raise ValueError(f"expected the ends of the sentences of {count} passages, found others")
    if not np.isfinite(in_runs(vectors, CHECKED)).all():
        raise ValueError("expected finite sentence vectors, found NaN or infinity")


def _sentences(folder: Path, tensors: dict[str, np.ndarray]) -> SentenceVectors | None:
    """The sentence vectors, if there are any and they match the current rules for splitting; else a warning."""
    if SENTENCE_VECTORS not in tensors:
        return None
    if keeps_sentences(folder):
        return SentenceVectors(tensors[SENTENCE_VECTORS], tensors[SENTENCE_ENDS])
    warnings.warn(
        f"The sentence vectors in {one_line(folder)} come from a version of cozyrag that split sentences "
        "differently. They are ignored: search compares whole passages and finds less. "
        "Make the index again with `cozyrag index`.",
        stacklevel=3,
    )
    return None
