"""When the index is rebuilt while the retriever trains.

Without a refresh, hard negatives stop being hard; a refresh at every step costs more than the training. Left out:
building the index and mining negatives (run_retrieval.py, round_cache.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

POLICIES = ("phase", "steps", "drift")
TOP = 10  # best passages of a probe question that are compared


@dataclass(frozen=True)
class RefreshPolicy:
    """Refresh once a phase, every `steps` steps, or when the best passages of the probe questions have drifted.

    Args:
        kind: one of POLICIES.
        steps: steps between refreshes ("steps") or between checks of the probe questions ("drift").
        overlap: "drift" refreshes if the mean share of unchanged passages among the best TOP falls below it, 0 to 1.
    """

    kind: str
    steps: int
    overlap: float

    def __post_init__(self):
        if self.kind not in POLICIES:
            raise ValueError(f"expected a policy among {', '.join(POLICIES)}, found {self.kind!r}")

    def due(self, *, done: int, total: int, overlap: Callable[[], float]) -> bool:
        """Whether to refresh after `done` of `total` steps of the phase; the end of a phase refreshes anyway.

        overlap: called only if the result depends on it, since it encodes the probe questions.
        """
        if self.kind == "phase" or done == 0 or done >= total or done % self.steps:
            return False
        return self.kind == "steps" or overlap() < self.overlap


def mean_overlap(before: np.ndarray, now: np.ndarray) -> float:
    """Mean share, 0 to 1, of the entries in each row of `before` (n, k) that are in the same row of `now` (n, k)."""
    return float(np.mean([len(np.intersect1d(a, b)) / max(1, len(a)) for a, b in zip(before, now, strict=True)]))
