"""`cozyrag ask`: a trained pair answers questions and shows its sources.

Left out: retrieval and answering (pipeline.py).
"""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils import logging

from cozyrag.errors import InputError
from cozyrag.pipeline import CozyRAG

SHOWN = 160  # characters of a passage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    parser.add_argument(
        "questions",
        nargs="*",
        metavar="QUESTION",
        help="questions in quotes; without one, a line of standard input each",
    )
    parser.add_argument("--top_k", type=int, help="passages to read (default: as trained)")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print each answer with the passages it comes from."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.top_k is not None and options.top_k < 1:
        raise InputError(f"--top_k: expected at least 1, found {options.top_k}.")
    logging.disable_progress_bar()  # "Loading weights" adds nothing to the answer
    pair = CozyRAG.from_pretrained(options.model)
    for question in options.questions or (line.strip() for line in sys.stdin if line.strip()):
        answer = pair.answer(question, top_k=options.top_k)
        print(f"{answer.text or '(no answer in these passages)'}   (certainty {answer.score:.2f})")
        for number, source in enumerate(answer.passages, 1):
            text = source.text if len(source.text) <= SHOWN else f"{source.text[: SHOWN - 3]}..."
            print(f"  [{number}] {source.score:.3f} {source.title or source.id}: {text}")
