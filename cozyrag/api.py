"""Training from Python: `cozyrag.train(questions, passages, rounds=1)` makes the run of train.py and returns its pair.

Left out: the run itself (run.py), the settings (config.py), using the pair (pipeline.py).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset

from cozyrag.config import Settings, settings_of
from cozyrag.config_checks import QUICKSTART
from cozyrag.data.given import lines_of, sources_given
from cozyrag.errors import InputError
from cozyrag.pipeline import CozyRAG
from cozyrag.run import run
from cozyrag.runtime.distributed import own_state
from cozyrag.training.output_dir import GIVEN
from cozyrag.training.setup import bars_restored

Rows: TypeAlias = str | os.PathLike | Sequence[str | os.PathLike] | Sequence[Mapping[str, Any]] | Dataset


def train(
    questions: Rows = QUICKSTART,
    passages: Rows | None = None,
    *,
    eval_questions: Rows | None = None,
    **settings: Any,
) -> CozyRAG:
    """Train a generator and a retriever together, as train.py does, and load the pair.

    The call returns when the run is finished. After an interruption (Ctrl-C, the stop button of a notebook, a killed
    kernel) the same call resumes from the last checkpoint. Random states of Python, NumPy and PyTorch are seeded with
    `seed`.

    Args:
        questions: training questions: paths, patterns or Hub names as for train.py, a list of dictionaries, or a
            Dataset. Rows are kept in `output_dir`/given, so that the run can resume and be audited.
        passages, eval_questions: the same; None: see docs/settings.md.
        settings: every other setting of train.py by its name, such as generator="smollm2", rounds=1,
            output_dir="my-rag".

    Raises:
        InputError: something given cannot be used, as an unknown setting (with the nearest name).
    """
    asked = {"questions": questions}
    others = {"passages": passages, "eval_questions": eval_questions}
    chosen, files = _settings(asked | {name: rows for name, rows in others.items() if rows is not None}, settings)
    with own_state(), bars_restored():
        run(chosen, files)
    return CozyRAG.from_pretrained(chosen.output.output_dir, device="cpu" if chosen.training.use_cpu else None)


def _settings(asked: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Settings, dict[Path, str]]:
    """The settings of the run, and the texts of the files that they name for rows given in Python."""
    if settings.get("plan"):
        raise InputError("train: expected a run, found plan=True, which trains nothing. Use `cozyrag plan` instead.")
    sources = {name: sources_given(name, given) for name, given in asked.items()}
    place = Path(settings_of(settings).output.output_dir) / GIVEN
    files = {place / f"{name}.jsonl": lines_of(name, asked[name]) for name, found in sources.items() if found is None}
    named = {name: found or str(place / f"{name}.jsonl") for name, found in sources.items()}
    return settings_of({name: _one(found) for name, found in named.items()} | dict(settings)), files


def _one(sources: str | Sequence[str]) -> str | Sequence[str]:
    return sources[0] if isinstance(sources, list) and len(sources) == 1 else sources
