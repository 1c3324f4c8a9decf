"""`cozyrag audit`: the leak audit of a finished run, or of what settings would train on and examine with.

Left out: the audit itself (overlap_audit.py), and the one that every run makes by itself (run.py).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cozyrag.config import Settings, parse_settings
from cozyrag.errors import InputError
from cozyrag.evaluation.overlap_audit import audit_corpus, audit_table, brief, examples_alike, part_scores
from cozyrag.reporting.run_reader import read_evaluation
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.old_names import current_settings, evaluation_files
from cozyrag.runtime.precision import MEASURED
from cozyrag.training.setup import load_tables, make_accelerator

TRAINING_ONLY = {"mixed_precision", MEASURED}  # an audit may be made on another machine, and trains nothing

DESCRIPTION = """\
How much of what a pair is examined with is known from training: questions nearly the same, answers heard before, gold passages
seen before; and the scores on the questions of which nothing was seen. Every run does so by itself and writes audit.json.

  cozyrag audit OUTPUT       a run's output folder: its tables are read again from where its settings say, and the scores of its last
                             examination are split; audit.json is written anew
  cozyrag audit [SETTINGS]   settings of `cozyrag train`, before training: nothing is written

examples:
  cozyrag audit my-rag
  cozyrag audit --questions train.tsv --eval_questions test.tsv --passages wiki.jsonl
"""


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Audit a folder if one is named, else what the settings say. The parser only prints the help."""
    parser.usage = "cozyrag audit [SETTINGS | OUTPUT]"
    parser.description = DESCRIPTION
    words = list(arguments)
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    if not words or words[0].startswith("-"):
        return audit_settings(words)
    if len(words) > 1:
        raise InputError(
            f"cozyrag audit: expected settings or one folder, found {words[0]!r} and {words[1]!r}. See cozyrag audit --help."
        )
    audit_output(Path(words[0]))


def audit_settings(arguments: list[str]) -> None:
    """Print the audit of the tables that these settings name. Raises InputError as reading them does."""
    _audited(parse_settings(arguments))


def audit_output(folder: Path) -> None:
    """Print the audit of a run's tables, read again, and the scores of its last examination by part; write audit.json.

    Raises InputError where the folder is of no run, or its files are no longer where they were.
    """
    found = _audited(saved_settings(folder))
    evaluated = evaluation_files(folder)
    if evaluated:
        newest = evaluated[max(evaluated)]
        found["parts"] = part_scores(found, read_evaluation(newest))
        print(f"\nThe last evaluation ({newest.name}):\n\n{audit_table(found['parts'])}")
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
    saved = current_settings(json.loads(path.read_text(encoding="utf-8")))
    told = {name: value for name, value in saved.items() if name not in TRAINING_ONLY}
    return parse_settings([word for name, value in told.items() for word in _as_arguments(name, value)])


def _as_arguments(name: str, value: object) -> list[str]:
    if value is None or value == []:
        return []
    return [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
