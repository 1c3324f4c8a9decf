"""Search in an index that LanceDB holds: what `PassageIndex` does, without vectors or texts in memory.

The database proposes passages by vector and by word; their own vectors and texts, which come with them, give the
scores. So results are those of a local index, up to what the database does not propose. Left out: reading the tables
(lance_database.py), writing them (lance_writing.py).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cozyrag.data.sentences import RULES, SentenceVectors
from cozyrag.errors import InputError
from cozyrag.retrieval.faiss_index import SPARE, best, stacked
from cozyrag.retrieval.index_file import write_database
from cozyrag.retrieval.lance_database import AGAIN, LanceDatabase
from cozyrag.retrieval.passage_index import Column, Passages
from cozyrag.retrieval.words_of_texts import WordsOfTexts

if TYPE_CHECKING:
    import pyarrow as pa

KEPT_ROWS = 8192  # passages that stay in memory, with their sentence vectors some 6 KB each
PAGE = 4096  # passages read at once when all are read
COUNTED = 1 << 16  # words whose numbers of passages stay in memory


class Row(NamedTuple):
    """A passage of the database. `sentences`: (n_sentences, dim) float16, without any if none are kept."""

    key: str
    title: str
    text: str
    metadata: str
    vector: np.ndarray
    sentences: np.ndarray


def vectors_in(table: "pa.Table", dimensions: int) -> np.ndarray:
    """The vectors (n, dimensions) float32 of passages."""
    chunks = [chunk.flatten().to_numpy() for chunk in table["vector"].chunks]
    return np.concatenate([np.zeros(0, np.float32), *chunks]).reshape(-1, dimensions)


class LanceRows:
    """The passages of a database by row, the last of which stay in memory. Threads can share it."""

    def __init__(self, database: LanceDatabase, count: int, dimensions: int):
        self.database, self.count, self.dimensions = database, count, dimensions
        self._kept: OrderedDict[int, Row] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, rows: Iterable[int]) -> list[Row]:
        """These passages; what is not in memory is read at once."""
        rows = [int(row) for row in rows]
        with self._lock:
            found = {row: self._kept[row] for row in rows if row in self._kept}
        if missing := sorted({*rows} - {*found}):
            found |= self._keep(self.database.rows(missing))
        if lost := [row for row in missing if row not in found]:
            raise InputError(f"Expected passage {lost[0]} in LanceDB at {self.database.uri}, found none. {AGAIN}")
        return [found[row] for row in rows]

    def proposed(self, table: "pa.Table") -> np.ndarray:
        """The rows (n,) of passages that a search found; they are kept in memory."""
        return np.fromiter(self._keep(table), np.int64)

    def _keep(self, table: "pa.Table") -> dict[int, Row]:
        """Passages by row, in the order of the table."""
        vectors = vectors_in(table, self.dimensions)
        columns = (table[name].to_pylist() for name in ("row", "key", "title", "text", "metadata", "sentences"))
        new = {
            row: Row(key, title, text, metadata or "", vector.copy(), self._sentences(held))
            for (row, key, title, text, metadata, held), vector in zip(zip(*columns, strict=True), vectors, strict=True)
        }
        with self._lock:
            self._kept |= new
            for row in new:
                self._kept.move_to_end(row)
            while len(self._kept) > KEPT_ROWS:
                self._kept.popitem(last=False)
        return new

    def _sentences(self, held: bytes | None) -> np.ndarray:
        return np.frombuffer(held or b"", np.float16).reshape(-1, self.dimensions)


class RowColumn(Column):
    """A column of the passages in a database; `name`: as in Row."""

    def __init__(self, rows: LanceRows, name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return self._rows.count

    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [getattr(row, self._name) for row in self._rows.of(range(*at.indices(len(self))))]
        return getattr(self._rows.of([range(len(self))[at]])[0], self._name)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), PAGE):
            yield from self._rows.database.column(self._name, start, min(start + PAGE, len(self)))


class RowVectors:
    """The vectors of the passages in a database, which rows or a slice choose, as of an array."""

    def __init__(self, rows: LanceRows):
        self._rows, self.shape = rows, (rows.count, rows.dimensions)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: np.ndarray | slice) -> np.ndarray:
        rows = range(*at.indices(len(self))) if isinstance(at, slice) else at
        return np.array([row.vector for row in self._rows.of(rows)], np.float32).reshape(-1, self.shape[1])


class RowSentences:
    """The sentence vectors of the passages in a database, as `SentenceVectors`."""

    def __init__(self, rows: LanceRows):
        self._rows = rows

    def of(self, rows: Iterable[int]) -> list[np.ndarray]:
        """For each of these passages the vectors of its sentences."""
        return [row.sentences for row in self._rows.of(rows)]

    def nearest(self, rows: np.ndarray, vector: np.ndarray, without: np.ndarray) -> np.ndarray:
        """As `SentenceVectors.nearest`."""
        parts = self.of(rows)
        if not parts:
            return without
        own = SentenceVectors(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))
        return own.nearest(np.arange(len(parts)), vector, without)


class LanceWords(WordsOfTexts):
    """`WordsOfTexts` by the inverted file of LanceDB."""

    def __init__(self, rows: LanceRows, mean_length: float, *, stemmer: str):
        super().__init__(rows.count, mean_length, stemmer=stemmer)
        self._rows = rows
        self._counts: dict[str, int] = {}

    def split(self, questions: Sequence[str]) -> list[list[str]]:
        """The words of each question; how many passages have each is read for all of them at once."""
        words = super().split(questions)
        self._learn({word for own in words for word in own})
        return words

    def _learn(self, words: set[str]) -> None:
        if len(self._counts) > COUNTED:
            self._counts = {}
        if new := sorted(words - self._counts.keys()):
            found = self._rows.database.holders(new)
            self._counts |= {word: found.get(word, 0) for word in new}

    def _holders(self, word: str) -> int:
        if word not in self._counts:
            self._learn({word})
        return self._counts[word]

    def _proposed(self, words: list[str], limit: int) -> np.ndarray:
        return self._rows.proposed(self._rows.database.matching(words, limit))

    def _text(self, row: int) -> tuple[str, str]:
        [held] = self._rows.of([row])
        return held.title, held.text


class LanceIndex:
    """An index in LanceDB, with the interface of `PassageIndex`.

    Args:
        database, facts: opened, and what `LanceDatabase.open` returned.
    """

    def __init__(self, database: LanceDatabase, facts: dict):
        self.database, self._facts = database, facts
        self.fingerprint, self.precision = facts["retriever_fingerprint"], facts["precision"]
        self._rows = LanceRows(database, facts["passages"], facts["dimensions"])
        keys, titles, texts, metadata = (RowColumn(self._rows, name) for name in ("key", "title", "text", "metadata"))
        self.passages = Passages(keys, titles, texts, metadata)
        self.vectors = RowVectors(self._rows)
        self.sentences = RowSentences(self._rows) if facts["sentence_rules"] == RULES else None

    @classmethod
    def open(cls, uri: str, *, fingerprint: str, expected: Passages | None = None) -> "LanceIndex":
        """The newest finished index of a database.

        Raises:
            InputError: there is none, another retriever than `fingerprint`'s made it, or the passages are not the
                `expected` ones.
        """
        database = LanceDatabase(uri)
        facts = database.open()
        if not facts:
            raise InputError(
                f"Expected an index in LanceDB at {uri}, found none that is finished. Make it with `cozyrag index "
                "PASSAGES --output lancedb:...`, or give that command again."
            )
        if (found := facts["retriever_fingerprint"]) != fingerprint:
            raise InputError(
                f"The index in LanceDB at {uri} was made by retriever {found}, but the retriever in use is "
                f"{fingerprint}: their vectors do not compare. Use the retriever that made it, or index the passages "
                "with this one into another database."
            )
        made = cls(database, facts)
        if expected is not None and made.passages != expected:
            raise InputError(
                f"Expected the index in LanceDB at {uri} to hold the {len(expected.ids)} passages that are searched, "
                f"found {len(made)} passages that differ from them. Run `cozyrag index` again with that passage file: "
                "only what has changed is encoded."
            )
        return made

    nbytes = 0  # in memory

    def __len__(self) -> int:
        return self._rows.count

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `PassageIndex.search`."""
        k = min(k, len(self))
        return stacked([self._search(query, k) for query in np.asarray(queries, np.float32)], k)

    def _search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (k,) and rows (k,) for one question."""
        limit, lists = min(len(self), k + SPARE), self._facts["read_lists"]
        rows = self._rows.proposed(self.database.nearest(query, limit, lists))
        if len(rows) < k:  # the lists that were read hold fewer
            rows = self._rows.proposed(self.database.nearest(query, limit, None))
        return best(self.vectors[rows] @ query, rows, k)

    def words(self, *, stemmer: str) -> LanceWords:
        """Search by words. Raises InputError if the words in the database have another stemmer."""
        if stemmer != self._facts["stemmer"]:
            raise InputError(
                f"The words in LanceDB at {self.database.uri} were stemmed with --stemmer {self._facts['stemmer']}, "
                f"but this search has {stemmer}. Use that stemmer, or index the passages into another database."
            )
        return LanceWords(self._rows, self._facts["mean_length"], stemmer=stemmer)

    def save(self, folder: str | Path) -> None:
        """Write index.json, which names the database."""
        write_database(Path(folder), self.database.uri, self._facts)
