"""Rollback: whether a model that was just trained is kept, decided on the validation questions.

A run reports its scores on the same questions, so a claim about a pair needs questions of its own. Left out: the scores
(evaluation.py), restoring a model (rounds.py).
"""

from dataclasses import dataclass

import numpy as np

from cozyrag.evaluation.metrics import paired_bootstrap

WORSE = 0.8  # one question that got worse stays below it (63 % of resamples), two and none better do not (86 %)


@dataclass(frozen=True)
class Decision:
    """Means before and after in percent, 95 % interval of the difference, share of resamples that got worse."""

    kept: bool
    before: float
    after: float
    interval: tuple[float, float]
    worse: float

    def sentence(self, model: str, metric: str) -> str:
        """The decision and its reason."""
        low, high = self.interval
        return (
            f"{model} {'kept' if self.kept else 'rolled back'}: {metric} {self.before:.1f} -> {self.after:.1f} "
            f"({low:+.1f} to {high:+.1f}), worse in {self.worse:.0%} of resamples."
        )


def decide(before: np.ndarray, after: np.ndarray) -> Decision:
    """Keep the new model unless it is worse on the questions.

    Paired bootstrap over the questions (see metrics.paired_bootstrap): a model is rolled back if its mean is lower in
    more than `WORSE` of the resamples. An unchanged metric, such as one at its ceiling, keeps the model.

    Args:
        before, after: (n_questions,) scores of the same questions, 0 to 1.
    """
    _, low, high, _ = paired_bootstrap(before, after)
    worse = 1 - paired_bootstrap(after, before)[3]
    old, new, *interval = (round(100 * float(value), 2) for value in (np.mean(before), np.mean(after), low, high))
    return Decision(worse <= WORSE, old, new, (interval[0], interval[1]), round(worse, 4))
