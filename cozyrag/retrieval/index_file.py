"""The files of a saved index: their names, the facts in index.json, and the checks before the other files are read.

Left out: the contents of the other files (passage_index.py).
"""

import json
from pathlib import Path

from cozyrag.data.sentences import RULES
from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import FLOAT32
from cozyrag.retrieval.faiss_index import Tuned, is_known, listed
from cozyrag.runtime.machine_faults import check_readable

FILES = ("passages.parquet", "vectors.safetensors", "index.faiss", "index.json")
LISTS = "lists.safetensors"  # only for an index with lists
NEEDED = tuple(name for name in FILES if name != "index.faiss")  # written for other programs, never read here
COPY_AGAIN = "Copy the whole folder again, or run train.py again."


def read_facts(folder: str | Path) -> dict:
    """The contents of index.json; empty if the file is missing or damaged."""
    try:
        facts = json.loads((Path(folder) / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
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
    sizes: dict[str, int] | None = None,
) -> None:
    """Write index.json.

    Args:
        fingerprint: of the retriever. shape: (n, dim) of the vectors. factory: kind of the FAISS index.
        tuned: how an index with lists is searched.
        sentences: whether the folder holds sentence vectors. precision: in which the passages were encoded.
        sizes: bytes of the other files.
    """
    facts = {
        "retriever_fingerprint": fingerprint,
        "passages": shape[0],
        "dimensions": shape[1],
        "metric": "inner product",
        "factory": factory,
        "search": vars(tuned) if listed(factory) else None,
        "bytes": sizes,
        "sentence_rules": RULES if sentences else None,
        "precision": None if precision == FLOAT32 else precision,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    (folder / "index.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def checked_facts(folder: Path, fingerprint: str) -> dict:
    """The contents of index.json.

    Raises InputError if a file is missing or has another size, if another retriever than `fingerprint`'s encoded the
    vectors, or if the kind of FAISS index is unknown.
    """
    path = folder / "index.json"
    check_readable(folder / name for name in (*FILES, LISTS))
    if missing := [name for name in NEEDED if not (folder / name).exists()]:
        raise InputError(f"Expected an index in {folder}, but {missing[0]} is missing. {COPY_AGAIN}")
    facts = read_facts(folder)
    if not facts:
        raise InputError(f"{path} is damaged. {COPY_AGAIN}")
    for name, size in facts.get("bytes", {}).items():
        if (folder / name).exists() and (found := (folder / name).stat().st_size) != size:
            raise InputError(
                f"Expected {size} bytes in {folder / name}, found {found}: the file was cut short or replaced. "
                f"{COPY_AGAIN}"
            )
    if facts["retriever_fingerprint"] != fingerprint:
        raise InputError(
            f"The index in {folder} was made by retriever {facts['retriever_fingerprint']}, but the retriever in use "
            f"is {fingerprint}: their vectors do not compare. Use the retriever that was saved with the index, or "
            "index the passages again."
        )
    if not is_known(facts.get("factory", "Flat")):
        raise InputError(
            f"{path}: expected a FAISS index such as Flat, SQ8, IVF1024,PQ96x4fs or Mapped, found "
            f"{facts['factory']!r}. Update cozyrag, or make the index again."
        )
    return facts
