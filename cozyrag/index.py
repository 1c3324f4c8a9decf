"""Passages and their vectors, made searchable: build, search, save and load.

This is the one place that owns the Dataset with the attached FAISS index: `map`, `filter` and `save_to_disk` drop or
refuse such a Dataset, so nothing else may touch it. Left out: where vectors come from (retriever.py) and what is done
with the passages found (contexts.py).
"""

import json
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
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cozyrag.errors import InputError
from cozyrag.sentences import SentenceVectors, sentence_spans

COLUMN = "vectors"
SPARE = 16
_COPY_AGAIN = "Copy the whole folder again, or run train.py again."
FILES = ("passages.parquet", "vectors.safetensors", "index.faiss", "index.json")


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

    def spans(self, rows: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Where the sentences of these passages stand in what the retriever reads, in characters."""
        shifts = [len(read) - len(self.texts[row]) for read, row in zip(self.select(rows), rows, strict=True)]
        return [
            [(start + shift, end + shift) for start, end in sentence_spans(self.texts[row])]
            for row, shift in zip(rows, shifts, strict=True)
        ]


class PassageIndex:
    """Exact inner-product search over L2-normalised vectors.

    Args:
        table: passages, columns id, title, text.
        vectors: (n_passages, dim) float32, row i = passage i.
        fingerprint: that of the retriever that made the vectors.
        sentences: vectors of the passages' sentences, for the context filter; None where they are made on the fly.
    """

    def __init__(
        self, table: Dataset, vectors: np.ndarray, *, fingerprint: str, sentences: SentenceVectors | None = None
    ):
        if len(table) != len(vectors):  # datasets would attach a wrong number of vectors without a word
            raise ValueError(f"expected one vector for each of {len(table)} passages, found {len(vectors)}")
        self.passages = Passages.of(table)
        self.vectors = vectors
        self.sentences = sentences
        self.fingerprint = fingerprint
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))
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
        scores, rows = self._table.search_batch(
            COLUMN, np.ascontiguousarray(queries, dtype=np.float32), min(k + SPARE, len(self))
        )
        order = np.lexsort((rows, -scores), axis=-1)[:, :k]
        return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1)

    def save(self, folder: str | Path) -> None:
        """Write passages, vectors, FAISS file and index.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict({"id": self.passages.ids, "title": self.passages.titles, "text": self.passages.texts})
        table.to_parquet(str(folder / "passages.parquet"))
        tensors = {COLUMN: np.ascontiguousarray(self.vectors)}
        if self.sentences is not None:
            tensors |= {"sentence_vectors": self.sentences.vectors, "sentence_ends": self.sentences.ends}
        save_file(tensors, folder / "vectors.safetensors")
        faiss.write_index(self._index, str(folder / "index.faiss"))
        facts = {
            "retriever_fingerprint": self.fingerprint,
            "passages": len(self),
            "dimensions": self.vectors.shape[1],
            "metric": "inner product",
            "factory": "Flat",
            "bytes": {name: (folder / name).stat().st_size for name in FILES[:-1]},
        }
        (folder / "index.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, fingerprint: str) -> "PassageIndex":
        """Read what `save` wrote; the flat FAISS index is rebuilt from the vectors, which takes milliseconds.

        Raises:
            InputError: a file is missing, the vectors were made by another retriever than `fingerprint`'s, or they are not
                as many as the passages.
        """
        folder = Path(folder)
        missing = [name for name in FILES if not (folder / name).exists()]
        if missing:
            raise InputError(
                f"Expected an index in {folder}, {missing[0]} is missing. Run train.py again, or copy the whole folder."
            )
        facts = _facts(folder)
        if facts is None:
            raise InputError(f"{folder / 'index.json'} is damaged. {_COPY_AGAIN}")
        for name, size in facts.get("bytes", {}).items():
            if (folder / name).stat().st_size != size:
                raise InputError(
                    f"Expected {size} bytes in {folder / name}, found {(folder / name).stat().st_size}: the file was cut short or replaced. {_COPY_AGAIN}"
                )
        found = facts["retriever_fingerprint"]
        if found != fingerprint:
            raise InputError(
                f"The index in {folder} was made by retriever {found}, but the retriever in use is {fingerprint}: their vectors do not "
                "compare. Use the retriever that was saved with the index, or index the passages again."
            )
        try:
            with _no_bars():
                table = Dataset.from_parquet(str(folder / "passages.parquet"), keep_in_memory=True)
            tensors = load_file(folder / "vectors.safetensors")
        except (SafetensorError, datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(
                f"The index in {folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]}). {_COPY_AGAIN}"
            ) from error
        if len(table) != len(tensors[COLUMN]):
            raise InputError(
                f"Expected one vector for each of the {len(table)} passages in {folder}, found {len(tensors[COLUMN])}: the files are not of "
                "one index, and passages would be found under the vectors of others. Copy the whole folder again, or run train.py again."
            )
        kept = "sentence_vectors" in tensors
        sentences = SentenceVectors(tensors["sentence_vectors"], tensors["sentence_ends"]) if kept else None
        return cls(table, tensors[COLUMN], fingerprint=found, sentences=sentences)
