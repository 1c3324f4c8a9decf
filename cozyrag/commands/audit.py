"""`cozyrag audit`: the leak audit of a finished run, or of what settings would train on and examine with.

Left out: the audit itself (overlap_audit.py), and the one that every run makes by itself (run.py).
"""

import json
from pathlib import Path

from cozyrag.config import Settings, parse_settings
from cozyrag.errors import InputError
from cozyrag.evaluation.overlap_audit import audit_corpus, audit_table, brief, examples_alike, part_scores
from cozyrag.run import load_tables, make_accelerator
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.precision import MEASURED

TRAINING_ONLY = {"mixed_precision", MEASURED}  # an audit may be made on another machine, and trains nothing


def audit_settings(arguments: list[str]) -> None:
    """Print the audit of the tables that these settings name. Raises InputError as reading them does."""
    _audited(parse_settings(arguments))


def audit_output(folder: Path) -> None:
    """Print the audit of a run's tables, read again, and the scores of its last examination by part; write audit.json.

    Raises InputError where the folder is of no run, or its files are no longer where they were.
    """
    found = _audited(saved_settings(folder))
    examined = sorted((folder / "examined").glob("*.jsonl"))
    if examined:
        rows = [json.loads(line) for line in examined[-1].read_text(encoding="utf-8").splitlines()]
        found["parts"] = part_scores(found, rows)
        print(f"\nThe last examination ({examined[-1].name}):\n\n{audit_table(found['parts'])}")
    write_json(folder / "audit.json", found)


def _audited(settings: Settings) -> dict:
    accelerator = make_accelerator(settings)
    corpus = load_tables(accelerator, settings)
    found = audit_corpus(corpus, retriever=settings.models.retriever, generator=settings.models.generator)
    alike = examples_alike(found)
    print(brief(found) + (f"\nThe most alike:\n{alike}" if alike else ""))
    return found


def saved_settings(folder: Path) -> Settings:
    """The settings that a run left in its output folder. Raises InputError where there are none."""
    path = folder / "settings.json"
    if not path.is_file():
        raise InputError(
            f"Expected settings.json in {folder.absolute()}, found none: this is no output folder of a run. Name one, or give settings."
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    told = {name: value for name, value in saved.items() if name not in TRAINING_ONLY}
    return parse_settings([word for name, value in told.items() for word in _as_arguments(name, value)])


def _as_arguments(name: str, value: object) -> list[str]:
    if value is None or value == []:
        return []
    return [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
