"""A database of LanceDB with an index: its address, its tables, and what is read from them.

All calls of LanceDB to read are here, those to write in lance_writing.py. The table of passages is read in the version
that the table of words names, so an index that is being changed is searched as it was. Credentials come from the
environment alone. Left out: search (lance_index.py).
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cozyrag.errors import InputError
from cozyrag.runtime.json_fields import Kind, check_fields, number, or_null, text, whole

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PREFIX = "lancedb:"
SCHEMES = ("s3", "gs", "az")
PASSAGES, WORDS = "passages", "words"  # the tables
VERSION = 1  # increase with every change of the tables
FACTS = b"cozyrag"  # the entry of a table's metadata
CONTENT = ["row", "key", "title", "text", "metadata", "vector", "sentences"]  # what a search reads of a passage
HOW: dict[str, Kind | Mapping] = {  # facts of the table of passages, known before the first row
    "version": whole(1, 2**31),
    "retriever_fingerprint": text(),
    "precision": text(),
    "sentence_rules": or_null(whole(0, 2**31)),
    "stemmer": text(),
    "dimensions": whole(1, 2**20),
}
FIELDS = HOW | {  # facts of the table of words, written last
    "passages": whole(1, 2**40),
    "mean_length": number(1, 1e9),
    "table_version": whole(1, 2**62),
    "read_lists": or_null(whole(1, 2**31)),
}
AGAIN = "Give the command of `cozyrag index` that made it again."
_OF_RUST = re.compile(r",? ?\S*/\.?cargo/\S*")  # where in LanceDB's source an error arose


def database_of(place: str) -> str | None:
    """The database that a place such as lancedb:/data/wiki names, a folder as its absolute path; None for no database.

    Raises InputError for an address that cannot be used, or that holds a password, and without LanceDB.
    """
    if not place.startswith(PREFIX):
        return None
    uri = place.removeprefix(PREFIX)
    check_address(uri, PREFIX)
    check_lancedb(f"{PREFIX}{uri}")
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri


def is_local(uri: str) -> bool:
    """Whether a database, as `database_of` gives it, is a folder of this machine."""
    return "://" not in uri


def check_address(uri: str, where: str) -> None:
    """Raise InputError for an address that LanceDB cannot use here, or that holds a password; `where` names it."""
    scheme = "" if is_local(uri) else uri.partition("://")[0]
    if not uri.strip() or (scheme and scheme not in SCHEMES):
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise InputError(f"{where}: expected a folder or an address that begins with {known}, found {uri!r:.80}.")
    if scheme and (set("?#") & set(uri) or "@" in urlsplit(uri).netloc):
        raise InputError(
            f"{where}: expected an address without user name, password and options, found one with them. It would be "
            "written into files; give credentials in the environment, such as AWS_ACCESS_KEY_ID."
        )


def check_lancedb(where: str) -> None:
    """Raise InputError if LanceDB is not installed; `where` names what needs it."""
    if importlib.util.find_spec("lancedb") is None:
        raise InputError(
            f"{where}: expected the package lancedb, which is not installed. "
            'Run `pip install "cozyrag[lancedb]"`, or use an index in a folder.'
        )


def load_lancedb() -> ModuleType:
    """LanceDB, with its log about new tables off."""
    os.environ.setdefault("LANCEDB_LOG", "error")
    import lancedb

    return lancedb


class LanceDatabase:
    """The tables of an index. `uri`: as `database_of` gives it."""

    def __init__(self, uri: str):
        self.uri = uri
        self._connection: Any = None
        self._passages: Any = None
        self._words: Any = None

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Turn errors of LanceDB into an InputError: the folder is gone, the server does not answer, the disk is full.

        It has no errors of its own.
        """
        try:
            yield
        except InputError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            cause = _OF_RUST.sub("", " ".join(str(error).split()))[:200]
            raise InputError(
                f"The index in LanceDB at {self.uri} cannot be read or written ({type(error).__name__}: {cause}). "
                "Check that it is there and can be reached, then give the command again: what was written is kept."
            ) from error

    def exists(self) -> bool:
        """Whether a folder is there; an address is always asked. Opening a folder would make it."""
        return "://" in self.uri or Path(self.uri).is_dir()

    def connection(self) -> Any:
        """The connection, made once; within `asked`."""
        if self._connection is None:
            self._connection = load_lancedb().connect(self.uri)
        return self._connection

    def table(self, name: str) -> Any:
        """A table in its newest version; None if there is none. Within `asked`."""
        if not self.exists() or name not in self.connection().list_tables(limit=1000).tables:
            return None
        return self.connection().open_table(name)

    def open(self) -> dict:
        """Open the newest finished index; returns its facts, empty if there is none.

        Raises InputError if they are of another version.
        """
        with self.asked():
            self._words = self.table(WORDS)
            facts = self._facts_of(self._words, FIELDS)
            if facts:
                self._passages = self.table(PASSAGES)
                if self._passages is None:
                    raise InputError(f"Expected a table {PASSAGES!r} in LanceDB at {self.uri}, found none. {AGAIN}")
                self._passages.checkout(facts["table_version"])
        return facts

    def how(self) -> dict:
        """How the passages were encoded, known before the index is finished; empty if there are none."""
        with self.asked():
            return self._facts_of(self.table(PASSAGES), HOW)

    def _facts_of(self, table: Any, fields: dict[str, Kind | Mapping]) -> dict:
        if table is None:
            return {}
        where = f"{PREFIX}{self.uri}"
        try:
            facts = json.loads((table.schema.metadata or {}).get(FACTS, b"null"))
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise InputError(f"{where}: expected tables of `cozyrag index`, found others. Name another database.")
        if (found := facts.get("version")) != VERSION:
            raise InputError(f"{where}: expected version {VERSION}, found {found!r:.60}. Update cozyrag.")
        check_fields(facts, fields, path=where, remedy=AGAIN)
        return facts

    # ---- reading the index that `open` opened

    def rows(self, rows: Sequence[int]) -> "pa.Table":
        """These passages, in any order."""
        with self.asked():
            chosen = self._passages.search().where(f"row IN ({', '.join(map(str, rows))})").select(CONTENT)
            return chosen.limit(len(rows)).to_arrow()

    def column(self, name: str, start: int, stop: int) -> list[str]:
        """A column of the passages from one row to another, without the last."""
        with self.asked():
            chosen = self._passages.search().where(f"row >= {start} AND row < {stop}").select(["row", name])
            return chosen.limit(stop - start).to_arrow().sort_by("row")[name].to_pylist()

    def nearest(self, vector: "np.ndarray", count: int, read_lists: int | None) -> "pa.Table":
        """The passages with the largest inner products; `read_lists`: lists that are read, None: all vectors."""
        with self.asked():
            asked = self._passages.search(vector, vector_column_name="vector").distance_type("dot")
            asked = asked.bypass_vector_index() if read_lists is None else asked.nprobes(read_lists)
            return asked.select([*CONTENT, "_distance"]).limit(count).to_arrow()

    def matching(self, words: Sequence[str], count: int) -> "pa.Table":
        """The passages that score best for these words, which came from a stemmer."""
        with self.asked():
            query = load_lancedb().query.MatchQuery(" ".join(words), "words")
            asked = self._passages.search(query, query_type="fts")
            return asked.select([*CONTENT, "_score"]).limit(count).to_arrow()

    def holders(self, words: Sequence[str]) -> dict[str, int]:
        """The number of passages with each of these words; a word that no passage has is left out."""
        quoted = ", ".join("'{}'".format(word.replace("'", "''")) for word in words)
        with self.asked():
            chosen = self._words.search().where(f"word IN ({quoted})").limit(len(words)).to_arrow()
            return dict(zip(chosen["word"].to_pylist(), chosen["passages"].to_pylist(), strict=True))
