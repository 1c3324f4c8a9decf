"""Spans of a passage that a question may ask for: dates, numbers, names and short phrases, without a model.

A writer that only completes texts is given an answer and asked for its question, so the answer always stands in the
passage. Names are found by capital letters. Phrases are the words between two function words ("owners" and "vintage
jukeboxes" in "for owners of vintage jukeboxes"); function words are known in English only. In other texts in which
nothing is found, as in scripts without capitals, short clauses take their place. Left out: which of them are good
answers, which the checks decide.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import regex

from cozyrag.data.chunking import count_words
from cozyrag.data.matching import comparable
from cozyrag.data.sentences import sentence_spans
from cozyrag.synthesis.checks import repeats_title

Span = tuple[str, str]  # with its sentence

_FUNCTION_WORDS = frozenset(
    """a about above across after against all along also although am among an and another any are around as at be
    because been before being below between both but by can could despite did do does during each either every few for
    from had has have he her here him his how however i if in into is it its itself many may might more most much must
    my near neither no nor not of off often on once one only onto or other our out over own per she should since so some
    such than that the their them themselves then there these they this those though through thus to too toward towards
    under until up upon us very was we were what when where whether which while who whom whose why will with within
    without would yet you your""".split()
)
_WORD = r"(?:(?:\p{Lu}\.\s?)+(?=\p{Lu}\p{Ll}))?\p{Lu}[\p{L}\p{M}\p{N}]*(?:[-–'’.&]\p{L}[\p{L}\p{M}\p{N}]*)*"
_LINK = r"(?:of(?:\sthe)?|de|del|di|da|du|la|le|von|van|der|den|&)"
_DIGITS = r"\p{Nd}+(?:[.,:]\p{Nd}+)*"
_NAME = rf"(?:\p{{Nd}}{{1,2}}\s)?{_WORD}(?:\s(?:{_LINK}\s){{0,2}}(?:{_WORD}|{_DIGITS}))*(?:,\s\p{{Nd}}{{4}}\b)?"
_YEARS = r"\p{Nd}{3,4}(?:s\b|\s(?:BCE?|CE|AD)\b|[-–]\p{Nd}{2,4}\b)|\p{Nd}+(?:st|nd|rd|th)\b(?:\scentur(?:y|ies))?"
_COUNT = r"hundred|thousand|million|billion"
_SPELLED = rf"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|{_COUNT})\b"
_NO_UNIT = "|".join(sorted(word for word in _FUNCTION_WORDS if word.endswith("s")))  # in "in 2003 was"
_UNIT = rf"(?:\s?%|\s(?:per cent|percent|(?!(?:{_NO_UNIT})\b)\p{{Ll}}{{2,}}s\b))?"
_SPAN = regex.compile(rf"{_YEARS}|{_NAME}|(?:[$€£¥]?{_DIGITS}|{_SPELLED})(?:\s(?:{_COUNT})\b)?{_UNIT}")
_CLAUSE = regex.compile(r"[^\s,;:()、，；：。！？!?.\"“”][^,;:()、，；：。！？!?.\n\"“”]*")
_PHRASE_WORD = regex.compile(r"[$€£¥]?[\p{L}\p{M}\p{N}]+(?:[-–'’.,&][\p{L}\p{M}\p{N}]+)*%?")
_INITIAL = regex.compile(r"\b\p{Lu}\.$")
_OPENING = " \t\"'“‘„«(["
LONGEST = 8  # words of a clause
LONGEST_PHRASE = 3  # words of a phrase
_NO_NOUN = ("ed", "ly")  # endings of verbs and adverbs, with which no phrase ends
ENGLISH = 0.2  # share of function words from which a text is taken for English
_SIDES = {"north", "south", "east", "west"}  # begin a sentence with a capital and no name too


def propose(text: str, count: int | None, seed: str, *, title: str = "") -> tuple[list[Span], list[str]]:
    """At most `count` different spans, each with its sentence, and the spans left out since they repeat the title.

    Spans are drawn with the seed and stand in the text's order: numbers, dates and names of several words before names
    of one word, and these before phrases. Of a kind, no sentence gives a second span before every sentence that has one
    has given one. count: None: all.
    """
    found = candidates(text)
    repeating = [span for span, _ in found if repeats_title(span, title)]
    found = [each for each in found if each[0] not in repeating]
    return _drawn(found, len(found) if count is None else count, seed), repeating


def candidates(text: str) -> list[Span]:
    """All different spans of the text, each with its sentence: of each sentence names and numbers, then phrases."""
    sentences = _sentences(text)
    phrases = _phrases if _is_english(text) else lambda sentence: iter(())
    found = [
        (span, sentence)
        for sentence in sentences
        for names in [list(_names(sentence))]
        for span in [*names, *_outside(phrases(sentence), names)]
    ]
    clauses = ((span, sentence) for sentence in sentences for span in _clauses(sentence))
    return _different(found) or _different(clauses)


def _sentences(text: str) -> list[str]:
    """The sentences, each on one line; one that ends with an initial goes on in the next."""
    joined = list[str]()
    for start, end in sentence_spans(text):
        own = " ".join(text[start:end].split())
        if joined and _INITIAL.search(joined[-1]):
            joined[-1] += f" {own}"
        else:
            joined.append(own)
    return joined


def _drawn(found: Sequence[Span], count: int, seed: str) -> list[Span]:
    """The best kinds of spans first, and of a kind each sentence once before any sentence twice."""
    order, given = random.Random(seed).sample(range(len(found)), len(found)), Counter[tuple[int, str]]()
    ranks = dict[int, tuple[int, int]]()  # kind, and how many of this kind its sentence has given before
    for place in order:
        span, sentence = found[place]
        kind = _kind(span)
        ranks[place] = kind, given[kind, sentence]
        given[kind, sentence] += 1
    return [found[place] for place in sorted(sorted(order, key=ranks.__getitem__)[:count])]


def _kind(span: str) -> int:
    """0: a number, or a name of several words; 1: a name of one word; 2: a phrase. People choose them in this order."""
    if not _SPAN.fullmatch(span):
        return 2
    return int(span[0].isupper() and " " not in span and not any(map(str.isdigit, span)))


def _outside(phrases: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    """The phrases that are no part of a name."""
    own = [f" {name} " for name in names]
    return (phrase for phrase in phrases if not any(f" {phrase} " in name for name in own))


def _different(spans: Iterable[Span]) -> list[Span]:
    first: dict[str, Span] = {}
    for span, sentence in spans:
        first.setdefault(comparable(span), (span, sentence))
    return [each for key, each in first.items() if key]


def _is_english(text: str) -> bool:
    words = text.lower().split()
    return sum(word in _FUNCTION_WORDS for word in words) > ENGLISH * len(words)


def _clauses(sentence: str) -> Iterator[str]:
    for match in _CLAUSE.finditer(sentence):
        if count_words(match[0]) <= LONGEST:
            yield match[0].strip()


def _names(sentence: str) -> Iterator[str]:
    """Runs of capitalised words, and numbers; the first word of the sentence counts only in a longer run."""
    start = len(sentence) - len(sentence.lstrip(_OPENING))
    for match in _SPAN.finditer(sentence):
        span = regex.sub("['’]s$", "", match[0].rstrip(".-"))
        first, _, rest = span.partition(" ")
        if match.start() != start or first[:1].isdigit():
            yield span
        elif first.lower() in _FUNCTION_WORDS | _SIDES:
            yield from (again[0] for again in _SPAN.finditer(rest))
        elif rest:
            yield span


def _phrases(sentence: str) -> Iterator[str]:
    """Runs of at most LONGEST_PHRASE words without function words and punctuation between them."""
    run, end = list[str](), 0
    for match in _PHRASE_WORD.finditer(sentence):
        goes_on = sentence[end : match.start()].isspace()
        if run and (not goes_on or match[0].lower() in _FUNCTION_WORDS):
            yield from _phrase(run)
            run = []
        if match[0].lower() not in _FUNCTION_WORDS:
            run.append(match[0])
        end = match.end()
    yield from _phrase(run)


def _phrase(run: list[str]) -> Iterator[str]:
    if 0 < len(run) <= LONGEST_PHRASE and not run[-1].endswith(_NO_NOUN):
        yield regex.sub("['’]s$", "", " ".join(run))
