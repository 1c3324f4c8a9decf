"""The files of a saved index: their names, the facts in index.json, and the checks before the other files are read.

Left out: the contents of the other files (passage_index.py).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from cozyrag.data.sentences import RULES
from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import BF16, FLOAT32, INT8
from cozyrag.retrieval.faiss_index import Tuned, is_known, listed
from cozyrag.retrieval.lance_database import PASSAGES, check_address, check_lancedb
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.contents import (
    check_contents,
    check_ordinary,
    check_seal,
    contents_of,
    is_contents,
    read_object,
    sealed,
)
from cozyrag.runtime.json_fields import Kind, check_fields, each_of, one_of, text, whole
from cozyrag.runtime.machine_faults import check_readable

FILES = ("passages.parquet", "vectors.safetensors", "index.faiss", "index.json")
LISTS = "lists.safetensors"  # only for an index with lists
NEEDED = tuple(name for name in FILES if name != "index.faiss")  # written for other programs, never read here
LANCEDB = "LanceDB"  # the kind of an index whose folder has only index.json, which names a database
COPY_AGAIN = "Copy the whole folder again, or train again."
CONTENTS = "files"  # bytes and hashes of the other files; earlier versions wrote only "bytes", or nothing
FIELDS: dict[str, Kind | dict] = {
    "retriever_fingerprint": text(),
    "passages": whole(0, 2**40),
    "dimensions": whole(1, 2**20),
    "factory": text(),
    "search": {"lists": whole(1, 2**31), "factor": whole(1, 2**20)},
    "bytes": each_of(whole(0, 2**60)),
    "sentence_rules": whole(0, 2**31),
    "precision": one_of((FLOAT32, BF16, INT8)),
    CONTENTS: Kind("the bytes and hashes of files in the folder", is_contents),
    "database": text(2000),
    "collection": one_of((PASSAGES,)),
}
OPTIONAL = {*FIELDS} - {"retriever_fingerprint"}


def read_facts(folder: str | Path) -> dict:
    """The contents of index.json; empty if the file is missing or damaged."""
    check_ordinary([Path(folder) / "index.json"])
    try:
        facts = json.loads((Path(folder) / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) and "retriever_fingerprint" in facts else {}


def made_by(folder: str | Path) -> str | None:
    """The fingerprint of the retriever that encoded the vectors in a folder; None without a complete index."""
    return read_facts(folder).get("retriever_fingerprint")


def precision_of(folder: Path) -> str:
    """The precision in which the vectors in a folder were encoded."""
    return read_facts(folder).get("precision", FLOAT32)


def keeps_sentences(folder: Path) -> bool:
    """Whether a folder holds sentence vectors that match the current rules for splitting sentences."""
    return read_facts(folder).get("sentence_rules") == RULES


def write_facts(
    folder: Path,
    fingerprint: str,
    shape: tuple[int, ...],
    factory: str,
    *,
    tuned: Tuned | None,
    sentences: bool,
    precision: str,
) -> None:
    """Write index.json with the hashes of the other files, which must be in the folder.

    Args:
        fingerprint: of the retriever. shape: (n, dim) of the vectors. factory: kind of the FAISS index.
        tuned: how an index with lists is searched.
        sentences: whether the folder holds sentence vectors. precision: in which the passages were encoded.
    """
    facts = {
        "retriever_fingerprint": fingerprint,
        "passages": shape[0],
        "dimensions": shape[1],
        "metric": "inner product",
        "factory": factory,
        "search": vars(tuned) if listed(factory) else None,
        "sentence_rules": RULES if sentences else None,
        "precision": None if precision == FLOAT32 else precision,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    held = [name for name in (*FILES[:-1], LISTS) if (folder / name).exists()]
    write_json(folder / "index.json", sealed(known | {CONTENTS: contents_of(folder, held)}))


def write_database(folder: Path, uri: str, facts: dict) -> None:
    """Write index.json of an index in LanceDB, the only file of its folder. `facts`: of `LanceDatabase.open`."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        **{name: facts[name] for name in ("retriever_fingerprint", "passages", "dimensions", "precision")},
        "metric": "inner product",
        "factory": LANCEDB,
        "database": uri,
        "collection": PASSAGES,
    }
    write_json(folder / "index.json", sealed(known))


