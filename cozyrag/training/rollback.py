"""Do no harm: whether a model that was just trained is kept, decided on held-out questions.

Left out: measuring (evaluation.py) and taking back (rounds.py). The questions that decide here are the ones a run reports
on, so a claim about a pair needs questions of its own.
"""

from dataclasses import dataclass

import numpy as np

from cozyrag.evaluation.metrics import paired_bootstrap

WORSE = 0.8  # one question that got worse stays below it (63 % of resamples), two and none better do not (86 %)


@dataclass(frozen=True)
class Verdict:
    """Means before and after in percent, the 95 % interval of the difference, and the share of resamples that got worse."""

    kept: bool
    before: float
    after: float
    interval: tuple[float, float]
    worse: float

    def sentence(self, model: str, metric: str) -> str:
        """The reason in words."""
        low, high = self.interval
        found = f"{metric} {self.before:.1f} -> {self.after:.1f} ({low:+.1f} to {high:+.1f}), worse in {self.worse:.0%} of resamples"
        return (
            f"{model} kept: {found}." if self.kept else f"{model} taken back to what it was before this phase: {found}."
        )


def decide(before: np.ndarray, after: np.ndarray) -> Verdict:
    """Keep the new model unless the questions say that it got worse.

    Paired bootstrap over the questions (see metrics.paired_bootstrap): taken back when the mean got lower in more than
    `WORSE` of the resamples. No change is kept: a metric at its ceiling or its floor says nothing against a model.

    Args:
        before, after: (n_questions,) scores of the same questions, 0 to 1.
    """
    _, low, high, _ = paired_bootstrap(before, after)
    worse = 1 - paired_bootstrap(after, before)[3]
    means = [round(100 * float(np.mean(values)), 2) for values in (before, after)]
    return Verdict(worse <= WORSE, *means, (round(100 * low, 2), round(100 * high, 2)), round(worse, 4))
