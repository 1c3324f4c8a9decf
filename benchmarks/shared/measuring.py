"""How the speed benchmarks measure: seconds, peak memory, FLOPs, and medians of alternating repetitions.

Machines are noisy, so the sides of a comparison alternate (ours, theirs, ours, theirs ...) and are compared within a
repetition: a slow minute slows both. Left out: what is measured (training_sides.py, retrieval_sides.py).
"""

import gc
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import torch
from tqdm.auto import tqdm

SAMPLING = 0.01  # seconds between two samples of the memory of the process

Run = Callable[[], object]
Build = Callable[[int], Run]


@dataclass(frozen=True)
class Side:
    """One implementation of a part, with the rows of a repetition and of the warm-up, in which kernels are loaded.

    `build` prepares a run over a number of rows, which is not timed, and returns the run, which is timed.
    """

    name: str
    size: int
    warm_up: int
    build: Build


@dataclass(frozen=True)
class Measured:
    """Rows per second of each repetition of a side, and its peak memory in bytes beyond the memory in use before."""

    name: str
    rates: list[float]
    memory: int

    @property
    def rate(self) -> float:
        """The median of the rates."""
        return median(self.rates)


class Elsewhere(ABC):
    """The result of a run in another process."""

    @abstractmethod
    def end(self) -> int:
        """Wait until the process has ended, which is not timed; its peak memory in bytes beyond that at its start."""


class PeakMemory:
    """Peak memory inside a `with`, in bytes beyond `before`: allocated memory on a GPU, resident memory on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = self.peak = self._now()
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _sample(self) -> None:
        while not self._over.wait(SAMPLING):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._sampler.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._over.set()
            self._sampler.join()
            self.peak = max(self.peak, self._now())

    @property
    def used(self) -> int:
        """Bytes beyond the memory in use when this object was made."""
        return self.peak - self.before


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queue, so that the clock includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(side: Side, rows: int, device: torch.device) -> tuple[float, int]:
    """Seconds and peak memory in bytes of one run. The memory includes the models that the side loads."""
    gc.collect()
    memory = PeakMemory(device)
    run = side.build(rows)
    wait_for(device)
    with memory:
        began = time.perf_counter()
        result = run()
        wait_for(device)
        seconds = time.perf_counter() - began
    return seconds, result.end() if isinstance(result, Elsewhere) else memory.used


def measure(part: str, sides: Sequence[Side], *, repeats: int, device: torch.device) -> list[Measured]:
    """Measure all sides of a part in alternation, after a warm-up."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    memory = dict.fromkeys(rates, 0)
    with tqdm(total=len(sides) * (repeats + 1), desc=f"measuring: {part}", unit="run") as bar:
        for repetition in range(repeats + 1):
            for side in sides:
                bar.set_postfix_str(f"{side.name}, {f'repetition {repetition}' if repetition else 'warm-up'}")
                rows = side.size if repetition else min(side.warm_up, side.size)
                seconds, used = timed(side, rows, device)
                if repetition:
                    rates[side.name].append(rows / seconds)
                # A process keeps freed memory, which makes later growth look too small: the largest value counts.
                memory[side.name] = max(memory[side.name], used)
                bar.update()
    return [Measured(side.name, rates[side.name], memory[side.name]) for side in sides]


def ratios(ours: Measured, theirs: Measured) -> list[float]:
    """How many times as fast we are, for each repetition."""
    return [mine / other for mine, other in zip(ours.rates, theirs.rates, strict=True)]


def spread(values: Sequence[float], digits: str) -> str:
    """Lowest to highest as text."""
    return f"{min(values):{digits}} to {max(values):{digits}}"


def round_seconds(rates: dict[str, float], *, pairs: int, passages: int) -> float:
    """Seconds of a whole round, from the rates of its four parts."""
    work = {"generator": pairs, "retriever": pairs, "index": passages, "retrieval": pairs}
    return sum(amount / rates[part] for part, amount in work.items())


def training_flops(
    *, layers: int, width: int, inner: int, vocabulary: int, lengths: Sequence[int], targets: Sequence[int]
) -> int:
    """Model FLOPs of training a GPT-2 once on examples, whatever an implementation computes beyond them.

    A parameter of a matrix costs 2 FLOPs a token forward and 4 backward. With the width d and the inner width m:
      - all layers but the last: 6 * (4 d^2 + 2 d m) for each token, and for attention 6 * d * length^2 for each example
        (12 for two products of all pairs of tokens, halved because attention is causal);
      - the last layer: 6 * 3 d^2 for each token (keys, values, and queries, which share one product), and
        6 * (d^2 + 2 d m) + 12 * d * length for each answer token;
      - the head: 6 * d * vocabulary for each answer token.
    Padding, recomputation, biases, norms, and the optimizer do not count.

    Args:
        lengths: tokens of each example.
        targets: answer tokens of each example, with EOS.
    """
    matrices = 6 * (layers - 1) * (4 * width**2 + 2 * width * inner) * sum(lengths)
    attention = 6 * (layers - 1) * width * sum(length**2 for length in lengths)
    last = 6 * 3 * width**2 * sum(lengths) + 6 * (width**2 + 2 * width * inner) * sum(targets)
    last += 12 * width * sum(length * count for length, count in zip(lengths, targets, strict=True))
    head = 6 * width * vocabulary * sum(targets)
    return matrices + attention + last + head


def matrix_products(size: int, count: int, device: torch.device) -> Side:
    """Products of square matrices as a side whose rows are FLOPs: float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    flops = 2 * size**3

    def build(rows: int) -> Run:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def run() -> None:
            for _ in range(rows // flops):
                torch.mm(left, right, out=out)

        return run

    return Side("matrix product", flops * count, flops, build)
