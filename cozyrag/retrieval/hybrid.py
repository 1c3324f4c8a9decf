"""How questions find passages: by vectors, by words, or by both, their scores added up with weights.

A weighted sum keeps how much better one passage is than the next, which ranks throw away; and a passage is as near to a
question as its best sentence, which the vector of a whole passage blurs. Weights are fitted on training questions. Left
out: the two searches themselves (passage_index.py, bm25.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import minimize

from cozyrag.data.sentences import best_of, places_of
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.passage_index import PassageIndex

MODES = ("dense", "bm25", "hybrid")
CANDIDATES = 60  # best passages of each search that compete in the sum
SHARPNESS = 0.25  # of the softmax over BM25 points with which fitting begins
TRUST = 10.0  # questions that the usual weights count for when weights are fitted


@dataclass(frozen=True)
class Weights:
    """What counts in the sum, in BM25 points: a cosine of 1 (`vectors`), and one point of rarity that the best sentence shares
    with the question (`sentence_words`)."""

    vectors: float
    sentence_words: float = 0.0

    @classmethod
    def usual(cls, sentences: bool) -> "Weights":
        """Those used where no training question has a known passage; with sentences, or with whole passages only."""
        return cls(45.0, 1.0) if sentences else cls(15.0)


@dataclass(frozen=True)
class Found:
    """What a search gives: `scores` (n, k) float32 descending, `rows` (n, k) int64, and the rankings (n, k) that negatives are mined from.

    `vectors`: (n, dim) float32, those of the questions, which the context filter wants whatever the mode.
    """

    scores: np.ndarray
    rows: np.ndarray
    rankings: tuple[np.ndarray, ...]
    vectors: np.ndarray


class Searcher:
    """Search in one of MODES.

    In mode hybrid the score of a passage is its BM25 points plus, times their weights, the cosine of its best sentence
    and what the rare words are worth that its best sentence shares with the question. Without vectors and words of
    sentences it is BM25 points plus the weighted cosine of the passage.

    Args:
        words: of the sentences; used where the index keeps vectors of sentences too.
        weights: as fitted before; None: the usual ones.
    """

    def __init__(
        self,
        index: PassageIndex,
        lexical: LexicalIndex | None,
        *,
        encode: Callable[[Sequence[str]], np.ndarray],
        mode: str,
        words: SentenceWords | None = None,
        weights: Weights | None = None,
    ):
        if mode not in MODES:
            raise ValueError(f"expected a retrieval mode among {', '.join(MODES)}, found {mode!r}")
        if mode != "dense" and lexical is None:
            raise ValueError(f"expected a lexical index for retrieval mode {mode!r}, found none")
        self.index, self.lexical, self.encode, self.mode = index, lexical, encode, mode
        self.words = words if index.sentences is not None else None
        self.weights = weights or Weights.usual(self.words is not None)

    def search(self, questions: Sequence[str], k: int) -> Found:
        """The k best passages of each question; equal scores stand in the order of the rows."""
        vectors = self.encode(questions)
        if self.mode == "bm25":
            scores, rows = self.lexical.search(questions, k)
            return Found(scores, rows, (rows,), vectors)
        if self.mode == "dense":
            scores, rows = self.index.search(vectors, k)
            return Found(scores, rows, (rows,), vectors)
        pool = self._pool(questions, vectors, max(k, CANDIDATES))
        weights = self._as_array()
        best = [_best(rows, points @ weights, k) for rows, points in pool.candidates]
        return Found(
            np.stack([scores for scores, _ in best]).astype(np.float32),
            np.stack([rows for _, rows in best]),
            (pool.dense_rows[:, :k], pool.lexical_rows[:, :k]),
            vectors,
        )

    def fit_fusion_weights(self, questions: Sequence[str], relevant: Sequence[int]) -> dict[str, float]:
        """Fit the weights so that the relevant row of each question stands out among its candidates.

        Softmax regression over the candidates of each question (ListNet's top-one loss, Cao et al. 2007) with weights of at
        least 0, held near the usual ones by as much as TRUST questions. Questions whose relevant row is no candidate
        say nothing.

        Returns:
            the weights, and recall@5 on the questions before and after.
        """
        if not len(questions):
            return asdict(self.weights)
        pool = self._pool(questions, self.encode(questions), CANDIDATES)
        lists = [(rows == row, points) for (rows, points), row in zip(pool.candidates, relevant, strict=True)]
        before = _recall(lists, self._as_array())
        self.weights = _fit([each for each in lists if each[0].any()], self._as_array())
        return asdict(self.weights) | {"recall@5 before": before, "recall@5": _recall(lists, self._as_array())}

    def _as_array(self) -> np.ndarray:
        return np.array([1.0, self.weights.vectors, self.weights.sentence_words])

    def _pool(self, questions: Sequence[str], vectors: np.ndarray, depth: int) -> "_Pool":
        """For each question the union of both searches' best rows, with what each of them scores in each way."""
        _, dense_rows = self.index.search(vectors, depth)
        _, lexical_rows = self.lexical.search(questions, depth)
        candidates = []
        asked = self.lexical.split(questions)
        for words, vector, a, b in zip(asked, vectors, dense_rows, lexical_rows, strict=True):
            rows = np.union1d(a, b)
            candidates.append((rows, self._points(words, vector, rows)))
        return _Pool(candidates, dense_rows, lexical_rows)

    def _points(self, words: list[str], vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n_rows, 3): BM25, cosine, shared rarity; the last two of the best sentence where sentences are known."""
        cosines, shared = self.index.vectors[rows] @ vector, np.zeros(len(rows), dtype=np.float32)
        if self.words is not None:
            kept = self.index.sentences
            places, counts = places_of(kept.ends, rows)
            cosines = best_of(kept.products(places, vector), counts, cosines)
            shared = best_of(*self.words.shared(words, rows), shared)
        return np.stack([self.lexical.scores_at(words, rows), cosines, shared], axis=1)


@dataclass(frozen=True)
class _Pool:
    candidates: list[tuple[np.ndarray, np.ndarray]]
    dense_rows: np.ndarray
    lexical_rows: np.ndarray


def _fit(lists: Sequence[tuple[np.ndarray, np.ndarray]], start: np.ndarray) -> Weights:
    """Weights that minimise the mean of -log softmax of the relevant rows; each list: (n,) which is relevant, (n, 3) points."""
    if not lists:
        return Weights(*start[1:])
    unit = SHARPNESS * np.maximum(start, 1e-3)
    points = np.concatenate([points for _, points in lists]) * unit
    relevant = np.concatenate([marks for marks, _ in lists])
    starts = np.cumsum([0, *(len(marks) for marks, _ in lists)])[:-1]
    list_of = np.repeat(np.arange(len(lists)), [len(marks) for marks, _ in lists])

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        scores = points @ theta
        top = np.maximum.reduceat(scores, starts)[list_of]
        chance = np.exp(scores - top)
        total = np.add.reduceat(chance, starts)
        surprise = np.log(total).sum() - (scores - top)[relevant].sum() + TRUST * ((theta - 1) ** 2).sum() / 2
        gradient = (chance / total[list_of]) @ points - points[relevant].sum(axis=0) + TRUST * (theta - 1)
        return surprise, gradient

    found = (
        minimize(loss, np.ones(3), jac=True, bounds=[(1e-3, None), (0, None), (0, None)], method="L-BFGS-B").x * unit
    )
    return Weights(*(round(float(value / found[0]), 4) for value in found[1:]))


def _recall(lists: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray, k: int = 5) -> float:
    """Share of the lists whose relevant row is among the k best."""
    hits = []
    for marks, points in lists:
        scores = points @ weights
        hits.append(marks.any() and int((scores > scores[marks].max()).sum()) < k)
    return float(np.mean(hits)) if hits else 0.0


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]
