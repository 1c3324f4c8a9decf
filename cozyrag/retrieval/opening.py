"""One entry point to indexes: a folder with files, a folder that names a database, or a database.

Left out: what is opened (passage_index.py, lance_index.py).
"""

from pathlib import Path

from cozyrag.errors import InputError
from cozyrag.retrieval.index_file import COPY_AGAIN, checked_database, read_facts
from cozyrag.retrieval.lance_database import database_of
from cozyrag.retrieval.lance_index import LanceIndex
from cozyrag.retrieval.passage_index import PassageIndex, Passages

Index = PassageIndex | LanceIndex


def open_index(place: str | Path, *, fingerprint: str, expected: Passages | None = None) -> Index:
    """The index in a folder or a database such as lancedb:/data/wiki.

    Raises:
        InputError: as `PassageIndex.load` and `LanceIndex.open`.
    """
    uri = database_of(str(place)) or checked_database(Path(place), fingerprint)
    if uri is not None:
        return LanceIndex.open(uri, fingerprint=fingerprint, expected=expected)
    return PassageIndex.load(place, fingerprint=fingerprint, expected=expected)


def named_database(place: str | Path) -> str | None:
    """The database that `open_index` would open, which is not checked here; None for an index in files."""
    named = database_of(str(place)) or read_facts(place).get("database")
    return named if isinstance(named, str) else None


def check_fits(index: Index, dimensions: int) -> None:
    """Raise InputError for an index in which a retriever with vectors of so many `dimensions` cannot search."""
    if index.vectors.shape[1] != dimensions or not len(index):
        raise InputError(
            f"Expected an index of vectors with {dimensions} dimensions, as the retriever makes them, found "
            f"{len(index)} with {index.vectors.shape[1]}. {COPY_AGAIN}"
        )
