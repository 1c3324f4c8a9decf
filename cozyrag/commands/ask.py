"""Answer questions with a trained pair. Each answer is printed with its certainty and the passages it comes from, with
their search scores. The certainty, 0 to 1, is the estimated probability that the answer is right if the run had enough
validation questions to calibrate it, else the geometric mean of the probabilities of its tokens.

examples:
  cozyrag ask my-rag "Who is the vet of the cat?"
  cozyrag ask user/my-rag --top_k 8 < questions.txt
  cozyrag ask my-rag --min_certainty 0.5 "Who is the vet of the cat?"

Left out: retrieval and answering (pipeline.py).
"""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils import logging

from cozyrag.commands.options import at_least
from cozyrag.pipeline import CozyRAG

SHOWN = 160  # characters of a passage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    add("questions", nargs="*", metavar="QUESTION", help="questions in quotes; without any, one per line of stdin")
    add("--top_k", type=at_least(1), metavar="N", help="passages to read (default: as in training)")
    add("--min_certainty", type=float, metavar="P", help='say "I do not know" below this certainty, 0 to 1')


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print each answer with its passages."""
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)  # questions may come after options
    logging.disable_progress_bar()  # "Loading weights" adds nothing to the answer
    pair = CozyRAG.from_pretrained(options.model, min_certainty=options.min_certainty)
    for question in options.questions or (line.strip() for line in sys.stdin if line.strip()):
        answer = pair.answer(question, top_k=options.top_k)
        unsure = answer.score < (options.min_certainty or 0)
        nothing = "I do not know" if unsure else "(no answer in these passages)"
        print(f"{answer.text or nothing}   (certainty {answer.score:.2f})")
        for number, source in enumerate(answer.passages, 1):
            text = source.text if len(source.text) <= SHOWN else f"{source.text[: SHOWN - 3]}..."
            print(f"  [{number}] {source.score:.3f} {source.title or source.id}: {text}")
