"""What the probe of a plan measures with: a clock, the memory of this process, the seconds of training steps.

Left out: what is measured (probe.py, phase_probe.py), and what follows from it (cost_model.py).
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from cozyrag.preflight.cost_model import is_sure
from cozyrag.training.run_log import peak_memory
from cozyrag.training.trainer import PhaseCallback, StepReport


def timed(act: Callable) -> tuple[float, object]:
    """(seconds, what it returned) of a piece of work, to the end of what it left to a GPU."""
    clock = time.perf_counter()
    made = act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock, made


def memory_now() -> int:
    """Bytes this process holds; outside of Linux the most it has held so far."""
    if sys.platform != "linux":
        return peak_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def forget_peak() -> None:
    """Let the peak of this process be counted from now on, where the system can; elsewhere it stays the highest so far."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists() and os.access(switch, os.W_OK):
        switch.write_text("5")


class Growth:
    """How far the peak of memory on a device lies above what was held at the beginning.

    peak: most bytes of this process that were seen; a GPU's are not among them.
    """

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0
        self.begin()

    def begin(self) -> None:
        """Take what is held now for the beginning."""
        cuda = self.device.type == "cuda"
        self.begun_with = torch.cuda.memory_allocated(self.device) if cuda else memory_now()

    def bytes(self, *, reset: bool) -> int:
        """Bytes that the peak lies above the beginning; `reset` counts it anew from here."""
        if self.device.type == "cuda":
            found = max(0, torch.cuda.max_memory_allocated(self.device) - self.begun_with)
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
            return found
        self.peak = max(self.peak, peak_memory())
        found = max(0, peak_memory() - self.begun_with)
        if reset:
            forget_peak()
        return found


class Stopwatch(PhaseCallback):
    """A watcher that notes the seconds of every step and ends the phase when its time is over or it is sure."""

    def __init__(self, sizes: list[tuple[int, float]], ends: float):
        self.sizes, self.ends = sizes, ends
        self.measured: list[tuple[float, float]] = []

    def after_step(self, report: StepReport) -> bool:
        """All processes end together: the first one decides."""
        rows, units = self.sizes[report.step - 1]
        self.measured.append((units, rows / report.rate))
        spent = time.perf_counter() > self.ends
        return broadcast_object_list([spent or is_sure(self.measured[1:])])[0]
