"""How the speed benchmark measures: seconds, peak memory, FLOPs, and medians of repetitions that take turns.

Machines are noisy: the sides of a comparison take turns (ours, theirs, ours, theirs ...) and are compared within a
repetition, so that a slow minute slows both. Left out: what is measured (speed.py, contenders.py, reference_loop.py).
"""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import torch
from tqdm.auto import tqdm

SAMPLING = 0.01  # seconds between two looks at the memory of the process


@dataclass(frozen=True)
class Side:
    """One way to do a part: `build(rows)` makes all ready, which is not timed, and gives the act that is timed.

    `size`: rows of a repetition; `warm_up`: rows done once before all repetitions, so that kernels are chosen and loaded.
    """

    name: str
    size: int
    warm_up: int
    build: Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class Measured:
    """What a side took: rows per second of each repetition, and the most memory in bytes beyond what was there before."""

    name: str
    rates: list[float]
    memory: int

    @property
    def rate(self) -> float:
        """The median of the rates."""
        return median(self.rates)


class PeakMemory:
    """The most memory in use inside a `with`, in bytes, less `before`: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = self.peak = self._now()
        self._over = threading.Event()

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *problem) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._over.set()
            self._thread.join()
            self.peak = max(self.peak, self._now())

    @property
    def used(self) -> int:
        """Bytes beyond what was in use when this was made."""
        return self.peak - self.before


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that the clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(side: Side, rows: int, device: torch.device) -> tuple[float, int]:
    """Seconds and peak memory of one act. The memory counts from before the side was built: its models are its own."""
    gc.collect()
    memory = PeakMemory(device)
    act = side.build(rows)
    wait_for(device)
    with memory:
        began = time.perf_counter()
        act()
        wait_for(device)
        seconds = time.perf_counter() - began
    return seconds, memory.used


def measure(part: str, sides: Sequence[Side], *, repeats: int, device: torch.device) -> list[Measured]:
    """All sides of a part, taking turns."""
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
                # a process keeps freed memory, so that later growth looks too small: the largest counts
                memory[side.name] = max(memory[side.name], used)
                bar.update()
    return [Measured(side.name, rates[side.name], memory[side.name]) for side in sides]


def ratios(ours: Measured, theirs: Measured) -> list[float]:
    """How many times as fast we are, for each repetition."""
    return [mine / other for mine, other in zip(ours.rates, theirs.rates, strict=True)]


def round_seconds(rates: dict[str, float], *, pairs: int, passages: int) -> float:
    """Seconds of a whole round, from the rates of its four parts."""
    work = {"generator": pairs, "retriever": pairs, "index": passages, "retrieval": pairs}
    return sum(amount / rates[part] for part, amount in work.items())


def training_flops(
    *, layers: int, width: int, inner: int, vocabulary: int, lengths: Sequence[int], targets: Sequence[int]
) -> int:
    """Model FLOPs of training a GPT-2 once on examples: what the mathematics needs, whatever a program computes besides.

    A parameter of a matrix costs a token 2 FLOPs forward and 4 backward. With d the width and m the inner width:
    layers but the last, 6 * (4 d^2 + 2 d m) for each token; attention, 6 * d * length^2 for each example (12 for two
    products of all pairs of tokens, half of it as a token sees no later one); the last layer, 6 * 3 d^2 for each token
    (its keys and values are read of all; queries are one product with them) and 6 * (d^2 + 2 d m) + 12 * d * length for each
    answer token; head, 6 * d * vocabulary for each answer token. Padding, recomputation, biases, norms and the optimizer do not count.

    Args:
        lengths: tokens of each example; targets: answer tokens (EOS too) of each.
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

    def build(rows: int) -> Callable[[], object]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def act() -> None:
            for _ in range(rows // flops):
                torch.mm(left, right, out=out)

        return act

    return Side("matrix product", flops * count, flops, build)
