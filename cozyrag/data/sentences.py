"""Where the sentences of a text begin and end, and the vectors of sentences: texts and vectors must pair up.

Sentences end by rules of punctuation, not by a model: rough on abbreviations, which costs little here. Left out: who
makes the vectors (retriever.py) and what sentences are for (contexts.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Count up with every change of what a sentence is: vectors of sentences are kept, and pair up by their place alone.
RULES = 1
Span = tuple[int, int]  # start and end in characters
_STOP, _CLOSING = "[.!?。！？؟۔।॥]", "[\"')\\]”’」』）]"
_WIDE, _GOES_ON = "[。！？]", "[^\\s。！？\"')\\]”’」』）]"  # Chinese and Japanese put no space after a sentence
SENTENCE_END = re.compile(  # closing marks are looked back at, not matched: what is matched is lost
    rf"(?:(?<={_STOP})|(?<={_STOP}{_CLOSING})|(?<={_STOP}{_CLOSING}{{2}}))\s+(?=[\"'(\[“‘]*[^\Wa-z_])|\n+"
    rf"|(?:(?<={_WIDE})|(?<={_WIDE}{_CLOSING}))(?={_GOES_ON})"
)


def sentence_spans(text: str) -> list[Span]:
    """Start and end, in characters, of each sentence: closing punctuation before a new start, or a line break, ends one."""
    breaks = [match.span() for match in SENTENCE_END.finditer(text)]
    starts, ends = [0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(text)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if text[start:end].strip()]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [text[start:end] for start, end in sentence_spans(text)]


@dataclass(frozen=True)
class SentenceVectors:
    """Vectors of all sentences of all passages, one after another.

    `vectors`: (n_sentences, dim) float16, L2-normalised, zero for a sentence beyond what the retriever reads;
    `ends`: (n_passages,) int64, where the sentences of each passage end.
    """

    vectors: np.ndarray
    ends: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[np.ndarray], dimensions: int) -> "SentenceVectors":
        """From one array (n_sentences of that passage, dim) for each passage."""
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.concatenate([np.zeros((0, dimensions)), *parts]).astype(np.float16), ends)

    def products(self, places: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """(n_places,) float32 products of the sentences at these places with a vector (dim,)."""
        some = torch.from_numpy(self.vectors[places]).float()  # NumPy takes four times as long to widen half precision
        return (some @ torch.from_numpy(vector)).numpy()

    def of(self, rows: Sequence[int]) -> list[np.ndarray]:
        """For each of these passages the vectors of its sentences."""
        return [self.vectors[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]


def places_of(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of all parts of some wholes, one whole after another, and (n_rows,) how many parts each has.

    `ends`: where the parts of each whole end, as in SentenceVectors.
    """
    rows = np.asarray(rows, dtype=np.int64)
    starts = np.where(rows > 0, ends[rows - 1], 0)
    counts = ends[rows] - starts
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum()), counts


def best_of(values: np.ndarray, counts: np.ndarray, without: np.ndarray) -> np.ndarray:
    """(n_rows,) the largest of each row's values, which stand one row after another; `without` (n_rows,) for a row that has none."""
    best, some = without.copy(), counts > 0
    if some.any():
        best[some] = np.maximum.reduceat(values, (np.cumsum(counts) - counts)[some])
    return best
