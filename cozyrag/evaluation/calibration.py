"""Certainty that can be trusted: the probability that an answer is right, learned from answers whose truth is known.

A generator's confidence, the geometric mean of its token probabilities, is not that probability: a pair fine-tuned on
few questions is right less often than it is confident. Platt scaling (Platt 1999) maps one to the other with two
numbers; benchmarks/quality/calibration.py compares it with temperature scaling and isotonic regression. Left out: plots
(reporting/plots.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cozyrag.errors import InputError

BINS = 8
ENOUGH, EACH = 100, 10  # answers to calibrate on, and those of them that are right, and wrong
FOLDS = 5
LARGEST = 1e9  # number of a calibration that is read
NEAREST = 1e-6  # to 0 and 1: the logit is finite
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Calibration:
    """certainty = sigmoid(slope * logit(confidence) + intercept), fitted on so many `questions`."""

    slope: float
    intercept: float
    questions: int

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """The certainty, 0 to 1, of answers with these confidences."""
        return 1 / (1 + np.exp(-(self.slope * logit(scores) + self.intercept)))

    @classmethod
    def read(cls, facts: Any, where: object) -> "Calibration | None":
        """The calibration in cozyrag.json, None if there is none. Raises InputError for numbers that make no sense."""
        if facts is None:
            return None
        wanted = {"slope", "intercept", "questions"}
        values = [facts.get(name) for name in sorted(wanted)] if isinstance(facts, Mapping) else [None]
        if not all(isinstance(each, int | float) and abs(each) < LARGEST for each in values) or facts["slope"] <= 0:
            raise InputError(
                f"{where}: expected the calibration as three numbers, slope (above 0), intercept and questions, found "
                f"{facts!r:.80}. Remove that field: certainty is then the generator's own."
            )
        return cls(**{name: facts[name] for name in wanted})


def logit(scores: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), finite also for 0 and 1."""
    kept = np.clip(np.asarray(scores, dtype=np.float64), NEAREST, 1 - NEAREST)
    return np.log(kept / (1 - kept))


def fit(scores: np.ndarray, correct: np.ndarray) -> Calibration:
    """Platt scaling of confidences to whether answers are correct, both (n,); of either kind there is one at least."""
    from sklearn.linear_model import LogisticRegression  # takes a second, and only runs and benchmarks need it

    model = LogisticRegression().fit(logit(scores)[:, None], np.asarray(correct) > 0)
    return Calibration(round(float(model.coef_[0, 0]), 6), round(float(model.intercept_[0]), 6), len(scores))


def calibrated(rows: Sequence[Mapping]) -> tuple[Calibration | None, dict]:
    """The calibration of a pair by its evaluated rows, or None if they do not suffice, and the facts about it.

    Empty answers do not count: their score is the probability of silence. Whether calibrating pays is seen by
    cross-validation: each fold is calibrated on the others.
    """
    scores, correct = certainties([row for row in rows if row["prediction"]])
    right = int(correct.sum())
    facts: dict = {"questions": len(scores), "correct": right}
    if len(scores) < ENOUGH or not EACH <= right <= len(scores) - EACH:
        return None, facts
    folds = np.arange(len(scores)) % FOLDS
    held_out = np.empty(len(scores))
    for fold in range(FOLDS):
        mine = folds == fold
        if not 0 < correct[~mine].sum() < (~mine).sum():
            return None, facts
        held_out[mine] = fit(scores[~mine], correct[~mine])(scores[mine])
    facts |= {"before": error_of(scores, correct), "after": error_of(held_out, correct)}
    made = fit(scores, correct)
    better = made.slope > 0 and brier(held_out, correct) < brier(scores, correct)
    return (made if better else None), facts


def sentence(facts: Mapping, made: Calibration | None) -> str:
    """What `calibrated` did, for the log."""
    if made is not None:
        return (
            f"Certainty is calibrated on {facts['questions']} answers to validation questions: expected calibration "
            f"error {facts['before']:.3f} before, {facts['after']:.3f} after ({FOLDS}-fold cross-validation)."
        )
    if "before" in facts:
        return f"Certainty is not calibrated: that would not improve it (error {facts['before']:.3f})."
    return (
        f"Certainty is not calibrated: expected at least {ENOUGH} answers to validation questions, {EACH} of them "
        f"right and {EACH} wrong, found {facts['questions']}, {facts['correct']} of them right."
    )


def certainty_of(made: Calibration | None, texts: Sequence[str], scores: Sequence[float]) -> list[float]:
    """The certainty of answers with these confidences. That of an empty answer stays the probability of silence."""
    if made is None or not len(scores):
        return list(scores)
    return [new if text else old for text, old, new in zip(texts, scores, made(np.array(scores)).tolist(), strict=True)]


def certainties(rows: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, correct), both (n,), of evaluated rows."""
    return np.array([row["score"] for row in rows], dtype=np.float64), np.array([float(row["em"]) for row in rows])


def calibration_bins(scores: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """(mean certainty, share correct, rows) of groups of similar certainty and equal size, at least five answers."""
    groups = np.array_split(np.argsort(scores, kind="stable"), max(1, min(BINS, len(scores) // 5)))
    return [(float(scores[rows].mean()), float(correct[rows].mean()), rows) for rows in groups]


def calibration_error(scores: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error over `calibration_bins`, 0 to 1 (Guo et al. 2017)."""
    gaps = [abs(mean - share) * len(rows) for mean, share, rows in calibration_bins(scores, correct)]
    return float(sum(gaps) / len(scores))


def error_of(scores: np.ndarray, correct: np.ndarray) -> float:
    """`calibration_error` as it is logged."""
    return round(calibration_error(scores, correct), 4)


def brier(scores: np.ndarray, correct: np.ndarray) -> float:
    """Mean squared difference of certainty and correctness (Brier 1950)."""
    return float(np.mean((scores - correct) ** 2))


def coverage_table(certainty: np.ndarray, correct: np.ndarray) -> str:
    """A Markdown table: how many questions are answered at each least certainty, and how many of the answers right."""
    lines = ["| min_certainty | answered | right of the answers |", "|---:|---:|---:|"]
    for least in THRESHOLDS:
        kept = certainty >= least
        right = f"{100 * correct[kept].mean():.1f}" if kept.any() else "-"
        lines.append(f"| {least:.1f} | {100 * kept.mean():.1f} | {right} |")
    return "\n".join(lines)


def check_least(least: object) -> None:
    """Raise InputError for a min_certainty that is neither None nor a number from 0 to 1."""
    if least is None or (isinstance(least, int | float) and not isinstance(least, bool) and 0 <= least <= 1):
        return
    raise InputError(f"min_certainty: expected a number from 0 to 1, or None to answer always, found {least!r:.80}.")
