"""cozyrag.json, which ties generator, retriever and index into one pair: its content, and reading it with checks.

Left out: loading the models and the index (pipeline.py), writing them (training/rounds.py).
"""

import json
from pathlib import Path

from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.models.prompts import ANSWER_CUE, QUESTION_CUE
from cozyrag.runtime.atomic_files import NEXT
from cozyrag.runtime.old_names import current_settings

PAIR_FILE = "cozyrag.json"
FORMAT_VERSION = 2
READABLE = (1, FORMAT_VERSION)


def describe_pair(
    *,
    fingerprint: str,
    retrieval: dict,
    generator: str | None = None,
    chat: bool = False,
    **contexts: int | str | float | None,
) -> dict:
    """The content of cozyrag.json: the folders of the pieces, their fingerprints, and how they are used together.

    Args:
        fingerprint: of the retriever. generator: fingerprint of the generator's weights.
        chat: whether prompts use the chat template of the generator's tokenizer.
        retrieval: mode, stemmer and weights. contexts: top_k, context_tokens and the limits of answers, as for CozyRAG.
    """
    return {
        "format_version": FORMAT_VERSION,
        "cozyrag_version": __version__,
        "generator": {"folder": "generator"} | ({"fingerprint": generator} if generator else {}),
        "retriever": {"folder": "retriever", "fingerprint": fingerprint},
        "index": {"folder": "index"},
        "prompt": {"question_cue": QUESTION_CUE} | ({"chat_template": True} if chat else {"answer_cue": ANSWER_CUE}),
        "retrieval": retrieval,
        "contexts": contexts,
    }


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
    try:
        pair = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Run train.py again or copy the file again.") from error
    found = pair.get("format_version") if isinstance(pair, dict) else None
    if found not in READABLE:
        raise InputError(f"{path}: expected format_version {FORMAT_VERSION}, found {found!r}. Update cozyrag.")
    return pair | {"contexts": current_settings(pair["contexts"])} if "contexts" in pair else pair
