"""Vectors on the disk, in shards that several processes write and nobody gathers in memory.

A vector is known by the hash of the text that it stands for, beside the fingerprint of the retriever that made it. So what a
stopped run left, what an older index holds and what is new are all found in one way: a passage whose hash is known is not
encoded again. Left out: the retriever and the processes (indexing.py), and searching (index.py).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from cozyrag.duplicates import repeats, text_hash
from cozyrag.errors import InputError
from cozyrag.index import made_by, passage_text
from cozyrag.quantised import COLUMN, open_vectors

ROWS = 4096  # passages of a row group, which are read together
COPIED = 65_536  # vectors copied at once
SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


@dataclass(frozen=True)
class Known:
    """Vectors that lie somewhere already: `hashes` (n,) uint64 of their texts, and the memory-mapped arrays of each file."""

    hashes: np.ndarray
    arrays: tuple[np.ndarray, ...]

    def missing(self, hashes: np.ndarray) -> np.ndarray:
        """Rows of those texts, each once, that have no vector yet."""
        return np.flatnonzero(~np.isin(hashes, self.hashes) & ~repeats(hashes))

    def copy_to(self, out: np.ndarray, hashes: np.ndarray) -> None:
        """Put the vector of each of these texts into its row of `out`. All must be known."""
        order = np.argsort(self.hashes, kind="stable")
        ends = np.cumsum([len(array) for array in self.arrays])
        for start in range(0, len(hashes), COPIED):
            places = order[np.searchsorted(self.hashes, hashes[start : start + COPIED], sorter=order)]
            files = np.searchsorted(ends, places, side="right")
            for file in np.unique(files):
                mine = np.flatnonzero(files == file)
                array = self.arrays[file]
                out[start + mine] = array[places[mine] - (ends[file] - len(array))]


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
    read = map(passage_text, titles, texts)
    return np.array([text_hash(text) for text in read], dtype=np.uint64)


def known_vectors(folder: Path, shards: Path, fingerprint: str) -> Known:
    """The vectors of this retriever in an older index (`folder`) and in the shards of a run that was stopped."""
    found = []
    if made_by(folder) == fingerprint:
        found.append((stored_hashes(folder / "passages.parquet"), open_vectors(folder / "vectors.safetensors")))
        if len(found[0][0]) != len(found[0][1]):
            raise InputError(
                f"Expected one vector for each of the {len(found[0][0])} passages in {folder}, found {len(found[0][1])}: its files are not of "
                "one index. Delete that folder to make the index from the beginning."
            )
    for path in sorted(shards.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            if file.metadata()["retriever_fingerprint"] == fingerprint:
                found.append((file.get_tensor("hashes"), open_vectors(path)))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(each for each, _ in found)])
    return Known(hashes, tuple(array for _, array in found))


def encode_shards(
    passages: Path,
    rows: np.ndarray,
    hashes: np.ndarray,
    encode: Callable[[Sequence[str]], np.ndarray],
    shards: Path,
    *,
    size: int,
    share: tuple[int, int],
    fingerprint: str,
    done: Callable[[int], None],
) -> None:
    """Encode passages in shards of `size`, of which this process takes every share[1]-th, beginning with share[0].

    Args:
        passages: Parquet file of `store_passages`. rows: which of them, ascending. hashes: (n,) of all of them.
        encode: (texts) to vectors (n, dim) float32. done: receives the number of passages of each shard that was written.
    """
    file = pq.ParquetFile(passages, memory_map=True)
    for start in range(share[0] * size, len(rows), share[1] * size):
        mine = rows[start : start + size]
        vectors = encode(list(_read(file, mine)))
        name = hashlib.sha256(fingerprint.encode() + hashes[mine].tobytes()).hexdigest()[:20]
        beside = shards / f"{name}.{os.getpid()}"
        save_file({COLUMN: vectors, "hashes": hashes[mine]}, beside, metadata={"retriever_fingerprint": fingerprint})
        os.replace(beside, shards / f"{name}.safetensors")
        done(len(mine))


def _read(file: pq.ParquetFile, rows: np.ndarray) -> Iterator[str]:
    """What the retriever reads of some passages; rows ascending."""
    for group in np.unique(rows // ROWS):
        table = file.read_row_group(int(group), columns=["title", "text"])
        chosen = table.take(rows[rows // ROWS == group] - group * ROWS)
        yield from map(passage_text, chosen["title"].to_pylist(), chosen["text"].to_pylist())


def write_vectors(path: Path, hashes: np.ndarray, known: Known) -> np.ndarray:
    """Write a vectors.safetensors (one tensor, see `open_vectors`) from known vectors, a stretch at a time; returns it mapped."""
    shape = (len(hashes), known.arrays[0].shape[1])
    # The format by hand (github.com/huggingface/safetensors): its writer wants the whole tensor in memory.
    head = (
        f'{{"{COLUMN}":{{"dtype":"F32","shape":[{shape[0]},{shape[1]}],"data_offsets":[0,{shape[0] * shape[1] * 4}]}}}}'
    )
    head = head.ljust(-(-len(head) // 8) * 8).encode("ascii")
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
    out = np.memmap(path, np.float32, "r+", offset=8 + len(head), shape=shape)
    known.copy_to(out, hashes)
    out.flush()
    return out
