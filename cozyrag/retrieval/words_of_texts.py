"""Sparse search in which an engine proposes passages and their texts, read again, decide.

BM25 and the words shared with sentences have the formulas of bm25.py. Left out: tables in memory (bm25.py), and the
engines (words_on_disk.py, lance_index.py).
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from cozyrag.data.sentences import split_sentences
from cozyrag.retrieval.bm25 import K1, B, stemmed_words
from cozyrag.retrieval.faiss_index import SPARE, best, stacked

KEPT = 2048  # passages whose words stay in memory, some 10 KB each


@dataclass(frozen=True)
class PassageWords:
    """The words of a passage: how often each occurs, how many there are, and those of each sentence."""

    counts: Counter[str]
    length: int
    sentences: list[frozenset[str]]


class WordsOfTexts(ABC):
    """What `LexicalIndex` and `SentenceWords` do together, with a memory that does not grow with the passages.

    Scores differ from theirs by rounding only, except in scripts without spaces, where pairs of characters end with
    their sentence.

    Args:
        count: of the passages. mean_length: words of a passage on average, at least 1. stemmer: see `LexicalIndex`.
    """

    nbytes = 0  # in memory

    def __init__(self, count: int, mean_length: float, *, stemmer: str):
        self._count, self._mean_length = count, mean_length
        self._words = stemmed_words(stemmer)
        self.read = lru_cache(KEPT)(self._read)

    @abstractmethod
    def _proposed(self, words: list[str], limit: int) -> np.ndarray:
        """Rows (m,) of about `limit` passages that score best for these words; fewer if fewer have any of them."""

    @abstractmethod
    def _holders(self, word: str) -> int:
        """The number of passages with this word."""

    @abstractmethod
    def _text(self, row: int) -> tuple[str, str]:
        """The title and the text of a passage."""

    def __len__(self) -> int:
        return self._count

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, k) float32, descending, and rows (n, k) int64 of the k best passages; ties are sorted by row.

        The engine's own scores only choose the k + `SPARE` passages that are scored.
        """
        k = min(k, len(self))
        return stacked([self._search(words, k) for words in self.split(questions)], k)

    def _search(self, words: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (k,) and rows (k,) for one question; passages without any of its words fill up the places."""
        rows = self._proposed(words, min(len(self), k + SPARE)) if words else np.zeros(0, np.int64)
        if len(rows) < k:
            rows = np.concatenate([rows, np.setdiff1d(np.arange(k + len(rows)), rows)[: k - len(rows)]])
        return best(self.scores_at(words, rows), rows, k)

    def split(self, questions: Sequence[str]) -> list[list[str]]:
        """The words of each question, as `scores_at` and `shared` take them."""
        return [self._words(question) for question in questions]

    def scores_at(self, words: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """BM25 scores (n_rows,) float32 of one question, given as its words, for chosen rows only."""
        asked = {word: times * self._weight(word) for word, times in sorted(Counter(words).items())}
        return np.array([self._score(asked, self.read(row)) for row in np.asarray(rows).tolist()], np.float32)

    def _weight(self, word: str) -> float:
        """The inverse document frequency of a word as Lucene counts it."""
        holders = self._holders(word)
        return math.log1p((len(self) - holders + 0.5) / (holders + 0.5))

    def _score(self, asked: dict[str, float], held: PassageWords) -> float:
        saturation = K1 * (1 - B + B * held.length / self._mean_length)
        return sum(
            weight * held.counts[word] / (held.counts[word] + saturation)
            for word, weight in asked.items()
            if word in held.counts
        )

    def rarity_of(self, word: str) -> float:
        """The rarity of one word; 0 if no passage has it."""
        return math.fsum(map(self._rarity, self.split([word])[0]))

    def _rarity(self, word: str) -> float:
        holders = self._holders(word)
        return math.log1p(len(self) / holders) if holders else 0.0

    def shared(self, words: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The summed rarity of these words in each sentence of some passages, and (n_rows,) the sentences of each."""
        own = self._overlaps(words, np.asarray(rows).tolist())
        return np.concatenate([np.zeros(0, np.float32), *own]), np.array([len(each) for each in own], np.int64)

    def overlaps(self, question: str, rows: Sequence[int]) -> list[np.ndarray]:
        """For each of these passages (n_sentences,) float32: the summed rarity of words shared with the question."""
        [words] = self.split([question])
        return self._overlaps(words, [int(row) for row in rows])

    def _overlaps(self, words: Sequence[str], rows: Sequence[int]) -> list[np.ndarray]:
        rarity = {word: self._rarity(word) for word in set(words)}

        def of(row: int) -> np.ndarray:
            held = self.read(row).sentences
            return np.array([math.fsum(rarity[word] for word in rarity.keys() & own) for own in held], np.float32)

        return [of(row) for row in rows]

    def _read(self, row: int) -> PassageWords:
        title, *sentences = parts_of(self._words, *self._text(row))
        counts = Counter(chain(title, *sentences))
        return PassageWords(counts, counts.total(), [frozenset(own) for own in sentences])


def parts_of(words: Callable[[str], list[str]], title: str, text: str) -> list[list[str]]:
    """The words of the title, then those of each sentence."""
    return [words(title.replace("_", " ")), *map(words, split_sentences(text))]


def words_of(words: Callable[[str], list[str]], title: str, text: str) -> list[str]:
    """All words of a passage, as an engine gets them."""
    return list(chain.from_iterable(parts_of(words, title, text)))
