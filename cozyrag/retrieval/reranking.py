"""Reranking: the first passages of a search are ordered again with the scores of a reranker.

A passage keeps the score of the search and gains the reranker's score with a fitted weight, so a weak reranker does
little harm. Left out: the reranker itself (models/reranker.py), the search (hybrid.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cozyrag.models.reranker import Pair, check_scores
from cozyrag.retrieval.fitting import fit_points, recall_of
from cozyrag.retrieval.passage_index import Passages

# Points of a search by mode that count as one nat in fitting; a reranker's scores are in nats.
NATS = {"dense": 0.05, "bm25": 4.0, "hybrid": 4.0}
DEPTHS = (1, 5)


@dataclass(frozen=True)
class Reranking:
    """How the first passages of a search are ordered again. It never changes, so threads can share it.

    Args:
        score: pairs of a question and a text to (n_pairs,) float32.
        passages: the columns of the passages table.
        depth: the first passages of the search, which are read. weight: of the reranker's score, in points of the
            search; 0: the order stays.
    """

    score: Callable[[Sequence[Pair]], np.ndarray]
    passages: Passages
    depth: int
    weight: float = 0.0

    def points(self, questions: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """(n_questions, n_read) float32 scores of the first passages of each list, less the lowest of the list."""
        read = rows[:, : self.depth]
        pairs = [
            (question, text)
            for question, each in zip(questions, read.tolist(), strict=True)
            for text in self.passages.select(each)
        ]
        scores = np.asarray(self.score(pairs), dtype=np.float32).reshape(read.shape)
        check_scores(scores)
        return scores - scores.min(axis=1, initial=np.inf, keepdims=True)

    def ordered(self, questions: Sequence[str], scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scores and rows of a search in the new order, best first; ties keep the order of the search.

        Since nothing is taken from a score, the passages that are not read stay behind those that are.

        Args:
            scores: (n_questions, k) descending. rows: (n_questions, k).
        """
        if not self.weight or not rows.size:
            return scores, rows
        added = np.zeros_like(scores)
        added[:, : self.depth] = self.weight * self.points(questions, rows)
        order = np.argsort(-(scores + added), axis=1, kind="stable")
        return np.take_along_axis(scores + added, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def fitted(
        self, questions: Sequence[str], scores: np.ndarray, rows: np.ndarray, relevant: Sequence[int], *, mode: str
    ) -> tuple["Reranking", dict[str, float]]:
        """This reranking with the weight that places the relevant row of each question first (see `fit_points`).

        Args:
            scores, rows: of the search in this mode. relevant: the row that answers each question.

        Returns:
            the reranking, and its weight with recall@1 and @5 on the questions before and after.
        """
        start = np.array([1.0, NATS[mode]])
        lists = [
            (own == row, np.stack([each, points], axis=1))
            for each, own, points, row in zip(
                scores[:, : self.depth], rows[:, : self.depth], self.points(questions, rows), relevant, strict=True
            )
        ]
        found = fit_points([each for each in lists if each[0].any()], start, nat=NATS[mode])
        facts = {"reranker": float(found[1])}
        for depth in DEPTHS:
            facts[f"recall@{depth} before"] = recall_of(lists, np.array([1.0, 0.0]), depth)
            facts[f"recall@{depth}"] = recall_of(lists, found, depth)
        return replace(self, weight=float(found[1])), facts
