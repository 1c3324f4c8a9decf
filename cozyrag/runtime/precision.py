"""The precision that fits the machine: bf16 if the hardware has it and it speeds up matrix products, else float32.

Most of a training step is matrix products, so their rates decide. Without native bf16 it is emulated and slower than
float32, often many times, so the hardware is checked before anything is timed. Left out: settings and several processes
(run.py), and which parts of a run compute in that precision (those that Accelerate's autocast covers).
"""

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cozyrag.errors import InputError

MEASURED = "precision_measured"  # beside the settings in settings.json
ALLOW_EMULATED = "COZYRAG_ALLOW_EMULATED_BF16"
FLOAT32_ONLY = "COZYRAG_FLOAT32"  # 1: what is not asked for is computed in float32, on every machine
LAUNCHER = "ACCELERATE_MIXED_PRECISION"
WORTH = 1.5  # bf16 is taken if it is at least this many times as fast as float32
TRIES = 6  # timings before native bf16 counts as not worth it: another job can take a core during one
SMALLEST, LARGEST = 256, 2048  # rows and columns of the matrices
QUICK, SPENT = 0.02, 0.1  # seconds: of a product below which a larger one is tried; of all products of one kind
PRODUCTS = 8  # per timing on a GPU, where a launch takes as long as a small product
EMULATED = "bf16 is only emulated here: two to three times slower than float32, or worse"


@dataclass(frozen=True)
class Precision:
    """The precision of a run, and why; rates of matrix products are in GFLOP/s, None if not measured."""

    name: str  # "bf16", "no" (float32), "fp16" or "fp8"
    reason: str  # text to follow the name
    float32: float | None = None
    bf16: float | None = None
    note: str = ""  # a sentence for the log if the precision is slow
    kept: bool = False  # whether an interrupted run began with it

    @property
    def rates(self) -> tuple[float, float] | None:
        """Those of (float32, bf16), None if not measured."""
        return (self.float32, self.bf16) if self.float32 and self.bf16 else None

    @property
    def ratio(self) -> float | None:
        """The rate of bf16 over that of float32, None if not measured."""
        return self.rates and self.rates[1] / self.rates[0]

    def sentence(self) -> str:
        """A line for the log, without a full stop."""
        return f"precision {display_name(self.name)}: {'kept, as the run began with it' if self.kept else self.reason}"

    def facts(self) -> dict:
        """The measurement, for settings.json and metrics.jsonl; None for what was not measured."""
        rates = {"float32_gflops": self.float32, "bf16_gflops": self.bf16, "ratio": self.ratio}
        return {name: value and round(value, 2) for name, value in rates.items()} | {"reason": self.reason}

    @classmethod
    def began_with(cls, settings: Mapping) -> "Precision":
        """The precision of an interrupted run, from its settings.json."""
        facts = settings.get(MEASURED) or {"reason": "as the run began"}
        rates = facts.get("float32_gflops"), facts.get("bf16_gflops")
        return cls(settings["mixed_precision"], facts["reason"], *rates, kept=True)


def display_name(name: str) -> str:
    """The name of a precision for people: Accelerate calls float32 "no"."""
    return "float32" if name == "no" else name


def asked_at_launch(environment: Mapping[str, str]) -> str | None:
    """The precision given to accelerate launch; its "no" is also the default, so it counts as nothing given."""
    asked = environment.get(LAUNCHER, "no").lower()
    return asked if asked in ("bf16", "fp16", "fp8") else None


