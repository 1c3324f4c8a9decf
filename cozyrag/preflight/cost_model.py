"""What the parts of a run cost, and the arithmetic from measurements to costs: a line through seconds, a peak by size.

Left out: measuring (gauges.py, probe.py), and how often a part comes up in a run (plan.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SURE = 0.02  # standard error of the seconds per unit, relative, at which a part is known well enough
FEWEST = 5  # measurements before that is asked


@dataclass(frozen=True)
class Line:
    """Seconds of a piece of work: `fixed`, and `each` for every unit in it."""

    fixed: float
    each: float

    def seconds(self, pieces: float, units: float) -> float:
        """Of so many pieces with so many units all together."""
        return pieces * self.fixed + units * self.each


@dataclass(frozen=True)
class Phase:
    """A phase of training: its number of steps, the mean and the most units (tokens) of a step, and what they cost.

    rows: that can teach it. activations: bytes at the peak of its largest step, beyond weights, gradients and AdamW's
    states. ending: seconds in which Python looks through all its objects for what the phase no longer needs.
    """

    steps: int
    units: float
    most: float
    cost: Line
    rows: int
    activations: int
    ending: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all its steps and its end."""
        return self.cost.seconds(self.steps, self.steps * self.units) + self.ending


@dataclass(frozen=True)
class Costs:
    """What the probe found out; seconds on one process of those that work together.

    encode: a batch of passages, by its tokens; batches: of this process, tokens: of all of them. lexical: the whole BM25
    index. search: a question, its context and its negatives; first: once for each passage that is found; reach: passages
    found for the first time by one question, in draws. weigh, feedback: a question. answer: a batch, by its
    questions. write: a byte. row_bytes: of a contexts table; sentences: in all passages; lexical_bytes: of BM25.
    writing: bytes held more while answers are written. peak: most bytes the probe itself held. exact: whether the steps are those of the run beyond doubt.
    """

    encode: Line
    batches: int
    tokens: float
    lexical: float
    search: float
    first: float
    reach: float
    weigh: float
    generator: Phase
    retriever: Phase
    feedback: float
    answer: Line
    write: float
    row_bytes: float
    sentences: float
    lexical_bytes: float
    writing: int
    exact: bool
    peak: int = 0
    spent: float = 0.0


def fit(measured: Sequence[tuple[float, float]]) -> Line:
    """The line through (units, seconds) by least squares; through zero where sizes differ too little or it would fall."""
    units, seconds = (np.array(column, dtype=float) for column in zip(*measured, strict=True))
    through_zero = Line(0.0, float(seconds.sum() / max(units.sum(), 1e-9)))
    if len(units) < 3 or units.max() < 1.5 * units.min():
        return through_zero
    each, fixed = np.polyfit(units, seconds, 1)
    return Line(float(fixed), float(each)) if each > 0 and fixed > 0 else through_zero


def is_sure(measured: Sequence[tuple[float, float]]) -> bool:
    """Whether the seconds per unit are known to `SURE`: the standard error of the residuals from the line."""
    if len(measured) < FEWEST:
        return False
    line = fit(measured)
    left = [(seconds - line.seconds(1, units)) / max(line.seconds(1, units), 1e-9) for units, seconds in measured]
    return float(np.std(left, ddof=1)) / math.sqrt(len(left)) < SURE


def spread(count: int) -> Iterator[int]:
    """The places 0 .. count - 1, each once, so that the first few are evenly spread: the ends, the middle, the quarters."""
    seen: set[int] = set()
    parts = 1
    while len(seen) < count:
        for part in range(parts + 1):
            place = round(part * (count - 1) / parts)
            if place not in seen:
                seen.add(place)
                yield place
        parts *= 2


def bite(whole: int, first: int, seconds: float, share: float) -> int:
    """How many rows of a piece of `whole` fit at least four times into a share, after `first` rows took `seconds`."""
    fits = int(first * share / 4 / max(seconds, 1e-9))
    return whole if fits >= whole else max(first, fits)


def peak_at(size: float, small: tuple[float, int], large: tuple[float, int]) -> int:
    """Bytes at the peak of a step of that size, on the line through two (size, bytes); never below the larger one's."""
    (less, low), (more, high) = small, large
    slope = max(0.0, (high - low) / (more - less)) if more > less else 0.0
    return round(high + slope * max(0.0, size - more))
