"""Answer questions with a trained pair. Each answer is printed with its certainty and the passages it comes from, with
their search scores, their address if the file of passages has one (url), and the sentences that were read. Without a
question, in a terminal, it asks for them.

The certainty, 0 to 1, is the estimated probability that the answer is right if the run had enough validation questions
to calibrate it, else the geometric mean of the probabilities of its tokens.

examples:
  cozyrag ask my-rag "Who is the vet of the cat?"
  cozyrag ask user/my-rag --top_k 8 < questions.txt
  cozyrag ask my-rag --min_certainty 0.5 "Who is the vet of the cat?"
  cozyrag ask my-rag

Left out: retrieval and answering (pipeline.py).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cozyrag.commands.options import at_least
from cozyrag.errors import InputError
from cozyrag.runtime.signals import Interrupts
from cozyrag.runtime.terminal import one_line, say

if TYPE_CHECKING:
    from cozyrag.pipeline import Answer, Source

SHOWN = 320  # characters of a passage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("model", metavar="OUTPUT", help="output folder of a run, or user/name on the Hub")
    add("questions", nargs="*", metavar="QUESTION", help="questions in quotes; without any, one a line")
    add("--top_k", type=at_least(1), metavar="N", help="passages to read (default: as in training)")
    add("--min_certainty", type=float, metavar="P", help='say "I do not know" below this certainty, 0 to 1')


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Print each answer with its passages."""
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)  # questions may come after options
    from transformers.utils import logging  # torch: only once the options are correct

    from cozyrag.pipeline import CozyRAG

    logging.disable_progress_bar()  # "Loading weights" adds nothing to the answer
    with Interrupts().watched():
        pair = CozyRAG.from_pretrained(options.model, min_certainty=options.min_certainty)
        in_terminal = not options.questions and sys.stdin.isatty()
        for question in options.questions or (_typed() if in_terminal else _lines()):
            try:
                say(shown(pair.answer(question, top_k=options.top_k), options.min_certainty))
            except InputError as error:
                if not in_terminal:
                    raise
                say(one_line(error))  # whoever types can type another


def _lines() -> Iterator[str]:
    return (line.strip() for line in sys.stdin if line.strip())


def _typed() -> Iterator[str]:
    """Questions that are typed, until an empty line or the end of the input (Ctrl-D)."""
    say("Type a question; an empty line ends.")
    try:
        while question := input("> ").strip():
            yield question
    except EOFError:
        say("")


def shown(answer: "Answer", min_certainty: float | None = None) -> str:
    """An answer and its passages as lines: of each, the sentences that were read, else its beginning in brackets."""
    unsure = answer.score < (min_certainty or 0)
    nothing = "I do not know" if unsure else "(no answer in these passages)"
    lines = [f"{one_line(answer.text) or nothing}   (certainty {answer.score:.2f})"]
    for number, source in enumerate(answer.passages, 1):
        found = (source.metadata.get("url") or source.metadata.get("source"), source.page)
        place = ", ".join(str(each) for each in found if each)
        name = one_line(f"{source.title or source.id}{f' <{place}>' if place else ''}")
        lines.append(f"  [{number}] {source.score:.3f} {name}: {one_line(_excerpt(source))}")
    return "\n".join(lines)


def _excerpt(source: "Source") -> str:
    """What was read of a passage; "..." stands for what was not."""
    if not source.used:
        return f"(not read) {_cut(source.text, SHOWN // 4)}"
    gaps = (source.used[0][0] > 0, source.used[-1][1] < len(source.text.rstrip()))
    return f"{'... ' * gaps[0]}{_cut(' ... '.join(_runs(source)), SHOWN)}{' ...' * gaps[1]}"


def _runs(source: "Source") -> list[str]:
    """The sentences that were read, those that follow one another together."""
    runs = [list(source.used[0])]
    for start, end in source.used[1:]:
        if source.text[runs[-1][1] : start].strip():
            runs.append([start, end])
        else:
            runs[-1][1] = end
    return [source.text[start:end] for start, end in runs]


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
