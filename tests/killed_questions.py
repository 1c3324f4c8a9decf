"""`cozyrag questions` with a tiny model, killed at a fixed point: `killed_questions.py "part 2" --from ...`.

"part N" kills after the Nth batch of drafts is on the disk, "file N" before the Nth list of pairs of the result, and ""
never. An untrained model writes no questions, so its words become one; everything else is the command.
"""

import os
import signal
import sys
from dataclasses import replace

import torch

from cozyrag import cli
from cozyrag.synthesis import making, results, writers


class Asking(writers.TrainedWriter):
    """Asks with what its model writes, and reads its own answers."""

    def draft(self, passages, count):
        drafted = super().draft(passages, count)
        made = [
            [replace(each, question=f"What is {each.question[:9]} {passage.id} {row}?") for row, each in enumerate(own)]
            for passage, own in zip(passages, drafted, strict=True)
        ]
        self.known = {each.question: each.answer for own in made for each in own}
        return made

    def read(self, questions, passages):
        return [
            replace(each, answer=self.known[question])
            for each, question in zip(super().read(questions, passages), questions, strict=True)
        ]


def killing(function, number, *, before):
    """The function; its process is killed at its call of this number, 0: never."""
    calls = iter(range(1, sys.maxsize))

    def called(*given, **named):
        own = next(calls)
        if own == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        function(*given, **named)
        if own == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return called


def main():
    torch.set_num_threads(1)
    kind, _, number = sys.argv[1].partition(" ")
    at = int(number or 0)
    writers.TrainedWriter = Asking
    making.write_jsonl = killing(making.write_jsonl, at if kind == "part" else 0, before=False)
    results._write_lines = killing(results._write_lines, at if kind == "file" else 0, before=True)
    cli.entry_point(lambda: cli.run("questions", sys.argv[2:]))


if __name__ == "__main__":
    main()
