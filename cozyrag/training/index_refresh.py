"""When the index is made anew while the retriever trains: a policy that can be tested alone.

An index that is never refreshed gives negatives that are no longer hard; one that is refreshed all the time costs more
than the training. Left out: making the index and mining from it (rounds.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

POLICIES = ("phase", "steps", "drift")
TOP = 10  # how many of the best passages of a probe question are compared


@dataclass(frozen=True)
class RefreshPolicy:
    """Once a phase, every `steps` steps of it, or when the probe questions' best passages have changed too much.

    Args:
        kind: one of POLICIES.
        steps: steps between refreshes ("steps") or between looks at the probe questions ("drift").
        overlap: "drift" refreshes when the mean share of the same passages among the best TOP falls under this, 0 to 1.
    """

    kind: str
    steps: int
    overlap: float

    def __post_init__(self):
        if self.kind not in POLICIES:
            raise ValueError(f"expected a policy among {', '.join(POLICIES)}, found {self.kind!r}")

    def due(self, *, done: int, total: int, overlap: Callable[[], float]) -> bool:
        """Whether to refresh after `done` of `total` steps of the phase; the end of a phase refreshes anyway.

        `overlap` is asked only when the answer depends on it: it costs a pass over the probe questions.
        """
        if self.kind == "phase" or done == 0 or done >= total or done % self.steps:
            return False
        return self.kind == "steps" or overlap() < self.overlap


def mean_overlap(before: np.ndarray, now: np.ndarray) -> float:
    """Mean share, 0 to 1, of the entries of each row of `before` (n, k) that stand in the same row of `now` (n, k)."""
    return float(np.mean([len(np.intersect1d(a, b)) / max(1, len(a)) for a, b in zip(before, now, strict=True)]))
