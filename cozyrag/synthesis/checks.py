"""What a pair of question and answer must pass before anybody learns from it: each check a function of its own.

The first check that fails is the reason of a rejection, and summaries count reasons. Words for the text itself ("the
passage") are known in English only. Left out: asking models (writers.py), the order of work (making.py).
"""

import re
from collections.abc import Sequence

import numpy as np

from cozyrag.data.chunking import count_words
from cozyrag.data.deduplication import near_repeats, repeats, signatures, text_hash
from cozyrag.data.matching import comparable, contains_answer, fold, matching_form
from cozyrag.data.sentences import split_sentences
from cozyrag.evaluation.metrics import f1
from cozyrag.retrieval.bm25 import LexicalIndex
from cozyrag.synthesis.drafts import Draft, Passage, Reading

# In the order of the checks, with what summaries and pages say.
REASONS = {
    "repeats_title": "the answer has no word that the title has not",
    "empty": "no question or no answer was written",
    "answer_not_in_passage": "the answer does not stand in the passage",
    "no_question": "it does not end with a question mark",
    "unfinished": "it breaks off before its question mark, or has a gap",
    "several_questions": "it is more than one question",
    "length": "the question is too short or too long, or the answer is",
    "whole_sentence": "the answer holds a whole sentence of the passage",
    "names_the_passage": 'the question speaks of "the passage", "the text" or the like',
    "gives_the_answer_away": "the question contains its answer",
    "read_differently": "a reader with the passage answers something else",
    "repeated": "nearly the same as an earlier question",
    "not_found": "the search does not find the passage",
}
QUESTION_WORDS = 3, 40  # of a question, at least and at most
ANSWER_WORDS = 20  # at most
SENTENCE_WORDS = 5  # from which a sentence is too long to be an answer
ALIKE = 0.8  # share of common runs of characters from which two questions about a passage are the same
_QUESTION_MARKS = ("?", "？", "؟", "՞", ";", "？」", "?”", '?"')
_END = "?？؟ \"'”’»)"
_GOES_ON = re.compile(r"[?؟]\s+[^\W_]|？\s*[^\W_]")
_GAP = re.compile(r"_{2,}|(?:\.\.\.|…)\W*$")
_OPEN_ENDS = frozenset(("a", "an", "the", "and", "or", "but", "because", "if", "than", "whose"))
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
_NAMES_IT = re.compile(
    r"\b(?:(?:the|this|that|above|given|following)\s+(?:\w+\s+)?"
    r"(?:passage|text|article|context|paragraph|excerpt|document|snippet|sentence)s?\b(?!\s+of\b)"
    r"|(?:mentioned|described|discussed|listed|stated|given)\s+(?:above|below|here)\b"
    r"|according\s+to\s+(?:the|this)\s+(?:author|writer|section|information|story)\b(?!\s+of\b))",
    re.IGNORECASE,
)


def fault_of(draft: Draft, passage: Passage) -> str | None:
    """The first reason against a pair that no model and no other pair is needed for; None: there is none."""
    return next(iter(faults_of(draft, passage)), None)


def faults_of(draft: Draft, passage: Passage) -> list[str]:
    """All reasons against a pair that no model and no other pair is needed for."""
    faults = {
        "repeats_title": repeats_title(draft.answer, passage.title),
        "empty": not comparable(draft.question) or not comparable(draft.answer),
        "answer_not_in_passage": not stands_in(draft.answer, passage.text),
        "no_question": not is_question(draft.question),
        "unfinished": is_unfinished(draft.question),
        "several_questions": is_several(draft.question),
        "length": not has_sensible_length(draft),
        "whole_sentence": is_sentence(draft.answer, passage.text),
        "names_the_passage": names_the_passage(draft.question),
        "gives_the_answer_away": gives_away(draft.answer, draft.question),
    }
    return [reason for reason, found in faults.items() if found]


def stands_in(answer: str, text: str) -> bool:
    """Whether the answer occurs in a text as whole words."""
    return contains_answer(matching_form(text), [answer])


