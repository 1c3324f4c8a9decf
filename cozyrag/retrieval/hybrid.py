"""Dense, sparse (BM25) and hybrid search. Hybrid search adds up scores with fusion weights.

A weighted sum keeps score differences, which ranks throw away. A passage is as near to a question as its best sentence,
because the vector of a whole passage blurs its sentences. The weights are fitted on training questions. Left out: the
two searches themselves (passage_index.py, bm25.py), and what a reranker does with the result (reranking.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np

from cozyrag.data.sentences import best_of
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.faiss_index import best
from cozyrag.retrieval.fitting import fit_points, recall_of
from cozyrag.retrieval.opening import Index
from cozyrag.retrieval.reranking import NATS, Reranking
from cozyrag.retrieval.words_of_texts import WordsOfTexts

MODES = ("dense", "bm25", "hybrid")
# names of results; sparse is mode bm25
SEARCHES = DENSE, SPARSE, HYBRID, RERANKED = ("dense", "sparse", "hybrid", "reranked")
RESULT_OF = {"dense": DENSE, "bm25": SPARSE, "hybrid": HYBRID}  # by mode
CANDIDATES = 60  # best passages of each search that compete in the sum
NAT = 4.0  # BM25 points that count as one nat of the softmax with which fitting begins


@dataclass(frozen=True)
class Weights:
    """Fusion weights in BM25 points.

    `vectors`: of a cosine of 1. `sentence_words`: of a point of rarity that the best sentence shares with the question.
    """

    vectors: float
    sentence_words: float = 0.0

    @classmethod
    def default(cls, sentences: bool) -> "Weights":
        """The weights without fitting; `sentences`: whether sentences are compared, or whole passages only."""
        return cls(45.0, 1.0) if sentences else cls(15.0)


@dataclass(frozen=True)
class Found:
    """The result of a search for n questions.

    scores: (n, k) float32, descending. rows: (n, k) int64. lists: (n, k) int64 of each search that was made, by its
    name. vectors: (n, dim) float32 of the questions, which the context filter needs in every mode.
    """

    scores: np.ndarray
    rows: np.ndarray
    lists: dict[str, np.ndarray]
    vectors: np.ndarray

    @property
    def rankings(self) -> tuple[np.ndarray, ...]:
        """The lists from which negatives are mined."""
        return tuple(self.lists.values())


@dataclass(frozen=True)
class Searcher:
    """Search in one of MODES. It never changes, so threads can share it.

    In hybrid mode the score of a passage is its BM25 points plus two weighted terms of its best sentence: the cosine
    with the question, and the rarity of the words it shares with the question. Without vectors and words of sentences,
    the score is the BM25 points plus the weighted cosine of the passage.

    Args:
        lexical: needed in every mode but dense.
        encode: questions to (n, dim) float32.
        words: words of the sentences; used if the index keeps sentence vectors too.
        weights: fusion weights; None: the default ones.
        reranking: how the first passages of the result are ordered again; None: not at all.
    """

    index: Index
    lexical: LexicalIndex | WordsOfTexts | None
    encode: Callable[[Sequence[str]], np.ndarray]
    mode: str
    words: SentenceWords | WordsOfTexts | None = None
    weights: Weights | None = None
    reranking: Reranking | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"expected a retrieval mode among {', '.join(MODES)}, found {self.mode!r}")
        if self.mode != "dense" and self.lexical is None:
            raise ValueError(f"expected a lexical index for retrieval mode {self.mode!r}, found none")

    @cached_property
    def fusion_weights(self) -> Weights:
        """The weights in use."""
        return self.weights or Weights.default(self._words is not None)

    @property
    def _words(self) -> SentenceWords | WordsOfTexts | None:
        return self.words if self.index.sentences is not None else None

    def search(self, questions: Sequence[str], k: int) -> Found:
        """The k best passages of each question; ties keep the order of the rows."""
        return self._reranked(questions, self.first(questions, self._depth(k)), k)

    def first(self, questions: Sequence[str], k: int) -> Found:
        """`search` without reranking."""
        vectors = self.encode(questions)
        if self.mode == "dense" or self.lexical is None:
            scores, rows = self.index.search(vectors, k)
            return Found(scores, rows, {DENSE: rows}, vectors)
        if self.mode == "bm25":
            scores, rows = self.lexical.search(questions, k)
            return Found(scores, rows, {SPARSE: rows}, vectors)
        pool = self._pool(self.lexical, questions, vectors, max(k, CANDIDATES))
        weights = _as_array(self.fusion_weights)
        ranked = [best(points @ weights, rows, k) for rows, points in pool.candidates]
        scores, rows = np.stack([each[0] for each in ranked]).astype(np.float32), np.stack([each[1] for each in ranked])
        return Found(scores, rows, {DENSE: pool.dense_rows[:, :k], SPARSE: pool.lexical_rows[:, :k]}, vectors)

    def each_search(self, questions: Sequence[str], k: int) -> Found:
        """`search` with the lists to measure: dense search in every mode, the hybrid and the reranked result as lists
        of their own.

        Only in bm25 mode is that one more search, of vectors that are there already.
        """
        first = self.first(questions, self._depth(k))
        found = self._reranked(questions, first, k)
        lists = dict(found.lists)
        if self.mode == "bm25":
            lists[DENSE] = self.index.search(found.vectors, k)[1]
        if self.mode == "hybrid":
            lists[HYBRID] = first.rows[:, :k]
        if self.reranking is not None:
            lists[RERANKED] = found.rows
        return replace(found, lists=lists)

    def _depth(self, k: int) -> int:
        """Passages to find for k passages after reranking."""
        return k if self.reranking is None or not self.reranking.weight else max(k, self.reranking.depth)

    def _reranked(self, questions: Sequence[str], first: Found, k: int) -> Found:
        """The k best passages of a search, ordered again if there is a reranking."""
        scores, rows = first.scores, first.rows
        if self.reranking is not None:
            scores, rows = self.reranking.ordered(questions, scores, rows)
        lists = {name: each[:, :k] for name, each in first.lists.items()}
        return replace(first, scores=scores[:, :k], rows=rows[:, :k], lists=lists)

    def fitted(self, questions: Sequence[str], relevant: Sequence[int]) -> tuple["Searcher", dict[str, float]]:
        """This search with fusion weights that rank the relevant row of each question above its other candidates.

        See `fit_points`. Questions whose relevant row is not a candidate do not count.

        Returns:
            the search, and its weights with recall@5 on the questions before and after fitting.
        """
        start = self.fusion_weights
        if not len(questions) or self.lexical is None:
            return self, asdict(start)
        pool = self._pool(self.lexical, questions, self.encode(questions), CANDIDATES)
        lists = [(rows == row, points) for (rows, points), row in zip(pool.candidates, relevant, strict=True)]
        found = fit_points([each for each in lists if each[0].any()], _as_array(start), nat=NAT)
        weights = Weights(*found[1:].tolist())
        recalls = {"recall@5 before": recall_of(lists, _as_array(start), 5), "recall@5": recall_of(lists, found, 5)}
        return replace(self, weights=weights), asdict(weights) | recalls

    def reranked_with(
        self, reranking: Reranking, questions: Sequence[str], relevant: Sequence[int]
    ) -> tuple["Searcher", dict[str, float]]:
        """This search with that reranking, its weight fitted on questions with a relevant row; see `Reranking.fitted`.

        Without questions, the weight is the one with which fitting begins.
        """
        if not len(questions):
            return replace(self, reranking=replace(reranking, weight=NATS[self.mode])), {"reranker": NATS[self.mode]}
        first = self.first(questions, reranking.depth)
        fitted, facts = reranking.fitted(questions, first.scores, first.rows, relevant, mode=self.mode)
        return replace(self, reranking=fitted), facts

    def _pool(
        self, lexical: LexicalIndex | WordsOfTexts, questions: Sequence[str], vectors: np.ndarray, depth: int
    ) -> "_Pool":
        """For each question the union of the best rows of both searches, with the scores of each row."""
        _, dense_rows = self.index.search(vectors, depth)
        _, lexical_rows = lexical.search(questions, depth)
        candidates = []
        for words, vector, a, b in zip(lexical.split(questions), vectors, dense_rows, lexical_rows, strict=True):
            rows = np.union1d(a, b)
            candidates.append((rows, self._points(lexical, words, vector, rows)))
        return _Pool(candidates, dense_rows, lexical_rows)

    def _points(
        self, lexical: LexicalIndex | WordsOfTexts, words: list[str], vector: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """(n_rows, 3): BM25, cosine, shared rarity; the last two of the best sentence if sentences are known."""
        cosines, shared = self.index.vectors[rows] @ vector, np.zeros(len(rows), dtype=np.float32)
        kept = self.index.sentences
        if kept is not None and self.words is not None:
            cosines = kept.nearest(rows, vector, cosines)
            shared = best_of(*self.words.shared(words, rows), shared)
        return np.stack([lexical.scores_at(words, rows), cosines, shared], axis=1)


def _as_array(weights: Weights) -> np.ndarray:
    return np.array([1.0, weights.vectors, weights.sentence_words])


@dataclass(frozen=True)
class _Pool:
    candidates: list[tuple[np.ndarray, np.ndarray]]
    dense_rows: np.ndarray
    lexical_rows: np.ndarray
