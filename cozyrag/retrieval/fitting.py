"""Fitting the weights of a sum of scores, so that the relevant passage of each question ranks first.

Left out: which scores are summed (hybrid.py, reranking.py).
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

TRUST = 10.0  # number of questions that the weights at the start count as in fitting
Candidates = tuple[np.ndarray, np.ndarray]  # of a question: (n,) whether each is relevant, and its (n, n_scores) points


def fit_points(lists: Sequence[Candidates], start: np.ndarray, *, nat: float) -> np.ndarray:
    """(n_scores,) weights that minimise the mean -log softmax of the relevant candidates, the first of them 1.

    Softmax regression over the candidates of each question (ListNet's top-one loss, Cao et al. 2007) with non-negative
    weights, kept near those at the start as if by TRUST questions.

    Args:
        lists: of each question, with at least one relevant candidate. start: (n_scores,) weights; the first is 1.
        nat: points of the first score that count as one nat with the weights at the start.
    """
    if not lists:
        return start
    unit = np.maximum(start, 1e-3) / nat
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

    bounds = [(1e-3, None), *[(0, None)] * (len(start) - 1)]
    found = minimize(loss, np.ones(len(start)), jac=True, bounds=bounds, method="L-BFGS-B").x * unit
    return np.round(found / found[0], 4)


def recall_of(lists: Sequence[Candidates], weights: np.ndarray, k: int) -> float:
    """Share of the questions whose relevant candidate is among the k best."""
    hits = []
    for marks, points in lists:
        scores = points @ weights
        hits.append(bool(marks.any()) and int((scores > scores[marks].max()).sum()) < k)
    return float(np.mean(hits)) if hits else 0.0
