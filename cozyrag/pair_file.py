"""cozyrag.json, which ties generator, retriever and index into one pair: its content, and reading it with checks.

Left out: loading the models and the index (pipeline.py), writing them (training/rounds.py).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE, START
from cozyrag.runtime.atomic_files import NEXT, folder_bytes, replacing, write_json
from cozyrag.runtime.machine_faults import machine_faults_told
from cozyrag.runtime.old_names import current_settings

PAIR_FILE = "cozyrag.json"
FORMAT_VERSION = 2
STARTING = 3  # prompts begin with the tokenizer's BOS, which earlier versions of cozyrag would leave out
READABLE = (1, FORMAT_VERSION, STARTING)


def describe_pair(
    *,
    fingerprint: str,
    retrieval: dict,
    generator: str | None = None,
    prompt: dict | None = None,
    calibration: dict | None = None,
    **contexts: int | str | float | None,
) -> dict:
    """The content of cozyrag.json: the folders of the pieces, their fingerprints, and how they are used together.

    Args:
        fingerprint: of the retriever. generator: fingerprint of the generator's weights.
        prompt: `Generator.prompt_facts`; None: those of a plain prompt.
        calibration: the numbers of `Calibration`; None: certainty is the generator's own. Earlier versions ignore it.
        retrieval: mode, stemmer and weights. contexts: top_k, context_tokens and the limits of answers, as for CozyRAG.
    """
    return {
        "format_version": STARTING if START in (prompt or {}) else FORMAT_VERSION,
        "cozyrag_version": __version__,
        "generator": {"folder": "generator"} | ({"fingerprint": generator} if generator else {}),
        "retriever": {"folder": "retriever", "fingerprint": fingerprint},
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
    """cozyrag.json of a folder. Raises InputError if there is none, or if it is of another format."""
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
    with machine_faults_told(path):
        content = path.read_bytes()
    try:
        pair = json.loads(content.decode())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Run train.py again or copy the file again.") from error
    found = pair.get("format_version") if isinstance(pair, dict) else None
    if found not in READABLE:
        raise InputError(f"{path}: expected format_version {STARTING} or lower, found {found!r}. Update cozyrag.")
    return pair | {"contexts": current_settings(pair["contexts"])} if "contexts" in pair else pair


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
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"Expected a new or empty folder for the pair, {folder.absolute()} holds something; nothing was "
                "changed. Give another name."
            )
        facts = dict(self.facts) | {"contexts": self.facts["contexts"] | contexts}
        with replacing(folder, needed=sum(map(folder_bytes, self.pieces.values()))) as coming:
            for role, piece in self.pieces.items():
                shutil.copytree(piece, coming / role, ignore=shutil.ignore_patterns(PAIR_FILE, ".*"))
                kept = {name: self.facts[role][name] for name in ("fingerprint",) if name in self.facts[role]}
                facts[role] = {"folder": role} | kept
            write_json(coming / PAIR_FILE, facts)