def repeats_title(answer: str, title: str) -> bool:
    """Whether all words of an answer stand in the title of its passage, which makes its question a trivial one."""
    own = comparable(answer).split()
    return bool(own) and set(own) <= set(comparable(title).split())


def is_sentence(answer: str, text: str) -> bool:
    """Whether an answer holds a whole sentence of the text, unless that is a short one."""
    own = f" {comparable(answer)} "
    return any(
        f" {comparable(sentence)} " in own
        for sentence in split_sentences(text)
        if count_words(sentence) >= SENTENCE_WORDS
    )


def gives_away(answer: str, question: str) -> bool:
    """Whether all words of an answer stand in its question, in any order."""
    return stands_in(answer, question) or set(comparable(answer).split()) <= set(comparable(question).split())


def is_unfinished(question: str) -> bool:
    """Whether a question ends with a word that needs another one, with dots, or has a gap or an open quote."""
    words = fold(question).rstrip(_END).split()
    return bool(words) and (
        words[-1] in _OPEN_ENDS or _GAP.search(question) is not None or question.count('"') % 2 == 1
    )


def is_several(question: str) -> bool:
    """Whether another text follows a question mark that does not close a quoted name."""
    return _GOES_ON.search(question) is not None


def is_question(text: str) -> bool:
    """Whether a text ends with a question mark."""
    return text.endswith(_QUESTION_MARKS)


def has_sensible_length(draft: Draft) -> bool:
    """Whether question and answer have a number of words that people use."""
    least, most = QUESTION_WORDS
    return least <= count_words(draft.question) <= most and count_words(draft.answer) <= ANSWER_WORDS


def names_the_passage(question: str) -> bool:
    """Whether a question speaks of the text itself, which somebody who asks has not seen."""
    return _NAMES_IT.search(question) is not None


def agreement(draft: Draft, reading: Reading) -> float:
    """F1 of what the reader answered against the answer of the draft; 0 if their numbers contradict each other.

    "May 3, 1909" and "May 4, 1909" share two words of three, and are two answers.
    """
    read, written = (set(_DIGITS.findall(comparable(each.answer))) for each in (reading, draft))
    if not (read <= written or written <= read):
        return 0.0
    return f1(reading.answer, [draft.answer])


def repeated(questions: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """(n,) bool: which questions equal an earlier one, or nearly equal an earlier one about the same passage.

    "When was A built?" and "When was B built?" are nearly equal and two good questions, if they are about two passages.
    """
    found = repeats(np.array([text_hash(comparable(question)) for question in questions], dtype=np.uint64))
    signs = signatures(questions)
    places: dict[str, list[int]] = {}
    for place, passage in enumerate(passages):
        places.setdefault(passage, []).append(place)
    for own in places.values():
        found[own] |= near_repeats(signs[own], ALIKE)
    return found


def ranks(questions: Sequence[str], rows: Sequence[int], passages: Sequence[Passage], k: int) -> list[int | None]:
    """The rank, from 1, of the passage of each question in a search by words (BM25); None: not among the first k.

    Args:
        rows: of the passage of each question among the passages.
    """
    if not questions:
        return []
    index = LexicalIndex([f"{passage.title}\n{passage.text}" for passage in passages])
    _, found = index.search(questions, k)
    places = [np.flatnonzero(own == row) for own, row in zip(found, rows, strict=True)]
    return [int(place[0]) + 1 if len(place) else None for place in places]


def score_of(draft: Draft, reading: Reading | None, rank: int) -> float:
    """How much speaks for a pair that passed, 0 to 1: the mean of what is known of it.

    Known are the agreement of the reader, the confidence of writer and reader where they have one, and the reciprocal
    rank of the passage. It sorts pairs; it is no probability.
    """
    known = [1 / rank, draft.score, *([agreement(draft, reading), reading.score] if reading else [])]
    values = [value for value in known if value is not None]
    return round(sum(values) / len(values), 4)
