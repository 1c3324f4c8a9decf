"""Check a machine, settings or a finished pair. Nothing is trained and nothing is written.

  cozyrag doctor [--machine]   this machine: Python, torch, FAISS and OpenMP, threads, memory, disk,
                               optional packages, the Hub, and a tiny model that must learn within
                               seconds; each finding with its remedy
  cozyrag doctor SETTINGS      settings of `cozyrag train`: loads tables and models as a run does and
                               computes the gradient of each active loss term on one small batch; it
                               must be finite, and nonzero for the weights of its own model only.
                               Every run makes this check before its first round.
  cozyrag doctor OUTPUT        a finished run: the index must belong to the retriever, which is
                               verified by encoding some passages again, and the generator must answer

examples:
  cozyrag doctor
  cozyrag doctor --questions qa.tsv --passages wiki.jsonl --repeat_penalty 0.1
  cozyrag doctor --config examples/distilgpt2.yaml
  cozyrag doctor my-rag

columns of the table:
  value            the loss term on the batch, before its weight
  gradient norm    norm of its gradient over the weights of its model
  tensors moved    weight tensors of that model with a gradient, of the trainable ones
  step lowers it   whether one small step along the gradient lowers the term on the same batch
  verdict          ok, FAULT, or "zero on this batch": nothing to lower there,
                   such as no repeats in short answers

Exit code 0 without a fault, else 2 with a sentence on the fault and its remedy.
`cozyrag train --help` shows the settings.

Left out: the checks themselves (environment.py, loss_check.py, pair_check.py).
"""

import argparse
import time
from collections.abc import Sequence

from cozyrag.commands.options import settings_or_folder
from cozyrag.config import parse_settings
from cozyrag.errors import InputError
from cozyrag.runtime.precision import check_asked
from cozyrag.runtime.terminal import one_line, say


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Check the machine, a folder, or settings. Raises InputError for a fault."""
    parser.usage = "cozyrag doctor [--machine | SETTINGS | OUTPUT]"
    words, folder = settings_or_folder(arguments, parser)
    if folder:
        from cozyrag.preflight.pair_check import check_pair

        _without_bars()
        for line in check_pair(folder):
            say(f"ok: {one_line(line)}")
        say(f"Nothing wrong with {one_line(folder)}.")
    elif words in ([], ["--machine"]):
        from cozyrag.preflight.environment import check_machine

        _without_bars()
        for finding in check_machine():
            say(str(finding))
    elif "--machine" in words:
        other = next(word for word in words if word != "--machine")
        raise InputError(f"cozyrag doctor --machine: expected no other option, found {other!r}. Give one at a time.")
    else:
        check_settings(words)


def _without_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_settings(arguments: list[str]) -> None:
    """Test the loss terms of a run with these settings. Raises InputError for a fault."""
    settings = parse_settings(arguments)
    from cozyrag.preflight.loss_check import check_terms, findings_table  # torch: only once the settings are correct
    from cozyrag.runtime.distributed import refuse
    from cozyrag.training.setup import load_models, load_tables, make_accelerator

    _without_bars()
    accelerator = make_accelerator(settings)
    check_asked(settings.training.mixed_precision, accelerator.device.type)
    corpus = load_tables(accelerator, settings)
    generator, retriever, reranker = load_models(accelerator, settings, corpus, None)
    started = time.perf_counter()
    findings = check_terms(generator, retriever, corpus, settings, reranker=reranker)
    seconds = time.perf_counter() - started
    tell = say if accelerator.is_main_process else (lambda text: None)
    if not findings:
        return tell("No loss term is active with these settings: nothing would be trained.")
    tell(findings_table(findings))
    refuse(finding.fault for finding in findings)
    tell(f"Loss terms checked: {len(findings)}, in {seconds:.1f} s. Nothing wrong.")
