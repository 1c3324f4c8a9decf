"""Spans of a passage that a question may ask for: names, numbers and dates, without a model.

A writer that only completes texts is given an answer and asked for its question, so the answer always stands in the
passage. Names are found by capital letters; in a script without them, and where there are none, short clauses take
their place. Left out: which of them are good answers, which the checks decide.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator

import regex

from cozyrag.data.chunking import count_words
from cozyrag.data.matching import comparable
from cozyrag.data.sentences import sentence_spans

_WORD = r"\p{Lu}[\p{L}\p{M}\p{N}]*(?:[-'’.]\p{L}[\p{L}\p{M}\p{N}]*)*"
_NUMBER = r"\p{Nd}+(?:[.,:]\p{Nd}+)*"
_LINK = r"(?:of(?:\sthe)?|de|del|di|da|du|la|le|von|van|der|den)"
_UNIT = r"(?:\s(?:hundred|thousand|million|billion))?(?:\s?%|\s(?:per cent|percent|\p{Ll}{2,}s\b))?"
_SPAN = regex.compile(
    rf"(?:\p{{Nd}}{{1,2}}\s)?{_WORD}(?:\s(?:{_LINK}\s){{0,2}}(?:{_WORD}|{_NUMBER}))*|{_NUMBER}{_UNIT}"
)
_CLAUSE = regex.compile(r"[^\s,;:()、，；：。！？!?.\"“”][^,;:()、，；：。！？!?.\n\"“”]*")
_OPENING = " \t\"'“‘„«(["
LONGEST = 8  # words of a clause
# Words that begin a sentence with a capital letter and no name.
_OPENERS = frozenset(
    """a after all although an and as at before both but by during each every for from he her here his how i if in into
    it its many most no north not on one only our over she since so some south such than that the their then there these
    they this those though through to two under until up we what when where which while who why with you""".split()
)


def propose(text: str, count: int, seed: str) -> list[tuple[str, str]]:
    """At most `count` different spans of the text, each with its sentence; drawn with the seed, in the text's order.

    A sentence gives a second span only when every sentence that has one has given one.
    """
    sentences = [" ".join(text[start:end].split()) for start, end in sentence_spans(text)]
    found = _different((span, sentence) for sentence in sentences for span in _names(sentence))
    found = found or _different((span, sentence) for sentence in sentences for span in _clauses(sentence))
    order, given = random.Random(seed).sample(range(len(found)), len(found)), Counter[str]()
    turns = dict[int, int]()  # how many spans of its sentence come before one
    for place in order:
        turns[place] = given[found[place][1]]
        given[found[place][1]] += 1
    drawn = sorted(order, key=turns.__getitem__)[:count]
    return [found[place] for place in sorted(drawn)]


def _different(spans: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    first: dict[str, tuple[str, str]] = {}
    for span, sentence in spans:
        first.setdefault(comparable(span), (span, sentence))
    return [each for key, each in first.items() if key]


def _clauses(sentence: str) -> Iterator[str]:
    for match in _CLAUSE.finditer(sentence):
        if count_words(match[0]) <= LONGEST:
            yield match[0].strip()


def _names(sentence: str) -> Iterator[str]:
    """Runs of capitalised words and numbers; the first word of the sentence counts only in a longer run."""
    start = len(sentence) - len(sentence.lstrip(_OPENING))
    for match in _SPAN.finditer(sentence):
        span = regex.sub("['’]s$", "", match[0].rstrip(".-"))
        first, _, rest = span.partition(" ")
        if match.start() != start or first[:1].isdigit():
            yield span
        elif first.lower() in _OPENERS:
            yield from (again[0] for again in _SPAN.finditer(rest))
        elif rest:
            yield span
