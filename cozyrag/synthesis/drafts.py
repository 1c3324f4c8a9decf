"""What is passed on while questions are made: passages, drafts of pairs, and what a reader answered.

Left out: who writes and reads (writers.py, endpoint.py), what is checked (checks.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_PAIR = re.compile(
    r"question\s*\d*\s*[:：]\s*(?P<question>.+?)\s*answer\s*\d*\s*[:：]\s*(?P<answer>.+?)"
    r"(?=\s*(?:\d+[.)]\s*)?question\s*\d*\s*[:：]|\n|$)",
    re.IGNORECASE | re.DOTALL,
)
_MARKS = str.maketrans("", "", "*`")  # of Markdown, in which chat models write
_AROUND = " \t\n.,;:\"'“”‘’«»"


@dataclass(frozen=True)
class Passage:
    """A passage to ask about."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Draft:
    """A question and its answer as they were written. score: the writer's confidence, 0 to 1; None: it has none.

    A question is "" if nobody was asked to write it, since the answer alone is a fault.
    """

    question: str
    answer: str
    score: float | None = None


@dataclass(frozen=True)
class Reading:
    """What a reader answers to a question with its passage. score: its confidence, 0 to 1; None: it has none."""

    answer: str
    score: float | None = None


class Reader(Protocol):
    """Answers questions, each from one passage. `fingerprint` changes with anything that its answers depend on."""

    name: str
    fingerprint: str

    def read(self, questions: Sequence[str], passages: Sequence[Passage]) -> list[Reading]:
        """The answer to each question."""


class Writer(Reader, Protocol):
    """Writes questions too."""

    def draft(self, passages: Sequence[Passage], count: int) -> list[list[Draft]]:
        """At most `count` pairs for each passage."""


def parse_pairs(text: str, passage: str) -> list[tuple[str, str]]:
    """The pairs in lines `Question: ...` and `Answer: ...`, whatever stands around them; a half pair is left out."""
    found = _PAIR.finditer(text.translate(_MARKS))
    return [(" ".join(each["question"].split()), tidy(each["answer"], passage)) for each in found]


def tidy(answer: str, passage: str) -> str:
    """The answer on one line; without quotes and full stop around it, unless they stand in the passage too."""
    line = " ".join(answer.split())
    return line if line and line in passage else line.strip(_AROUND)