def checked_database(folder: Path, fingerprint: str) -> str | None:
    """The database that the index.json in a folder names; None for an index in files. Raises InputError."""
    path = folder / "index.json"
    if read_facts(folder).get("factory") != LANCEDB:
        return None
    check_readable([path])
    facts = _known_facts(path)
    if missing := [name for name in ("database", "collection") if name not in facts]:
        raise InputError(f"{path}: expected an entry {missing[0]!r}, found none. {COPY_AGAIN}")
    check_seal(path, facts, COPY_AGAIN)
    check_address(facts["database"], str(path))
    check_lancedb(str(path))
    _check_retriever(folder, facts, fingerprint)
    return str(facts["database"])


def checked_facts(folder: Path, fingerprint: str) -> dict:
    """The contents of index.json.

    Raises InputError if a file is missing or is not what was written, if another retriever than `fingerprint`'s encoded
    the vectors, or if the kind of FAISS index is unknown.
    """
    path = folder / "index.json"
    check_ordinary(folder / name for name in (*FILES, LISTS))
    check_readable(folder / name for name in (*FILES, LISTS))
    if missing := [name for name in NEEDED if not (folder / name).exists()]:
        raise InputError(f"Expected an index in {folder}, but {missing[0]} is missing. {COPY_AGAIN}")
    facts = _known_facts(path)
    for name, size in facts.get("bytes", {}).items():
        if (folder / name).exists() and (found := (folder / name).stat().st_size) != size:
            raise InputError(
                f"Expected {size} bytes in {folder / name}, found {found}: the file was cut short or replaced. "
                f"{COPY_AGAIN}"
            )
    _check_retriever(folder, facts, fingerprint)
    if not is_known(facts.get("factory", "Flat")):
        raise InputError(
            f"{path}: expected a FAISS index such as Flat, SQ8, IVF1024,PQ96x4fs or Mapped, found "
            f"{facts['factory']!r}. Update cozyrag, or make the index again."
        )
    check_seal(path, facts, COPY_AGAIN)
    _check_held(folder, facts.get(CONTENTS, {}), NEEDED[:-1])
    return facts


def _check_retriever(folder: Path, facts: dict, fingerprint: str) -> None:
    if facts["retriever_fingerprint"] != fingerprint:
        raise InputError(
            f"The index in {folder} was made by retriever {facts['retriever_fingerprint']}, but the retriever in use "
            f"is {fingerprint}: their vectors do not compare. Use the retriever that was saved with the index, or "
            "index the passages again."
        )


def _known_facts(path: Path) -> dict:
    """index.json with its fields checked. Raises InputError."""
    facts = read_object(path, COPY_AGAIN)
    if "retriever_fingerprint" not in facts:
        raise InputError(f"{path} is damaged: it names no retriever. {COPY_AGAIN}")
    check_fields(facts, FIELDS, path=path, remedy=COPY_AGAIN, optional=OPTIONAL, closed=("search",))
    return facts


def _check_held(
    folder: Path, contents: dict, names: Iterable[str], *, remedy: str = COPY_AGAIN, entire: bool = False
) -> None:
    """Check the files that are read: index.faiss is for other programs, and the Hub does not download it."""
    held = {name: contents[name] for name in (*names, LISTS) if name in contents}
    check_contents(folder, held, remedy, whole=entire)


def check_index_contents(folder: Path, *, remedy: str = COPY_AGAIN, whole: bool = False) -> None:
    """Raise InputError if a file of an index is not what index.json says; without hashes there nothing is known.

    Args:
        remedy: the last sentence of the message. whole: as of `check_contents`, and index.faiss too.
    """
    facts = read_facts(folder)
    check_seal(folder / "index.json", facts, remedy)
    names = FILES[:-1] if whole else NEEDED[:-1]
    _check_held(folder, facts.get(CONTENTS, {}), names, remedy=remedy, entire=whole)


def hashed(folder: Path) -> bool:
    """Whether index.json has the hashes of the other files."""
    return CONTENTS in read_facts(folder)
