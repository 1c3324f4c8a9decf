"""Vectors on the disk, in shards that several processes write and nobody gathers in memory.

A vector is known by the hash of the text that it stands for, beside the fingerprint of the retriever that made it. So what a
stopped run left, what an older index holds and what is new are all found in one way: a passage whose hash is known is not
encoded again. Left out: the retriever and the processes (build_index.py), and searching (passage_index.py).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from cozyrag.data.deduplication import repeats, text_hash
from cozyrag.data.sentences import RULES, SentenceVectors, places_of
from cozyrag.errors import InputError
from cozyrag.retrieval.faiss_index import COLUMN, SENTENCE_ENDS, SENTENCE_VECTORS, TYPES, open_vectors
from cozyrag.retrieval.passage_index import Passages, keeps_sentences, made_by, passage_text, precision_of

ROWS = 4096  # passages of a row group, which are read together
COPIED = 8192  # passages whose vectors are copied at once, with those of their sentences some 50 MB
SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


@dataclass(frozen=True)
class Known:
    """Vectors that lie somewhere already: `hashes` (n,) uint64 of their texts, and the memory-mapped arrays of each file.

    `sentences`: of each file those of the sentences too, or empty where they are not wanted.
    """

    hashes: np.ndarray
    arrays: tuple[np.ndarray, ...]
    sentences: tuple[SentenceVectors, ...] = ()

    def missing(self, hashes: np.ndarray) -> np.ndarray:
        """Rows of those texts, each once, that have no vector yet."""
        return np.flatnonzero(~np.isin(hashes, self.hashes) & ~repeats(hashes))

    def copy_to(self, out: np.ndarray, hashes: np.ndarray) -> None:
        """Put the vector of each of these texts into its row of `out`. All must be known."""
        for rows, file, places in self._found(hashes):
            out[rows] = self.arrays[file][places]

    def sentence_ends(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64 where the sentences of each of these texts end when they stand one text after another."""
        counts = np.zeros(len(hashes), dtype=np.int64)
        for rows, file, places in self._found(hashes):
            counts[rows] = places_of(self.sentences[file].ends, places)[1]
        return np.cumsum(counts)

    def copy_sentences_to(self, out: np.ndarray, ends: np.ndarray, hashes: np.ndarray) -> None:
        """Put the vectors of the sentences of these texts, which end at `ends`, into `out`."""
        for rows, file, places in self._found(hashes):
            out[places_of(ends, rows)[0]] = self.sentences[file].vectors[
                places_of(self.sentences[file].ends, places)[0]
            ]

    def _found(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Which of these texts lie in which file, and at which places there; a stretch of texts at a time."""
        order = np.argsort(self.hashes, kind="stable")
        ends = np.cumsum([len(array) for array in self.arrays])
        for start in range(0, len(hashes), COPIED):
            places = order[np.searchsorted(self.hashes, hashes[start : start + COPIED], sorter=order)]
            files = np.searchsorted(ends, places, side="right")
            for file in np.unique(files):
                mine = np.flatnonzero(files == file)
                yield start + mine, file, places[mine] - (ends[file] - len(self.arrays[file]))


def store_passages(rows: Iterable[tuple[str, str, str]], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write (id, title, text) rows as Parquet; returns the hashes (n,) of the ids and of what the retriever reads."""
    ids, contents, held = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], []

    def flush() -> None:
        columns = [list(column) for column in zip(*held, strict=True)] or [[], [], []]
        writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], SCHEMA))
        ids.append(np.array([text_hash(key) for key in columns[0]], dtype=np.uint64))
        contents.append(_hashes(columns[1], columns[2]))
        held.clear()

    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for row in rows:
            held.append(row)
            if len(held) == ROWS:
                flush()
        if held:
            flush()
    return np.concatenate(ids), np.concatenate(contents)


def stored_hashes(path: Path) -> np.ndarray:
    """The hashes (n,) of what the retriever reads, for every passage of a Parquet file."""
    batches = pq.ParquetFile(path).iter_batches(columns=["title", "text"])
    return np.concatenate([np.zeros(0, np.uint64), *(_hashes(*(column.to_pylist() for column in each.columns)) for each in batches)])  # fmt: skip


