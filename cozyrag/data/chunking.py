"""Split an article into passages of whole sentences with a target number of words, never across a section.

Nothing depends on a language: the weight of a word follows the script, the end of a sentence the punctuation. A cut
depends on its own section alone and prefers ends of paragraphs, so a small edit moves few cuts. Left out: files, ids,
duplicates.
"""

import re
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, takewhile, zip_longest
from os.path import commonprefix
from typing import NamedTuple

from cozyrag.data.sentences import Span, sentence_spans

CLOSE_ENOUGH = 0.75  # share of the target from which the end of a paragraph ends a passage
TAIL = 0.35  # share of the target below which the end of a section joins the passage before it
LONGEST = 1.5  # multiple of the target above which a sentence is cut at a clause, at a space, or anywhere
LONGEST_WORD = 1000  # characters; longer runs of ASCII without a space are data such as pictures in base64
HEADING_WORDS = 12  # a shorter line that is a paragraph of its own stays with the paragraph after it

# Scripts without spaces between words. A Chinese word has about 1.6 characters, a Thai word about four.
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_SOUTH_EAST = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_CHARACTERS_A_WORD = {_IDEOGRAPHS: 1.6, _SOUTH_EAST: 4.0}
LATIN_WORD = 6.0  # characters, with the space after it
_ENDS = re.compile(r"[,;:،؛]\s+|[，；：、]\s*"), re.compile(r"\s+")  # of clauses, of words
_RUN = re.compile(r"\S++")
Section = tuple[tuple[str, ...], str]  # heading path and text


class Piece(NamedTuple):
    """A stretch [start, end) of a text, its words, and whether a paragraph ends with it."""

    start: int
    end: int
    words: float
    closes: bool


def count_words(text: str) -> float:
    """The number of words: runs between spaces; in scripts without spaces, characters over the usual word length."""
    count = float(len(text.split()))
    if text.isascii():
        return count
    for script, length in _CHARACTERS_A_WORD.items():
        found = script.findall(text)
        if found:
            # Each run between spaces with characters of the script has been counted as one word already.
            count += len(found) / length - sum(script.search(run) is not None for run in text.split())
    return count


def latin_length(text: str) -> float:
    """The characters of a text, where those of a script without spaces count as many as its words have in English."""
    if text.isascii():
        return len(text)
    more = (len(script.findall(text)) * (LATIN_WORD / own - 1) for script, own in _CHARACTERS_A_WORD.items())
    return len(text) + sum(more)


def without_long_words(text: str) -> tuple[str, int]:
    """The text without runs that are no words of any language, and their number."""
    found = 0

    def kept(run: re.Match) -> str:
        nonlocal found
        is_word = len(run[0]) <= LONGEST_WORD or len(run[0].encode()) >= 1.1 * len(run[0])
        found += not is_word
        return run[0] if is_word else ""

    return _RUN.sub(kept, text), found


def cut(text: str, *, words: int, overlap: int = 0) -> list[str]:
    """The passages of one section, in order: its slices of `cut_spans`, stripped."""
    return [text[start:end].strip() for start, end in cut_spans(text, words=words, overlap=overlap)]


def cut_spans(text: str, *, words: int, overlap: int = 0) -> list[Span]:
    """Start and end of the passages of one section, in order.

    words: target of a passage, which ends where another sentence would overshoot more than stopping undershoots.
    overlap: sentences that a passage repeats from the end of the one before, at most half the target. Without overlap
        the concatenated passages are the whole text except for the space between them.
    """
    pieces = [part for piece in _sentences(text) for part in _split_long(text, piece, words * LONGEST)]
    spans = []
    for start, end in _grouped(pieces, words):
        before = accumulate(piece.words for piece in reversed(pieces[max(start - overlap, 0) : start]))
        repeated = len(list(takewhile(lambda total: total <= words / 2, before)))
        spans.append((pieces[start - repeated].start, pieces[end - 1].end))
    return spans


