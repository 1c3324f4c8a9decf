"""Where the sentences of a text begin and end, and their vectors: texts and vectors must pair up.

Sentences end by rules of punctuation, not by a model: rough on abbreviations, which costs little here. Left out: who
computes the vectors (retriever.py) and what sentences are used for (contexts.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Increase with every change of the sentence rules: sentence vectors are stored, and pair up by position alone.
RULES = 2
Span = tuple[int, int]  # start and end in characters
_STOP, _CLOSING = "[.!?…。！？؟۔।॥]", "[\"')\\]”’»›“」』）]"
_WIDE, _NEXT = "[。！？]", "[^\\s。！？\"')\\]”’」』）]"  # Chinese and Japanese put no space after a sentence
_START = "(?=[\"'(\\[“‘„‚«‹¿¡]*[^\\Wa-z_])"
# Closing marks are in lookbehinds, since the match itself is dropped. Both begin with a space or a newline, to which a
# search jumps: it passes long sentences five times as fast as one that looks behind at every character.
_SPACED = rf"\s(?:(?:(?<={_STOP}\s)|(?<={_STOP}{_CLOSING}\s)|(?<={_STOP}{_CLOSING}{{2}}\s))\s*{_START}|(?<=\n)\n*)"
_ENDS = re.compile(_SPACED), re.compile(rf"{_SPACED}|(?:(?<={_WIDE})|(?<={_WIDE}{_CLOSING}))(?={_NEXT})")


def sentence_spans(text: str) -> list[Span]:
    """Start and end of each sentence in characters; ends are punctuation before a new start and newlines."""
    sentence_end = _ENDS[any(stop in text for stop in _WIDE[1:-1])]
    breaks = [match.span() for match in sentence_end.finditer(text)]
    starts, ends = [0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(text)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if text[start:end].strip()]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [text[start:end] for start, end in sentence_spans(text)]


@dataclass(frozen=True)
class SentenceVectors:
    """Vectors of all sentences of all passages, one after another.

    `vectors`: (n_sentences, dim) float16, L2-normalised, zero for a sentence beyond the retriever's maximum length;
    `ends`: (n_passages,) int64, where the sentences of each passage end.
    """

    vectors: np.ndarray
    ends: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[np.ndarray], dimensions: int) -> "SentenceVectors":
        """From one array (n_sentences of the passage, dim) for each passage."""
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.concatenate([np.zeros((0, dimensions)), *parts]).astype(np.float16), ends)

    def products(self, places: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """(n_places,) float32 dot products of the sentences at these places with a vector (dim,)."""
        import torch  # here: commands that only parse or cut texts do not pay for it

        chosen = torch.from_numpy(self.vectors[places]).float()  # NumPy takes four times as long to widen float16
        return (chosen @ torch.from_numpy(vector)).numpy()

    def nearest(self, rows: np.ndarray, vector: np.ndarray, without: np.ndarray) -> np.ndarray:
        """(n_rows,) the largest dot product of a sentence of each of these passages with a vector (dim,).

        `without` (n_rows,): for passages without sentences.
        """
        places, counts = places_of(self.ends, rows)
        return best_of(self.products(places, vector), counts, without)

    def of(self, rows: Sequence[int]) -> list[np.ndarray]:
        """For each of these passages the vectors of its sentences."""
        return [self.vectors[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]


def places_of(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of the sentences of these passages, one passage after another, and (n_rows,) how many each has.

    `ends`: where the sentences of each passage end, as in SentenceVectors.
    """
    rows = np.asarray(rows, dtype=np.int64)
    starts = np.where(rows > 0, ends[rows - 1], 0)
    counts = ends[rows] - starts
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum()), counts


def best_of(values: np.ndarray, counts: np.ndarray, without: np.ndarray) -> np.ndarray:
    """(n_rows,) the largest of each row's values, which follow one another; `without` (n_rows,) for rows without."""
    best, filled = without.copy(), counts > 0
    if filled.any():
        best[filled] = np.maximum.reduceat(values, (np.cumsum(counts) - counts)[filled])
    return best
