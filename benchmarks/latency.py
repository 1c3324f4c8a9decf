"""How fast a pair answers: each question alone, and many together. Numbers of one machine, kept apart from the scores.

Left out: what the speed benchmark measures, the parts of training (speed.py).
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm

from cozyrag.training.run_log import peak_memory

WARM_UP = 3


class Clock:
    """Seconds of the parts of a benchmark, as the main process saw them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a part."""
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def latencies(answer: Callable[[list[str]], object], questions: Sequence[str]) -> dict:
    """Milliseconds of questions asked one by one, after a few that do not count: median and 95th percentile."""
    for question in questions[:WARM_UP]:
        answer([question])
    took = []
    for question in tqdm(questions, desc="one question at a time", unit="question"):
        began = time.perf_counter()
        answer([question])
        took.append(1000 * (time.perf_counter() - began))
    middle, slow = np.quantile(took, [0.5, 0.95])
    return {"questions": len(took), "p50_ms": round(float(middle), 1), "p95_ms": round(float(slow), 1)}


def machine_facts(accelerator: Accelerator) -> dict:
    """What the times belong to."""
    return {
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }
