"""Write an index into LanceDB: passages with their vectors by several processes, then the counts of their words.

A row of the table is a passage, known by its place in the file of passages and the hash of its content. So a stopped
run finds what is there, and after a change of the passages the vectors of those that have moved are copied. The table
of words is replaced last: until then the index is searched as it was. Left out: encoding them
(commands/database_encoding.py).
"""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from cozyrag.errors import InputError
from cozyrag.retrieval.bm25 import stemmed_words
from cozyrag.retrieval.faiss_index import MANY, TARGET, imitated
from cozyrag.retrieval.lance_database import FACTS, HOW, PASSAGES, VERSION, WORDS, LanceDatabase, load_lancedb
from cozyrag.retrieval.lance_index import vectors_in
from cozyrag.retrieval.passage_index import Passages
from cozyrag.retrieval.words_of_texts import words_of

# Without this mark, two writers that add the same row at once would both keep theirs.
KEY = pa.field("row", pa.int64(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
ASKED = 32  # imitated questions by which the number of lists is chosen that a search reads
NAMES = {"retriever_fingerprint": "retriever", "sentence_rules": "sentence vectors"}  # of facts in a message


@dataclass(frozen=True)
class Written:
    """What a database holds in one state, which `table` reads.

    `rows` (n,) int64; `hashes` (n,) uint64 of their contents, `names` (n,) uint64 of what has no part in the vectors.
    """

    rows: np.ndarray
    hashes: np.ndarray
    names: np.ndarray
    table: Any = None

    def missing(self, hashes: np.ndarray, names: np.ndarray) -> np.ndarray:
        """The rows of passages, given by their hashes, that are not there or are others there."""
        held = np.zeros(len(hashes), bool)
        inside = self.rows < len(hashes)
        rows = self.rows[inside]
        held[rows] = (hashes[rows] == self.hashes[inside]) & (names[rows] == self.names[inside])
        return np.flatnonzero(~held)

    def holding(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64, a row that holds each of these contents, which must all be there."""
        order = np.argsort(self.hashes, kind="stable")
        return self.rows[order[np.searchsorted(self.hashes, hashes, sorter=order)]]


class LanceWriter:
    """Writes an index; each process of a command has one.

    Args:
        how: the facts HOW but the version.
    """

    def __init__(self, uri: str, **how: Any):
        self.database, self.how = LanceDatabase(uri), {"version": VERSION} | how
        self._words = stemmed_words(how["stemmer"])

    def check(self) -> None:
        """Raise InputError if the database holds passages that were encoded in another way."""
        found = self.database.how()
        for name in HOW if found else ():
            if found[name] != self.how[name]:
                raise InputError(
                    f"--output: the index in LanceDB at {self.database.uri} has {NAMES.get(name, name)} {found[name]}, "
                    f"this command {self.how[name]}; pairs that search it would stop. Name another database, or delete "
                    "that one."
                )

    def create(self) -> None:
        """Make the table of passages if it is not there."""
        with self.database.asked():
            self.database.connection().create_table(PASSAGES, schema=self._schema(), exist_ok=True)

    def written(self) -> Written:
        """What is there now."""
        with self.database.asked():
            return self._state(self._newest())

    def finished(self) -> Written:
        """What is in the newest finished index; nothing if there is none."""
        nothing = np.zeros(0, np.uint64)
        version = self.database.open().get("table_version")
        if version is None:
            return Written(np.zeros(0, np.int64), nothing, nothing)
        with self.database.asked():
            table = self._newest()
            table.checkout(version)
            return self._state(table)

    def _state(self, table: Any) -> Written:
        table.checkout(table.version)  # later changes do not show
        batches = table.search().select(["row", "hash", "named"]).to_batches()
        held = pa.Table.from_batches(batches, schema=batches.schema)
        rows, hashes, names = (held[name].to_numpy() for name in ("row", "hash", "named"))
        return Written(rows, hashes, names, table)

    def write(
        self,
        rows: np.ndarray,
        passages: Passages,
        hashes: np.ndarray,
        names: np.ndarray,
        vectors: np.ndarray,
        sentences: list[np.ndarray] | None,
    ) -> None:
        """Write some passages, or write them again, at once. `rows`, `hashes`, `names`: (n,) of them, as in Written."""
        words = [" ".join(words_of(self._words, *each)) for each in zip(passages.titles, passages.texts, strict=True)]
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
        own = [each.astype(np.float16).tobytes() for each in sentences] if sentences is not None else [None] * len(rows)
        columns = [
            pa.array(rows, pa.int64()),
            *(pa.array(each, pa.uint64()) for each in (hashes, names)),
            *(pa.array(list(each), pa.string()) for each in (passages.ids, passages.titles, passages.texts)),
            pa.array(passages.metadata, pa.string()) if passages.metadata else pa.nulls(len(rows), pa.string()),
            pa.array(words, pa.string()),
            pa.FixedSizeListArray.from_arrays(flat, self.how["dimensions"]),
            pa.array(own, pa.binary()),
        ]
        with self.database.asked():
            merged = self._newest().merge_insert("row").when_matched_update_all().when_not_matched_insert_all()
            merged.execute(pa.table(columns, schema=self._schema()))

    def copied(self, source: Written, hashes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """Vectors (n, dim) and sentence vectors of passages with these contents, which must be in that state."""
        sources = source.holding(hashes)
        asked = np.unique(sources)
        with self.database.asked():
            chosen = source.table.search().where(f"row IN ({', '.join(map(str, asked.tolist()))})")
            found = chosen.select(["row", "vector", "sentences"]).limit(len(asked)).to_arrow().sort_by("row")
        at = np.searchsorted(found["row"].to_numpy(), sources)
        vectors = vectors_in(found, self.how["dimensions"])
        if self.how["sentence_rules"] is None:
            return vectors[at], None
        held = found["sentences"].to_pylist()
        return vectors[at], [np.frombuffer(held[place], np.float16).reshape(-1, vectors.shape[1]) for place in at]

    def finish(self, count: int, progress: Callable[[int], object]) -> dict:
        """Remove rows beyond `count`, index the tables and replace the table of words; returns its facts.

        A word takes some 100 bytes of memory meanwhile. `progress`: called with numbers of passages that were read.
        """
        earlier = self.database.open()
        with self.database.asked():
            table = self._newest()
            if earlier.get("table_version") == table.version and earlier["passages"] == count:
                return earlier
            index = load_lancedb().index
            table.delete(f"row >= {count}")
            if (found := table.count_rows()) != count:
                raise InputError(
                    f"Expected {count} passages in LanceDB at {self.database.uri}, found {found}: another command "
                    "writes into it. Let it end, then give this one again: what was written is kept."
                )
            table.create_index("row", config=index.BTree(), replace=True)
            table.create_index("words", config=_own_words(index), replace=True)
            read_lists = _listed(table, count)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about others, who may be searching: for them it stays a week
                table.optimize(cleanup_older_than=None if earlier else timedelta(0))
            holders, total = _counted(table, progress)
            facts = self.how | {
                "passages": count,
                "mean_length": max(1.0, total / count),
                "table_version": table.version,
                "read_lists": read_lists,
            }
            columns = pa.table({"word": [*holders], "passages": pa.array(holders.values(), pa.int64())})
            named = columns.replace_schema_metadata({FACTS: json.dumps(facts)})
            counts = self.database.connection().create_table(WORDS, data=named, mode="overwrite")
            counts.create_index("word", config=index.BTree())
        return facts

    def _newest(self) -> Any:
        table = self.database.table(PASSAGES)
        if table is None:
            raise InputError(
                f"The index in LanceDB at {self.database.uri} is gone while it was written. Check that it can be "
                "reached, then give the command again."
            )
        return table

    def _schema(self) -> pa.Schema:
        texts = [(name, pa.string()) for name in ("key", "title", "text", "metadata", "words")]
        vector = pa.list_(pa.float32(), self.how["dimensions"])
        hashes = [("hash", pa.uint64()), ("named", pa.uint64())]
        fields = [KEY, *hashes, *texts, ("vector", vector), ("sentences", pa.binary())]
        return pa.schema(fields, metadata={FACTS: json.dumps(self.how)})


def _own_words(index: Any) -> Any:
    """An inverted file of words that are split and stemmed already."""
    plain = dict.fromkeys(("with_position", "lower_case", "stem", "remove_stop_words", "ascii_folding"), False)
    return index.FTS(base_tokenizer="whitespace", max_token_length=None, **plain)


def _counted(table: Any, progress: Callable[[int], object]) -> tuple[Counter[str], int]:
    """The number of passages with each word, and the number of all words."""
    holders, total = Counter[str](), 0
    for batch in table.search().select(["words"]).to_batches():
        for words in batch.column(0).to_pylist():
            found = words.split()
            total += len(found)
            holders.update(set(found))
        progress(len(batch))
    return holders, total


def _listed(table: Any, count: int) -> int | None:
    """Put many vectors into lists; returns the fewest lists to read for `TARGET` of the 10 nearest, None without."""
    if count < MANY:
        return None
    lists = 2 ** round(np.log2(count) / 2)
    kind = load_lancedb().index.IvfFlat(distance_type="dot", num_partitions=lists)
    table.create_index("vector", config=kind, replace=True)

    def found(query: np.ndarray, read: int | None) -> set[int]:
        asked = table.search(query, vector_column_name="vector").distance_type("dot")
        asked = asked.bypass_vector_index() if read is None else asked.nprobes(read)
        return {*asked.select(["row", "_distance"]).limit(10).to_arrow()["row"].to_pylist()}

    queries = _questions(table, count)
    exact = [found(query, None) for query in queries]
    for read in (2**power for power in range(2, int(np.log2(lists)))):
        shares = [len(own & found(query, read)) / len(own) for query, own in zip(queries, exact, strict=True)]
        if np.mean(shares) >= TARGET:
            return read
    return lists


def _questions(table: Any, count: int) -> np.ndarray:
    """Imitated questions (n, dim), of evenly spread passages."""
    rows = np.unique(np.linspace(0, count - 1, min(count, 3 * ASKED)).astype(np.int64))
    chosen = table.search().where(f"row IN ({', '.join(map(str, rows.tolist()))})").select(["row", "vector"])
    found = chosen.limit(len(rows)).to_arrow().sort_by("row")
    return imitated(vectors_in(found, found.schema.field("vector").type.list_size), ASKED)
