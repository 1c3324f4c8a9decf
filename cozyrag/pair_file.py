"""cozyrag.json, which ties generator, retriever and index into one pair: its content, and reading it with checks.

Left out: loading the models and the index (pipeline.py), writing them (training/rounds.py).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cozyrag import __version__
from cozyrag.data.matching import STEMMERS
from cozyrag.errors import InputError
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE, START
from cozyrag.retrieval.contexts import FILTERS
from cozyrag.retrieval.hybrid import MODES
from cozyrag.runtime.atomic_files import NEXT, folder_bytes, write_json
from cozyrag.runtime.contents import check_contents, check_seal, contents_of, is_contents, read_object, sealed
from cozyrag.runtime.folder_lock import new_folder
from cozyrag.runtime.json_fields import Kind, check_fields, each_of, number, one_of, or_null, text, whole
from cozyrag.runtime.machine_faults import check_readable
from cozyrag.runtime.old_names import current_settings

PAIR_FILE = "cozyrag.json"
FORMAT_VERSION = 2
STARTING = 3  # prompts begin with the tokenizer's BOS, which earlier versions of cozyrag would leave out
RERANKING = 4  # there is a reranker, which earlier versions of cozyrag would leave out
READABLE = (1, FORMAT_VERSION, STARTING, RERANKING)
MODELS = ("generator", "retriever", "reranker")  # the index has the hashes of its files in its own index.json
CONTENTS = "files"
READ = (".json", ".safetensors", ".txt", ".model", ".jinja")  # files of a model that change what it does
AGAIN = "Copy the whole folder again, or train again."
PLACE: dict[str, Kind | Mapping] = {
    "folder": text(),
    "repo": text(),
    "revision": text(),
    "fingerprint": text(),
    CONTENTS: Kind("the bytes and hashes of files in its folder", is_contents),
}
FIELDS: dict[str, Kind | Mapping] = {
    "generator": PLACE,
    "retriever": PLACE,
    "reranker": PLACE,
    "index": PLACE,
    "prompt": {
        "question_cue": text(),
        "answer_cue": text(),
        "chat_template": one_of((True,)),
        START: each_of(text()),
    },
    "retrieval": {
        "mode": one_of(MODES),
        "stemmer": one_of(STEMMERS),
        "weights": {"vectors": number(0, 1e6), "sentence_words": number(0, 1e6)},
        "reranking": {"depth": whole(1, 10_000), "weight": number(0, 1e6)},
    },
    "contexts": {
        "top_k": whole(1, 10_000),
        "context_tokens": whole(0, 1_000_000),
        "answer_tokens": whole(1, 100_000),
        "min_answer_tokens": whole(0, 100_000),
        "no_repeat_ngram_size": whole(0, 1000),
        "extractive": one_of((True, False)),
        "context_filter": one_of(FILTERS),
        "no_answer_threshold": or_null(number(0, 1)),
    },
}
# What earlier versions did not write, or what only pairs on the Hub have.
OPTIONAL = {
    *(f"{role}.{name}" for role in (*MODELS, "index") for name in PLACE),
    *("prompt", *(f"prompt.{name}" for name in ("question_cue", "answer_cue", "chat_template", START))),
    "retrieval.weights.sentence_words",
    *("reranker", "retrieval.reranking"),
    *(f"contexts.{name}" for name in ("min_answer_tokens", "no_repeat_ngram_size", "extractive", "context_filter")),
    "contexts.no_answer_threshold",
}
CLOSED = ("retrieval", "retrieval.weights", "retrieval.reranking", "contexts")  # their entries become arguments


def describe_pair(
    *,
    fingerprint: str,
    retrieval: dict,
    generator: str | None = None,
    reranker: str | None = None,
    prompt: dict | None = None,
    calibration: dict | None = None,
    **contexts: int | str | float | None,
) -> dict:
    """The content of cozyrag.json: the folders of the pieces, their fingerprints, and how they are used together.

    Args:
        fingerprint: of the retriever. generator: fingerprint of the generator's weights. reranker: of the reranker, if
            there is one.
        prompt: `Generator.prompt_facts`; None: those of a plain prompt.
        calibration: the numbers of `Calibration`; None: certainty is the generator's own. Earlier versions ignore it.
        retrieval: mode, stemmer, weights and reranking. contexts: top_k, context_tokens and the limits of answers, as
            for CozyRAG.
    """
    return {
        "format_version": RERANKING if reranker else STARTING if START in (prompt or {}) else FORMAT_VERSION,
        "cozyrag_version": __version__,
        "generator": {"folder": "generator"} | ({"fingerprint": generator} if generator else {}),
        "retriever": {"folder": "retriever", "fingerprint": fingerprint},
        **({"reranker": {"folder": "reranker", "fingerprint": reranker}} if reranker else {}),
        "index": {"folder": "index"},
        "prompt": prompt or {"question_cue": QUESTION_CUE, "answer_cue": ANSWER_CUE},
        "retrieval": retrieval,
        "contexts": contexts,
    } | ({"calibration": calibration} if calibration else {})


def starts_text(facts: dict) -> bool:
    """Whether the generator of cozyrag.json or progress.json reads prompts that begin with the tokenizer's BOS.

    Earlier versions trained without it and did not name it: their pairs answer as they were trained.
    """
    return START in facts.get("prompt", {})


def read_pair(folder: Path) -> dict:
    """cozyrag.json of a folder. Raises InputError if there is none, if it is of another format, or if it is damaged."""
    path = folder / PAIR_FILE
    if (folder / NEXT).exists():
        raise InputError(
            f"The run in {folder.absolute()} was interrupted while it replaced the old pair by a new one. Give its "
            "command again: it completes the replacement first and resumes."
        )
    if not path.exists():
        raise InputError(
            f"Expected {PAIR_FILE} in {folder.absolute()}, found none: this is not the output folder of a finished run."
        )
    check_readable([path])
    pair = read_object(path, "Train again or copy the file again.")
    found = pair.get("format_version")
    if type(found) is not int or found not in READABLE:
        raise InputError(f"{path}: expected format_version {RERANKING} or lower, found {found!r:.60}. Update cozyrag.")
    known = pair | ({"contexts": current_settings(pair["contexts"])} if isinstance(pair.get("contexts"), dict) else {})
    check_fields(known, FIELDS, path=path, remedy=AGAIN, optional=OPTIONAL, closed=CLOSED)
    for role in pieces_of(known):
        _check_place(path, role, known[role])
    if ("reranker" in known) != ("reranking" in known["retrieval"]):
        raise InputError(f"{path}: expected 'reranker' and 'retrieval.reranking' together, found only one. {AGAIN}")
    check_seal(path, pair, AGAIN)
    return known


def pieces_of(pair: Mapping) -> tuple[str, ...]:
    """The pieces of a pair: generator, retriever, a reranker if it has one, index."""
    return tuple(role for role in (*MODELS, "index") if role in pair)


def models_of(pair: Mapping) -> tuple[str, ...]:
    """The pieces of a pair that are models."""
    return tuple(role for role in MODELS if role in pair)


def _check_place(path: Path, role: str, place: Mapping) -> None:
    """Raise InputError for a piece without a place, a retriever or reranker without a fingerprint."""
    needed = (("folder",) if "folder" in place else ("repo", "revision")) + ("fingerprint",) * (
        role in ("retriever", "reranker")
    )
    if missing := [name for name in needed if name not in place]:
        raise InputError(f"{path}: expected an entry '{role}.{missing[0]}', found none. {AGAIN}")


def write_pair(folder: Path, pair: dict) -> None:
    """Write cozyrag.json with the hashes of the files of the models beside it, and of itself.

    Raises InputError as `write_json`.
    """
    held: dict[str, dict] = {}
    for role in models_of(pair):
        place = folder / role
        names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.suffix in READ)
        held[role] = pair[role] | {CONTENTS: contents_of(place, [name for name in names if (place / name).is_file()])}
    write_json(folder / PAIR_FILE, sealed(pair | held))


def check_piece(place: Path, piece: Mapping, *, whole: bool = False) -> None:
    """Raise InputError if a file of a model is not the one that was saved with its pair.

    `piece`: its entry of cozyrag.json; without hashes, as earlier versions wrote it, nothing is checked.
    """
    check_contents(place, piece.get(CONTENTS, {}), AGAIN, whole=whole)


@dataclass(frozen=True)
class SavedPair:
    """Where a pair was loaded from. `facts`: cozyrag.json; `pieces`: the folder of each piece."""

    folder: Path
    facts: dict
    pieces: dict[str, Path]

    @property
    def is_whole(self) -> bool:
        """Whether all pieces lie in one folder, as a run leaves them; those of the Hub lie in three."""
        return all("folder" in self.facts[role] for role in self.pieces)

    def copy(self, folder: Path, **contexts: object) -> None:
        """Write the pair as one folder, with these values in `contexts`. Raises InputError if it exists or is full."""
        facts = dict(self.facts) | {"contexts": self.facts["contexts"] | contexts}
        with new_folder(folder, "the pair", needed=sum(map(folder_bytes, self.pieces.values()))) as coming:
            for role, piece in self.pieces.items():
                shutil.copytree(piece, coming / role, ignore=shutil.ignore_patterns(PAIR_FILE, ".*"))
                kept = {name: self.facts[role][name] for name in ("fingerprint",) if name in self.facts[role]}
                facts[role] = {"folder": role} | kept
            write_pair(coming, facts)
