"""`cozyrag doctor`: check this machine, settings before training, or the output of a run.

Left out: the checks themselves (environment.py, loss_check.py, pair_check.py).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.preflight.environment import check_machine
from cozyrag.preflight.loss_check import check_terms, findings_table
from cozyrag.preflight.pair_check import check_pair
from cozyrag.runtime.distributed import refuse
from cozyrag.runtime.precision import check_asked
from cozyrag.training.setup import load_models, load_tables, make_accelerator

DESCRIPTION = """\
Check before or after training that things are as they should be. Nothing is trained and nothing is written.

  cozyrag doctor [--machine]  Before anything. Is this machine fit: Python, torch, FAISS and OpenMP, threads, memory, disk, optional
                              packages, the Hub, and a tiny model that must learn within seconds; each finding with its remedy.
  cozyrag doctor SETTINGS     Before training. Takes the settings of `cozyrag train` (--config FILE.yaml too), loads the tables
                              and the models as a run would, and takes the gradient of each active loss term on one small
                              batch: it must move weights of its own model, no others, and consist of numbers.
                              Every run does so by itself before its first round.
  cozyrag doctor OUTPUT       After training. OUTPUT is the folder of a finished run: the index must be the retriever's, which
                              is also seen by encoding some passages anew, and the generator must answer.
"""
EXAMPLES = """\
examples:
  cozyrag doctor
  cozyrag doctor --questions qa.tsv --passages wiki.jsonl --repeat_penalty 0.1
  cozyrag doctor --config examples/distilgpt2.yaml
  cozyrag doctor my-rag

columns of the table:
  value            the loss term on the batch, before its weight
  gradient norm    length of its gradient over the weights of the model that it moves
  tensors moved    how many weight tensors of that model get a gradient, of those that may be trained
  step lowers it   whether one small step down that gradient lowers the term, on the same batch
  verdict          ok, FAULT, or "no occasion on this batch": nothing there for the term to do, such as no repeats in short answers

Exit code 0 if nothing is wrong, 2 with a sentence on what is and what to do. `cozyrag train --help` shows every setting.
"""


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Check the machine if nothing else is named, a folder if one is, or the settings.

    The parser only prints the help: it would take the value of a setting that it does not know for OUTPUT.
    """
    parser.usage = "cozyrag doctor [--machine | SETTINGS | OUTPUT]"
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    words = list(arguments)
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])
    logging.disable_progress_bar()
    if not words or "--machine" in words:
        _check_machine([word for word in words if word != "--machine"])
    elif words[0].startswith("-"):
        check_settings(words)
    elif len(words) > 1:
        raise InputError(
            f"cozyrag doctor: expected settings or one folder, found {words[0]!r} and {words[1]!r}. See cozyrag doctor --help."
        )
    else:
        for finding in check_pair(Path(words[0])):
            print(f"ok: {finding}")
        print(f"Nothing wrong with {words[0]}.")


def _check_machine(rest: Sequence[str]) -> None:
    """Print each finding about this machine."""
    if rest:
        raise InputError(
            f"cozyrag doctor --machine: expected nothing else, found {rest[0]!r} after --machine. Give one at a time."
        )
    for finding in check_machine():
        print(finding, flush=True)


def check_settings(arguments: list[str]) -> None:
    """Load what a run with these settings would load and test its loss terms. Raises InputError for a fault."""
    settings = parse_settings(arguments)
    accelerator = make_accelerator(settings)
    check_asked(settings.training.mixed_precision, accelerator.device.type)
    corpus = load_tables(accelerator, settings)
    generator, retriever = load_models(accelerator, settings, corpus, None)
    started = time.perf_counter()
    findings = check_terms(generator, retriever, corpus, settings)
    seconds = time.perf_counter() - started
    if not findings:
        return accelerator.print("No loss term is active with these settings: nothing would be trained.")
    accelerator.print(findings_table(findings))
    refuse(finding.fault for finding in findings)
    accelerator.print(f"Loss terms checked: {len(findings)}, in {seconds:.1f} s. Nothing wrong.")
