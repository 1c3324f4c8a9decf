"""How many validation questions overlap with training: nearly the same question, a known answer, a
known gold passage; and the scores on the questions without any overlap. Every run writes such an
audit to audit.json.

  cozyrag audit OUTPUT      audit a run: reads the tables named in its settings again, splits the
                            scores of its last evaluation, and rewrites audit.json
  cozyrag audit SETTINGS    audit settings of `cozyrag train` before training; writes nothing

examples:
  cozyrag audit my-rag
  cozyrag audit --questions train.tsv --eval_questions test.tsv --passages wiki.jsonl

Left out: the audit itself (overlap_audit.py), and the audit that every run makes (run.py).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cozyrag.commands.options import settings_or_folder
from cozyrag.config import Settings, parse_settings
from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.old_names import current_settings, evaluation_files
from cozyrag.runtime.precision import MEASURED
from cozyrag.runtime.terminal import say

TRAINING_ONLY = {"mixed_precision", MEASURED}  # an audit does not train and may run on another machine


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print the audit; for a folder, with the scores of its last evaluation by part, and write audit.json.

    Raises InputError if the folder is not that of a run, or a table cannot be read.
    """
    parser.usage = "cozyrag audit [SETTINGS | OUTPUT]"
    words, folder = settings_or_folder(arguments, parser)
    settings = saved_settings(folder) if folder else parse_settings(words)
    from cozyrag.evaluation.overlap_audit import audit_corpus, audit_table, brief, examples_alike, part_scores
    from cozyrag.reporting.run_reader import read_evaluation
    from cozyrag.training.setup import load_tables, make_accelerator

    corpus = load_tables(make_accelerator(settings), settings)
    found = audit_corpus(corpus, retriever=settings.models.retriever, generator=settings.models.generator)
    alike = examples_alike(found)
    say(brief(found) + (f"\nThe most similar ones:\n{alike}" if alike else ""))
    if folder:
        if evaluated := evaluation_files(folder):
            newest = evaluated[max(evaluated)]
            found["parts"] = part_scores(found, read_evaluation(newest))
            say(f"\nThe last evaluation ({newest.name}):\n\n{audit_table(found['parts'])}")
        write_json(folder / "audit.json", found)


def saved_settings(folder: Path) -> Settings:
    """The settings of a run. Raises InputError if its folder has none."""
    path = folder / "settings.json"
    if not path.is_file():
        raise InputError(
            f"Expected settings.json in {folder.absolute()}, found none: this is not the output folder of a run. Name "
            "one, or give settings."
        )
    saved = current_settings(read_object(path, "Copy the file again, or give the settings instead of the folder."))
    arguments = []
    for name, value in saved.items():
        if name not in TRAINING_ONLY and value is not None and value != []:
            arguments += [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
    return parse_settings(arguments)