def native_bf16(device: str) -> bool:
    """Whether the hardware itself computes in bf16. device: "cpu" or "cuda".

    oneDNN reports support on every x86 processor with AVX-512, where it emulates, so the instructions are checked too.
    """
    import torch  # here and below: the settings need only the names of this module

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not _reports(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return any(_reports(torch.cpu, name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _reports(owner: object, name: str) -> bool:
    """The answer of one of PyTorch's private checks; False if this version does not have it."""
    check = getattr(owner, name, None)
    return bool(check and check())


def measure_products(device: str = "cpu") -> tuple[float, float]:
    """Rates of matrix products in (float32, bf16), in GFLOP/s: the best of a few, in about a third of a second."""
    return _rate("float32", device), _rate("bfloat16", device)


def float32_rate(device: str = "cpu") -> float:
    """The rate of matrix products in float32, in GFLOP/s, measured in a tenth of a second."""
    return _rate("float32", device)


def _rate(kind: str, device: str) -> float:
    size = SMALLEST
    _product_seconds(size, kind, device)  # the first call also compiles the kernel
    best = _product_seconds(size, kind, device)
    while size < LARGEST and best < QUICK:
        size *= 2
        best = _product_seconds(size, kind, device)
    until = time.perf_counter() + SPENT
    while time.perf_counter() < until:
        best = min(best, _product_seconds(size, kind, device))
    return 2 * size**3 / best / 1e9


def _product_seconds(size: int, kind: str, device: str) -> float:
    """Seconds of one product of two square matrices; `kind` names a type of PyTorch."""
    import torch

    matrix = torch.ones(size, size, dtype=getattr(torch, kind), device=device)
    count, synchronize = (1, lambda: None) if device == "cpu" else (PRODUCTS, torch.accelerator.synchronize)
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        matrix @ matrix
    synchronize()
    return (time.perf_counter() - started) / count


def choose(device: str, asked: str | None = None, kept: Precision | None = None) -> Precision:
    """The precision of a run on this process: that of an interrupted run, else the user's choice, else what fits.

    Raises InputError if it is not available here, or only emulated on a CPU.
    """
    if kept is not None:
        check_asked(kept.name, device, emulated=True)
        return replace(kept, note=_note_on_kept(kept.name, device, measure=asked is None))
    if asked is None:
        return fitting(device)
    check_asked(asked, device)
    return Precision(asked, "as asked for", note=f"{EMULATED}." if _is_emulated(asked, device) else "")


def fitting(device: str) -> Precision:
    """What fits the machine; rates of products are measured if they matter."""
    if device not in ("cpu", "cuda"):
        return Precision("no", f"on {device} bf16 is used only if asked for")
    if not native_bf16(device):
        return Precision("no", f"this {'processor' if device == 'cpu' else 'GPU'} has no native bf16")
    if os.environ.get(FLOAT32_ONLY) == "1":
        return Precision("no", f"{FLOAT32_ONLY}=1 asks for it")
    if device == "cuda":
        return Precision("bf16", "this GPU has it natively")
    float32, bf16 = _confirmed_rates()
    ratio, found = bf16 / float32, f"({bf16:.0f} against {float32:.0f} GFLOP/s)"
    if bf16 < WORTH * float32:
        return Precision("no", f"in bf16 a matrix product is only {ratio:.1f} times as fast {found}", float32, bf16)
    return Precision("bf16", f"a matrix product is {ratio:.1f} times as fast as in float32 {found}", float32, bf16)


def _confirmed_rates() -> tuple[float, float]:
    """Rates of products on the CPU, the best of a few timings as long as bf16 seems not worth it."""
    float32, bf16 = measure_products()
    for _ in range(TRIES - 1):
        if bf16 >= WORTH * float32:
            break
        again = measure_products()
        float32, bf16 = max(float32, again[0]), max(bf16, again[1])
    return float32, bf16


def agreed(choices: Sequence[Precision]) -> Precision:
    """One precision for all processes of a run: bf16 only if all choose it, with the rates of the smallest gain."""
    least = min(choices, key=lambda choice: (choice.name == "bf16", choice.ratio or math.inf))
    return replace(least, note=next((choice.note for choice in choices if choice.note), ""))


def check_asked(asked: str | None, device: str, *, emulated: bool = False) -> None:
    """Raise InputError for a precision that does not work on this device.

    emulated: accept bf16 on a CPU that only emulates it, since the run began with it elsewhere, or nothing is trained.
    """
    if asked == "fp16" and device == "cpu":
        raise InputError(
            "--mixed_precision fp16: expected a GPU, found only the CPU. Leave it out, or use no (or bf16, if the CPU "
            "has it)."
        )
    emulated = emulated or os.environ.get(ALLOW_EMULATED) == "1"
    if device == "cpu" and not emulated and _is_emulated(asked, device):
        raise InputError(
            "--mixed_precision bf16: expected a processor with native bf16, found one without, where bf16 is emulated "
            "and two to three times slower than float32, or worse. Leave it out, in the config of accelerate launch "
            "too, or give --mixed_precision no."
        )


def _is_emulated(name: str | None, device: str) -> bool:
    return name == "bf16" and device in ("cpu", "cuda") and not native_bf16(device)


def _note_on_kept(name: str, device: str, *, measure: bool) -> str:
    """A sentence if another precision is faster on this machine; without `measure` only what needs no measurement."""
    if _is_emulated(name, device):
        return f"{EMULATED}; the run keeps the precision it began with."
    here = fitting(device) if measure and name in ("no", "bf16") else None
    if here and name == "no" and here.name == "bf16":
        return f"bf16 would be faster here ({here.reason}); the run keeps float32, which it began with."
    if here and name == "bf16" and here.ratio and here.ratio < 1:
        rates = f"{here.bf16:.0f} against {here.float32:.0f} GFLOP/s"
        return f"bf16 is slower than float32 here ({rates}); the run keeps the precision it began with."
    return ""
