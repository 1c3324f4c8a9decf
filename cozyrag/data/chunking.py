"""Cut an article into passages: whole sentences, about so many words each, never across a section.

It exists so that what is searched is about one thing and fits what the models read. Nothing here knows a language: what a
word costs goes by script, where a sentence ends by punctuation. A cut depends on its own section alone, and cuts fall on
the ends of paragraphs where they can, so a small edit moves few of them. Left out: files, ids, duplicates.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from cozyrag.data.sentences import sentence_spans

CLOSE_ENOUGH = 0.75  # share of the wanted words from which the end of a paragraph ends a passage
TAIL = 0.35  # share of the wanted words below which the end of a section joins the passage before it
LONGEST = 1.5  # times the wanted words: a longer sentence is cut at clauses, spaces, or anywhere
HEADING_WORDS = 12  # a shorter line that is a paragraph of its own stays with the paragraph after it

# Scripts without spaces between words. A Chinese word has some 1.6 characters, a Thai one some four.
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_SOUTH_EAST = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_CHARACTERS_A_WORD = {_IDEOGRAPHS: 1.6, _SOUTH_EAST: 4.0}
_CLAUSE_END = re.compile(r"[,;:،؛]\s+|[，；：、]\s*|\s+")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch [start, end) of a text, its words, and whether a paragraph ends with it."""

    start: int
    end: int
    words: float
    closes: bool


def count_words(text: str) -> float:
    """How many words a text has: runs between spaces, and for scripts that write none, characters over the usual length."""
    count = float(len(text.split()))
    if text.isascii():
        return count
    for script, length in _CHARACTERS_A_WORD.items():
        found = script.findall(text)
        if found:
            # A run between spaces that is of such a script has been counted as one word already: take that back.
            count += len(found) / length - sum(script.search(run) is not None for run in text.split())
    return count


def spaced(text: str) -> str:
    """The text with a space on both sides of every character of a script that writes none between words."""
    if text.isascii():
        return text
    for script in _CHARACTERS_A_WORD:
        text = script.sub(r" \g<0> ", text)
    return text


def cut(text: str, *, words: int, overlap: int = 0) -> list[str]:
    """The passages of one section, in order: slices of it, stripped.

    Args:
        words: wanted words of a passage; one ends where the next sentence would overshoot more than stopping undershoots.
        overlap: sentences that a passage repeats from the end of the one before, at most half the wanted words.

    Without overlap the passages, one after another, are the whole text but for the space between them.
    """
    pieces = [part for piece in _sentences(text) for part in _short_enough(text, piece, words * LONGEST)]
    groups = _grouped(pieces, words)
    spans = []
    for start, end in groups:
        shared = _shared(pieces[:start], overlap, words / 2) if start else 0
        spans.append((pieces[start - shared].start, pieces[end - 1].end))
    return [text[start:end].strip() for start, end in spans]


def join_sections(
    sections: Iterable[tuple[tuple[str, ...], str]], *, least: float, most: float
) -> list[tuple[tuple[str, ...], str]]:
    """Sections of fewer than `least` words joined with the one before, up to `most`: a note of many short ones is one text.

    Sections are pairs of heading path and text. What two of them have in common stays their path, the rest of the
    headings moves into the text. A heading without text of its own goes with what follows.
    """
    joined: list[tuple[tuple[str, ...], str]] = []
    held = 0.0
    for path, text in sections:
        words = count_words(text)
        if joined and not joined[-1][1].strip() and path[: len(joined[-1][0])] == joined[-1][0]:
            joined.pop()  # a heading with nothing but further headings below it
        elif joined and min(held, words) < least and held + words <= most:
            before, old = joined.pop()
            shared = len(commonprefix([before, path]))
            path, text = before[:shared], f"{_under(before[shared:], old)}\n{_under(path[shared:], text)}".strip("\n")
            words += held
        joined.append((path, text))
        held = words
    return [(path, text) for path, text in joined if text.strip()]


def _under(headings: Sequence[str], text: str) -> str:
    """A text below those headings that its passage's title will not have; a heading that stands alone stays a line."""
    return "\n".join([*headings, text]).strip("\n")


def _sentences(text: str) -> list[Piece]:
    """The sentences; a short paragraph of one (a heading, as a rule) does not close, so it goes with what follows."""
    spans = sentence_spans(text)
    last = [True] * len(spans)
    for i, ((_, end), (start, _)) in enumerate(zip(spans, spans[1:], strict=False)):
        last[i] = "\n" in text[end:start]
    pieces = []
    for i, (start, end) in enumerate(spans):
        words = count_words(text[start:end])
        alone = i == 0 or last[i - 1]
        pieces.append(Piece(start, end, words, last[i] and not (alone and words < HEADING_WORDS)))
    return pieces


def _short_enough(text: str, piece: Piece, most: float) -> list[Piece]:
    """The sentence itself, or, if it has more words than `most`, parts of it."""
    if piece.words <= most:
        return [piece]
    middle = _middle(text, piece.start, piece.end)
    if not piece.start < middle < piece.end:
        return [piece]
    halves = [
        Piece(piece.start, middle, count_words(text[piece.start : middle]), False),
        Piece(middle, piece.end, count_words(text[middle : piece.end]), piece.closes),
    ]
    return [part for half in halves for part in _short_enough(text, half, most)]


def _middle(text: str, start: int, end: int) -> int:
    """Where to cut a long sentence in two: the end of a clause nearest to its middle, else a space, else between letters."""
    middle, reach = (start + end) // 2, (end - start) // 4
    ends = [match for match in _CLAUSE_END.finditer(text, middle - reach, middle + reach)]
    clauses = [match.end() for match in ends if not match.group()[0].isspace()]
    nearest = min(clauses or [match.end() for match in ends], key=lambda place: abs(place - middle), default=middle)
    while nearest < end and unicodedata.category(text[nearest])[0] == "M":  # a vowel sign stays with its letter
        nearest += 1
    return nearest


def _grouped(pieces: Sequence[Piece], words: int) -> list[tuple[int, int]]:
    """First and last-but-one piece of every passage."""
    groups, start, held = [], 0, 0.0
    for i, piece in enumerate(pieces):
        if i > start and held + piece.words / 2 > words:
            groups.append((start, i))
            start, held = i, 0.0
        held += piece.words
        if piece.closes and held >= words * CLOSE_ENOUGH:
            groups.append((start, i + 1))
            start, held = i + 1, 0.0
    if start < len(pieces):
        short = groups and held < words * TAIL
        groups.append((groups.pop()[0] if short else start, len(pieces)))
    return _headings_follow(groups, pieces)


def _headings_follow(groups: list[tuple[int, int]], pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Move a heading from the end of a passage to the beginning of the next."""
    for i in range(len(groups) - 1):
        (start, end), (_, next_end) = groups[i], groups[i + 1]
        if end - start > 1 and not pieces[end - 1].closes and pieces[end - 2].closes:
            if pieces[end - 1].words < HEADING_WORDS:
                groups[i], groups[i + 1] = (start, end - 1), (end - 1, next_end)
    return groups


def _shared(before: Sequence[Piece], overlap: int, most: float) -> int:
    """How many of the last pieces to repeat."""
    count, words = 0, 0.0
    for piece in reversed(before[-overlap:] if overlap else []):
        words += piece.words
        if words > most:
            break
        count += 1
    return count
