"""How questions find passages: by vectors, by words, or by both, their scores added up with a weight.

A weighted sum keeps how much better one passage is than the next, which ranks throw away. The weight is chosen on
training questions. Left out: the two searches themselves (index.py, lexical.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cozyrag.index import PassageIndex
from cozyrag.lexical import LexicalIndex

MODES = ("dense", "bm25", "hybrid")
CANDIDATES = 100  # best passages of each search that compete in the sum
WEIGHTS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.5, 15.0, 17.5, 20.0, 25.0, 30.0, 40.0, 60.0, 100.0)
DEFAULT_WEIGHT = 15.0


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
    """Search in one of MODES; `weight` is what a cosine of 1 is worth in BM25 points."""

    def __init__(
        self,
        index: PassageIndex,
        lexical: LexicalIndex | None,
        *,
        encode: Callable[[Sequence[str]], np.ndarray],
        mode: str,
        weight: float = DEFAULT_WEIGHT,
    ):
        if mode not in MODES:
            raise ValueError(f"expected a retrieval mode among {', '.join(MODES)}, found {mode!r}")
        if mode != "dense" and lexical is None:
            raise ValueError(f"expected a lexical index for retrieval mode {mode!r}, found none")
        self.index, self.lexical, self.encode, self.mode, self.weight = index, lexical, encode, mode, weight

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
        scores, rows = zip(
            *(_best(rows, self.weight * dense + lexical, k) for rows, dense, lexical in pool.candidates), strict=True
        )
        return Found(
            np.stack(scores).astype(np.float32),
            np.stack(rows),
            (pool.dense_rows[:, :k], pool.lexical_rows[:, :k]),
            vectors,
        )

    def choose_weight(self, questions: Sequence[str], relevant: Sequence[int], *, k: int = 5) -> dict[float, float]:
        """Share of the questions whose relevant row is among the k best, for each weight of WEIGHTS; the best becomes the weight.

        Ties go to the weight nearest to DEFAULT_WEIGHT.
        """
        pool = self._pool(questions, self.encode(questions), CANDIDATES)
        recall = {
            weight: float(
                np.mean(
                    [
                        row in _best(rows, weight * dense + lexical, k)[1]
                        for (rows, dense, lexical), row in zip(pool.candidates, relevant, strict=True)
                    ]
                )
            )
            for weight in WEIGHTS
        }
        self.weight = min(WEIGHTS, key=lambda weight: (-recall[weight], abs(weight - DEFAULT_WEIGHT)))
        return recall

    def _pool(self, questions: Sequence[str], vectors: np.ndarray, depth: int) -> "_Pool":
        """For each question the union of both searches' best rows, with both scores of every one of them."""
        _, dense_rows = self.index.search(vectors, depth)
        _, lexical_rows = self.lexical.search(questions, depth)
        candidates = []
        for question, vector, a, b in zip(questions, vectors, dense_rows, lexical_rows, strict=True):
            rows = np.union1d(a, b)
            candidates.append((rows, self.index.vectors[rows] @ vector, self.lexical.scores_at(question, rows)))
        return _Pool(candidates, dense_rows, lexical_rows)


@dataclass(frozen=True)
class _Pool:
    candidates: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    dense_rows: np.ndarray
    lexical_rows: np.ndarray


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]
