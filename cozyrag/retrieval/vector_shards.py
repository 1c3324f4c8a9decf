"""Vectors on the disk, in shards that several processes write and no process gathers in memory.

A vector is identified by the hash of its text and the fingerprint of its retriever. So the shards of a stopped run and
the vectors of an older index are found alike, and a passage with a known hash is not encoded again. Left out: the
retriever and the processes (commands/index.py), and search (passage_index.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from safetensors import SafetensorError, safe_open

from cozyrag.data.deduplication import repeats, text_hash
from cozyrag.data.metadata import METADATA
from cozyrag.data.sentences import RULES, SentenceVectors, places_of
from cozyrag.errors import InputError
from cozyrag.retrieval.faiss_index import COLUMN, SENTENCE_ENDS, SENTENCE_VECTORS, open_vectors
from cozyrag.retrieval.index_file import check_index_contents, keeps_sentences, made_by, precision_of
from cozyrag.retrieval.passage_index import FIELDS, Passages, passage_text
from cozyrag.runtime.atomic_files import replacing_file, reserve, save_tensors
from cozyrag.runtime.contents import HASH
from cozyrag.runtime.machine_faults import is_environment
from cozyrag.runtime.tensor_files import TYPES, read_header

ROWS = 4096  # passages in a row group, which are read together
COPIED = 8192  # passages whose vectors are copied at once: some 50 MB with their sentence vectors
DELETE = "Delete that folder to make the index from the beginning."
SCHEMA = pa.schema([(name, pa.string()) for name in (*FIELDS, METADATA)])


@dataclass(frozen=True)
class Known:
    """Vectors that exist already: `hashes` (n,) uint64 of their texts, and the memory-mapped array of each file.

    `sentences`: the sentence vectors of each file; empty if they are not wanted.
    """

    hashes: np.ndarray
    arrays: tuple[np.ndarray, ...]
    sentences: tuple[SentenceVectors, ...] = ()

    def missing(self, hashes: np.ndarray) -> np.ndarray:
        """Rows of the texts that have no vector yet, equal texts once."""
        return np.flatnonzero(~np.isin(hashes, self.hashes) & ~repeats(hashes))

    def copy_to(self, out: np.ndarray, hashes: np.ndarray) -> None:
        """Copy the vector of each of these texts, which must all be known, into its row of `out`."""
        for rows, file, places in self._found(hashes):
            out[rows] = self.arrays[file][places]

    def sentence_ends(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64, where the sentences of each of these texts end if the texts follow one another."""
        counts = np.zeros(len(hashes), dtype=np.int64)
        for rows, file, places in self._found(hashes):
            counts[rows] = places_of(self.sentences[file].ends, places)[1]
        return np.cumsum(counts)

    def copy_sentences_to(self, out: np.ndarray, ends: np.ndarray, hashes: np.ndarray) -> None:
        """Copy the sentence vectors of these texts, which end at `ends`, into `out`."""
        for rows, file, places in self._found(hashes):
            own = self.sentences[file]
            out[places_of(ends, rows)[0]] = own.vectors[places_of(own.ends, places)[0]]

    def _found(self, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Rows of these texts, the file that holds them, and their places in it, for some texts at a time."""
        order = np.argsort(self.hashes, kind="stable")
        ends = np.cumsum([len(array) for array in self.arrays])
        for start in range(0, len(hashes), COPIED):
            places = order[np.searchsorted(self.hashes, hashes[start : start + COPIED], sorter=order)]
            files = np.searchsorted(ends, places, side="right")
            for file in np.unique(files):
                mine = np.flatnonzero(files == file)
                yield start + mine, file, places[mine] - (ends[file] - len(self.arrays[file]))


def store_passages(rows: Iterable[tuple[str, str, str, str]], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write (id, title, text, metadata) rows as Parquet; returns the hashes (n,) of ids and of retriever inputs."""
    keys, contents, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], iter(rows)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while group := list(islice(rows, ROWS)):
            ids, titles, texts, others = (list(column) for column in zip(*group, strict=True))
            cells = ids, titles, texts, [other or None for other in others]
            writer.write_table(pa.table([pa.array(column, pa.string()) for column in cells], SCHEMA))
            keys.append(np.array([text_hash(key) for key in ids], dtype=np.uint64))
            contents.append(_hashes(titles, texts))
    return np.concatenate(keys), np.concatenate(contents)


def _stored_hashes(path: Path) -> np.ndarray:
    """The hashes (n,) of the retriever's inputs, for every passage of a Parquet file."""
    batches = pq.ParquetFile(path).iter_batches(columns=["title", "text"])
    hashes = [_hashes(*(column.to_pylist() for column in batch.columns)) for batch in batches]
    return np.concatenate([np.zeros(0, np.uint64), *hashes])


def content_hashes(passages: Passages) -> np.ndarray:
    """The hashes (n,) of the retriever's inputs, some thousand passages in memory at a time."""
    starts = range(0, len(passages.ids), ROWS)
    parts = [slice(start, start + ROWS) for start in starts]
    found = [_hashes(passages.titles[part], passages.texts[part]) for part in parts]
    return np.concatenate([np.zeros(0, np.uint64), *found])


