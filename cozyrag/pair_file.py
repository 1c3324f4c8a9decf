"""cozyrag.json, which ties generator, retriever and index into one pair: its content, and reading it with checks.

Left out: loading the models and the index (pipeline.py), writing them (training/rounds.py).
"""

import json
from pathlib import Path

from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE, START
from cozyrag.runtime.atomic_files import NEXT
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
    **contexts: int | str | float | None,
) -> dict:
    """The content of cozyrag.json: the folders of the pieces, their fingerprints, and how they are used together.

    Args:
        fingerprint: of the retriever. generator: fingerprint of the generator's weights.
        prompt: `Generator.prompt_facts`; None: those of a plain prompt.
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
    }


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
