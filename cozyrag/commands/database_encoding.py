"""The work of `cozyrag index --output lancedb:...`: passages, their vectors and words go into a database.

Each process writes a share of the passages that are not there, so a command that was stopped is given again. Left out:
the options (index.py), reading and encoding passages (passage_encoding.py), the tables (lance_writing.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from cozyrag.data.deduplication import repeats, text_hash
from cozyrag.data.metadata import METADATA
from cozyrag.data.sentences import SentenceVectors
from cozyrag.retrieval.lance_database import PREFIX
from cozyrag.retrieval.lance_writing import LanceWriter, Written
from cozyrag.retrieval.passage_index import Passages
from cozyrag.retrieval.vector_shards import read_passages
from cozyrag.runtime.distributed import main_decides, run_on_all
from cozyrag.runtime.terminal import one_line, say

Encode = Callable[[Passages], tuple[np.ndarray, SentenceVectors | None]]


class DatabaseFilling:
    """Fills a database with the passages of a file.

    Args:
        stage: writes the passages into a Parquet file and returns the hashes (n,) of their contents.
        encode: passages to their vectors and, if wanted, their sentence vectors. reading: the context to encode in.
        size: passages that are encoded and written at once.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        writer: LanceWriter,
        *,
        stage: Callable[[Path], np.ndarray],
        encode: Encode,
        reading: Callable[[], AbstractContextManager],
        size: int,
    ):
        self.accelerator, self.writer, self.encode, self.reading = accelerator, writer, encode, reading
        self.stage, self.size = stage, size

    def run(self, prompts: str) -> int:
        """Fill the database; returns the number of passages that were encoded. `prompts`: a sentence to print.

        Raises InputError; what was written is kept for the next command.
        """
        main_decides(self.accelerator, self._begin)
        with TemporaryDirectory(ignore_cleanup_errors=True) as own:
            folder = self._staged(Path(own))
            self.file = pq.ParquetFile(folder / "passages.parquet", memory_map=True)
            self.hashes, self.names = np.load(folder / "hashes.npy"), np.load(folder / "names.npy")
            new = self._new()
            if self.accelerator.is_main_process:
                say(f"{len(self.hashes):,} passages, {len(new):,} to encode. {one_line(prompts)}".rstrip())
            run_on_all(self.accelerator, lambda: self._copy(self.writer.finished()))
            run_on_all(self.accelerator, lambda: self._encode(new))
            run_on_all(self.accelerator, lambda: self._copy(self.writer.written()))  # passages that repeat
            main_decides(self.accelerator, self._finish)
        return len(new)

    def _begin(self) -> None:
        self.writer.check()
        self.writer.create()

    def _staged(self, own: Path) -> Path:
        """The folder of the staged passages; the first process of each machine makes one for the others."""
        first = self.accelerator.is_local_main_process

        def make() -> None:
            if first:
                np.save(own / "hashes.npy", self.stage(own / "passages.parquet"))
                np.save(own / "names.npy", _names(own / "passages.parquet"))

        run_on_all(self.accelerator, make)
        folders = gather_object([str(own) if first else ""])
        return Path([each for each in folders[: self.accelerator.process_index + 1] if each][-1])

    def _new(self) -> np.ndarray:
        """The rows of passages whose content is nowhere, the first of equal ones."""
        found: list[np.ndarray] = []

        def look() -> None:
            missing = self.writer.written().missing(self.hashes, self.names)
            held = np.concatenate([self.writer.finished().hashes, self.writer.written().hashes])
            found.append(missing[~np.isin(self.hashes[missing], held) & ~repeats(self.hashes[missing])])

        run_on_all(self.accelerator, look)
        return found[0]

    def _blocks(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of this process, in blocks."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        starts = range(rank * self.size, len(rows), world * self.size)
        return [rows[start : start + self.size] for start in starts]

    def _encode(self, new: np.ndarray) -> None:
        blocks, main = self._blocks(new), self.accelerator.is_main_process
        total = sum(map(len, blocks))
        with self.reading(), tqdm(total=total, desc="encoding", unit="passage", disable=not main or not total) as bar:
            for rows in blocks:
                passages = read_passages(self.file, rows)
                vectors, sentences = self.encode(passages)
                own = sentences.of(range(len(rows))) if sentences is not None else None
                self.writer.write(rows, passages, self.hashes[rows], self.names[rows], vectors, own)
                bar.update(len(rows))

    def _copy(self, source: Written) -> None:
        """Write what is missing and whose content is in that state, with the vectors from there."""
        missing = self.writer.written().missing(self.hashes, self.names)
        known = missing[np.isin(self.hashes[missing], source.hashes)]
        for rows in self._blocks(known):
            vectors, sentences = self.writer.copied(source, self.hashes[rows])
            passages = read_passages(self.file, rows)
            self.writer.write(rows, passages, self.hashes[rows], self.names[rows], vectors, sentences)

    def _finish(self) -> None:
        count = len(self.hashes)
        with tqdm(total=count, desc="counting words", unit="passage") as bar:
            facts = self.writer.finish(count, bar.update)
        lists = facts["read_lists"]
        how = "searched exactly" if lists is None else f"of whose lists of vectors a search reads {lists}"
        say(one_line(f"{PREFIX}{self.writer.database.uri}: {count:,} passages, {how}."))


def _names(path: Path) -> np.ndarray:
    """(n,) uint64, hashes of what belongs to a passage but not to its vector: its id and its other columns."""
    hashes = []
    for batch in pq.ParquetFile(path).iter_batches(columns=["id", METADATA]):
        pairs = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        hashes.append(np.array([text_hash(f"{len(key)}|{key}{others or ''}") for key, others in pairs], np.uint64))
    return np.concatenate([np.zeros(0, np.uint64), *hashes])