def _hashes(titles: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    # the length of the title counts, because a title has no sentences of its own
    read = (f"{len(title)}|{passage_text(title, text)}" for title, text in zip(titles, texts, strict=True))
    return np.array([text_hash(text) for text in read], dtype=np.uint64)


def known_vectors(folder: Path, shards: Path, fingerprint: str, *, sentences: bool, precision: str) -> Known:
    """The vectors of this retriever, in this precision, in an older index (`folder`) and the shards of a stopped run.

    `sentences`: whether sentence vectors are wanted too; files without them are then left out.
    """
    found = []
    same = made_by(folder) == fingerprint and precision_of(folder) == precision
    if same and (not sentences or keeps_sentences(folder)):
        check_index_contents(folder, remedy=DELETE)
        path = folder / "vectors.safetensors"
        kept, vectors = _stored_hashes(folder / "passages.parquet"), open_vectors(path)
        if len(kept) != len(vectors):
            raise InputError(
                f"Expected one vector for each of the {len(kept)} passages in {folder}, found {len(vectors)}: its "
                f"files belong to different indexes. {DELETE}"
            )
        found.append((kept, path))
    for path in sorted(shards.glob("*.safetensors")):
        if (made := _intact(path)) and _facts_of(fingerprint, precision, sentences).items() <= made.items():
            found.append((np.array(open_vectors(path, "hashes")), path))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(each for each, _ in found)])
    tensors = ([open_vectors(path, name) for name in (SENTENCE_VECTORS, SENTENCE_ENDS)] for _, path in found)
    own = tuple(SentenceVectors(*each) for each in tensors) if sentences else ()
    return Known(hashes, tuple(open_vectors(path) for _, path in found), own)


def _intact(path: Path) -> dict[str, str]:
    """The metadata of a shard; empty if it is not what was written, as after a power cut: it is then made again."""
    try:
        with safe_open(path, framework="numpy") as file:
            made = file.metadata() or {}
        return made if made.get(HASH) == _tensors_hash(path) else {}
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        if is_environment(error):
            raise
        return {}


def _tensors_hash(path: Path) -> str:
    """The hash of all tensors of a file, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(read_header(path)):
        digest.update(np.ascontiguousarray(open_vectors(path, name)).data)
    return digest.hexdigest()


def _facts_of(fingerprint: str, precision: str, sentences: bool) -> dict[str, str]:
    """The metadata of a shard: how it was made."""
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
    """Encode passages in shards of `size`; this process takes every share[1]-th shard, from share[0] on.

    Args:
        passages: Parquet file of `store_passages`. rows: which of them, ascending. hashes: (n,) of all of them.
        encode: passages to their vectors (n, dim) float32 and, if wanted, their sentence vectors.
        done: called with the number of passages of each shard that was written.
    """
    file = pq.ParquetFile(passages, memory_map=True)
    for start in range(share[0] * size, len(rows), share[1] * size):
        mine = rows[start : start + size]
        vectors, sentences = encode(read_passages(file, mine))
        tensors = {COLUMN: vectors, "hashes": hashes[mine]}
        if sentences is not None:
            tensors |= {SENTENCE_VECTORS: sentences.vectors, SENTENCE_ENDS: sentences.ends}
        name = hashlib.sha256(fingerprint.encode() + hashes[mine].tobytes()).hexdigest()[:20]
        digest = xxhash.xxh3_128()
        for each in sorted(tensors):
            digest.update(np.ascontiguousarray(tensors[each]).data)
        facts = _facts_of(fingerprint, precision, sentences is not None) | {HASH: digest.hexdigest()}
        path, needed = shards / f"{name}.safetensors", sum(tensor.nbytes for tensor in tensors.values())
        with replacing_file(path, needed=needed, flushed=False) as beside:  # `_intact` finds what a power cut did
            save_tensors(tensors, beside, metadata=facts)
        done(len(mine))


def read_passages(file: pq.ParquetFile, rows: np.ndarray) -> Passages:
    """Some passages of a file of `store_passages`; rows ascending."""
    chosen = []
    for group in np.unique(rows // ROWS):
        table = file.read_row_group(int(group), columns=SCHEMA.names)
        chosen.append(table.take(rows[rows // ROWS == group] - group * ROWS))
    table = pa.concat_tables(chosen)
    return Passages(*(table[name].to_pylist() for name in SCHEMA.names))


def write_vectors(path: Path, hashes: np.ndarray, known: Known) -> np.ndarray:
    """Write vectors.safetensors (see `open_vectors`) from known vectors, without holding all in memory.

    Returns the vectors of the passages, memory-mapped.
    """
    dimensions = known.arrays[0].shape[1]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {COLUMN: ("F32", (len(hashes), dimensions))}
    ends = known.sentence_ends(hashes) if known.sentences else None
    if ends is not None:
        count = int(ends[-1]) if len(ends) else 0
        wanted |= {SENTENCE_ENDS: ("I64", ends.shape), SENTENCE_VECTORS: ("F16", (count, dimensions))}
    out = _create_tensors(path, wanted)
    known.copy_to(out[COLUMN], hashes)
    if ends is not None:
        out[SENTENCE_ENDS][:] = ends
        known.copy_sentences_to(out[SENTENCE_VECTORS], ends, hashes)
    for tensor in out.values():
        if isinstance(tensor, np.memmap):  # an empty one is a plain array
            tensor.flush()
    return out[COLUMN]


def _create_tensors(path: Path, wanted: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Create a safetensors file of zeros; `wanted`: dtype and shape by name. Returns the tensors mapped, writable.

    This writes the format (github.com/huggingface/safetensors) by hand: the library needs whole tensors in memory.
    """
    head, offset = {}, 0
    for name, (dtype, shape) in wanted.items():
        end = offset + int(np.prod(shape)) * np.dtype(TYPES[dtype]).itemsize
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head).encode("ascii")
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        reserve(file, 8 + len(text) + offset)
    return {name: open_vectors(path, name, mode="r+") for name in wanted}