def _hashes(titles: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    # where the title ends counts: it has no sentences of its own
    read = (f"{len(title)}|{passage_text(title, text)}" for title, text in zip(titles, texts, strict=True))
    return np.array([text_hash(text) for text in read], dtype=np.uint64)


def known_vectors(folder: Path, shards: Path, fingerprint: str, *, sentences: bool, precision: str) -> Known:
    """The vectors of this retriever, in this precision, in an older index (`folder`) and in the shards of a run that was stopped.

    `sentences`: those of the sentences are wanted too, so that files without them are of no use.
    """
    found = []
    same = made_by(folder) == fingerprint and precision_of(folder) == precision
    if same and (not sentences or keeps_sentences(folder)):
        found.append((stored_hashes(folder / "passages.parquet"), folder / "vectors.safetensors"))
        if len(found[0][0]) != len(open_vectors(found[0][1])):
            raise InputError(
                f"Expected one vector for each of the {len(found[0][0])} passages in {folder}, found "
                f"{len(open_vectors(found[0][1]))}: its files are not of one index. Delete that folder to make the "
                "index from the beginning."
            )
    for path in sorted(shards.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            if _facts_of(fingerprint, precision, sentences).items() <= file.metadata().items():
                found.append((file.get_tensor("hashes"), path))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(each for each, _ in found)])
    own = (
        SentenceVectors(open_vectors(path, SENTENCE_VECTORS), open_vectors(path, SENTENCE_ENDS)) for _, path in found
    )
    return Known(hashes, tuple(open_vectors(path) for _, path in found), tuple(own) if sentences else ())


def _facts_of(fingerprint: str, precision: str, sentences: bool) -> dict[str, str]:
    """What a shard says of how it was made."""
    facts = {"retriever_fingerprint": fingerprint, "precision": precision}
    return facts | ({"sentence_rules": str(RULES)} if sentences else {})


def encode_shards(
    passages: Path,
    rows: np.ndarray,
    hashes: np.ndarray,
    encode: Callable[[Passages], tuple[np.ndarray, SentenceVectors | None]],
    shards: Path,
    *,
    size: int,
    share: tuple[int, int],
    fingerprint: str,
    precision: str,
    done: Callable[[int], None],
) -> None:
    """Encode passages in shards of `size`, of which this process takes every share[1]-th, beginning with share[0].

    Args:
        passages: Parquet file of `store_passages`. rows: which of them, ascending. hashes: (n,) of all of them.
        encode: passages, without ids, to their vectors (n, dim) float32 and, if wanted, those of their sentences. done: receives the number of passages of each shard that was written.
    """
    file = pq.ParquetFile(passages, memory_map=True)
    for start in range(share[0] * size, len(rows), share[1] * size):
        mine = rows[start : start + size]
        vectors, sentences = encode(_read(file, mine))
        tensors = {COLUMN: vectors, "hashes": hashes[mine]}
        if sentences is not None:
            tensors |= {SENTENCE_VECTORS: sentences.vectors, SENTENCE_ENDS: sentences.ends}
        name = hashlib.sha256(fingerprint.encode() + hashes[mine].tobytes()).hexdigest()[:20]
        beside = shards / f"{name}.{os.getpid()}"
        save_file(tensors, beside, metadata=_facts_of(fingerprint, precision, sentences is not None))
        os.replace(beside, shards / f"{name}.safetensors")
        done(len(mine))


def _read(file: pq.ParquetFile, rows: np.ndarray) -> Passages:
    """Some passages, without their ids; rows ascending."""
    titles, texts = [], []
    for group in np.unique(rows // ROWS):
        table = file.read_row_group(int(group), columns=["title", "text"])
        chosen = table.take(rows[rows // ROWS == group] - group * ROWS)
        titles += chosen["title"].to_pylist()
        texts += chosen["text"].to_pylist()
    return Passages([""] * len(texts), titles, texts)


def write_vectors(path: Path, hashes: np.ndarray, known: Known) -> np.ndarray:
    """Write a vectors.safetensors (see `open_vectors`) from known vectors, a stretch at a time; returns those of
    passages mapped."""
    dimensions = known.arrays[0].shape[1]
    ends = known.sentence_ends(hashes) if known.sentences else None
    wanted = {COLUMN: ("F32", (len(hashes), dimensions))}
    if ends is not None:
        count = int(ends[-1]) if len(ends) else 0
        wanted |= {SENTENCE_ENDS: ("I64", ends.shape), SENTENCE_VECTORS: ("F16", (count, dimensions))}
    out = create_tensors(path, wanted)
    known.copy_to(out[COLUMN], hashes)
    if ends is not None:
        out[SENTENCE_ENDS][:] = ends
        known.copy_sentences_to(out[SENTENCE_VECTORS], ends, hashes)
    for tensor in out.values():
        tensor.flush()
    return out[COLUMN]


def create_tensors(path: Path, wanted: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """A safetensors file of these tensors, by name (dtype, shape), all zero; returns them mapped, to be written into.

    The format by hand (github.com/huggingface/safetensors): its writer wants whole tensors in memory.
    """
    head, offset = {}, 0
    for name, (dtype, shape) in wanted.items():
        end = offset + int(np.prod(shape)) * np.dtype(TYPES[dtype]).itemsize
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head)
    text = text.ljust(-(-len(text) // 8) * 8).encode("ascii")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return {name: open_vectors(path, name, mode="r+") for name in wanted}