def join_sections(sections: Iterable[Section], *, least: float, most: float) -> list[Section]:
    """Join sections of fewer than `least` words with the one before, up to `most`: many short notes become one text.

    The common part of two heading paths stays the path, the other headings move into the text. A heading without text
    goes with what follows.
    """
    joined: list[Section] = []
    held = 0.0
    for path, text in sections:
        words = count_words(text)
        if joined and not joined[-1][1].strip() and path[: len(joined[-1][0])] == joined[-1][0]:
            joined.pop()  # a heading with nothing but further headings below it
        elif joined and min(held, words) < least and held + words <= most:
            before, old = joined.pop()
            shared = len(commonprefix([before, path]))
            text = "\n".join([_under(before[shared:], old), _under(path[shared:], text)]).strip("\n")
            path = before[:shared]
            words += held
        joined.append((path, text))
        held = words
    return [(path, text) for path, text in joined if text.strip()]


def _under(headings: Sequence[str], text: str) -> str:
    """A text below the headings that are not in its passage's title."""
    return "\n".join([*headings, text]).strip("\n")


def _sentences(text: str) -> list[Piece]:
    """The sentences; a short paragraph of one (usually a heading) does not close, so it goes with what follows."""
    spans = sentence_spans(text)
    pieces, opens = [], True
    for (start, end), following in zip_longest(spans, spans[1:]):
        last = following is None or "\n" in text[end : following[0]]
        words = count_words(text[start:end])
        pieces.append(Piece(start, end, words, last and not (opens and words < HEADING_WORDS)))
        opens = last
    return pieces


def _split_long(text: str, piece: Piece, most: float) -> list[Piece]:
    """The sentence itself, or its parts if it has more than `most` words."""
    if piece.words <= most:
        return [piece]
    # Found once for all parts, for a sentence may have millions of words.
    ends = [array("q", (found.end() for found in end.finditer(text, piece.start, piece.end))) for end in _ENDS]
    return list(_parts(text, piece, most, ends))


def _parts(text: str, piece: Piece, most: float, ends: Sequence[Sequence[int]]) -> Iterator[Piece]:
    middle = _middle(text, piece.start, piece.end, ends) if piece.words > most else piece.end
    if not piece.start < middle < piece.end:
        yield piece
        return
    for start, end, closes in ((piece.start, middle, False), (middle, piece.end, piece.closes)):
        yield from _parts(text, Piece(start, end, _words_to(most, text, start, end), closes), most, ends)


def _words_to(most: float, text: str, start: int, end: int) -> float:
    """The words of a part; of one whose beginning has more than `most`, and which is split again, of its beginning."""
    first = start + round(most * LATIN_WORD * 2)
    words = count_words(text[start : min(first, end)])
    return words if first >= end or words > most + 1 else count_words(text[start:end])


def _middle(text: str, start: int, end: int, ends: Sequence[Sequence[int]]) -> int:
    """Where to split a long sentence: the end of a clause nearest to its middle, else a space, else between letters."""
    middle, reach = (start + end) // 2, (end - start) // 4
    nearest = middle
    for places in ends:
        at = bisect_left(places, middle)
        near = [place for place in places[max(at - 1, 0) : at + 1] if middle - reach < place <= middle + reach]
        if near:
            nearest = min(near, key=lambda place: abs(place - middle))
            break
    while nearest < end and unicodedata.category(text[nearest])[0] == "M":  # a vowel sign stays with its letter
        nearest += 1
    return nearest


def _grouped(pieces: Sequence[Piece], words: int) -> list[tuple[int, int]]:
    """The range of pieces [start, end) of every passage."""
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
    for i, (_, next_end) in enumerate(groups[1:]):
        start, end = groups[i]
        last = pieces[end - 1]
        if end - start > 1 and not last.closes and pieces[end - 2].closes and last.words < HEADING_WORDS:
            groups[i], groups[i + 1] = (start, end - 1), (end - 1, next_end)
    return groups
