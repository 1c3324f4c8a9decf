"""The precision that fits the machine: bf16 where the hardware has it and a product of matrices shows that it pays, else float32.

Most of a training step is products of matrices, so their rates decide. Without native bf16 the arithmetic is emulated
and slower than float32, often many times, so the hardware is asked before anything is timed. Left out: settings and several
processes (run.py), and which parts of a run compute in that precision (those that Accelerate's autocast covers).
"""

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cozyrag.errors import InputError

MEASURED = "precision_measured"  # beside the settings in settings.json
ALLOW_EMULATED = "COZYRAG_ALLOW_EMULATED_BF16"
LAUNCHER = "ACCELERATE_MIXED_PRECISION"
WORTH = 1.5  # bf16 must be so many times as fast as float32
SMALLEST, LARGEST = 256, 2048  # rows and columns of the matrices
QUICK, SPENT = 0.02, 0.1  # seconds: of a product, so that a larger one is tried; of all products of one kind
PRODUCTS = 8  # in a row on a GPU, where starting one takes as long as a small one
EMULATED = "bf16 is only emulated here: two to three times slower than float32, or worse"


@dataclass(frozen=True)
class Precision:
    """What a run computes in, and why.

    name: "bf16", "no" (float32), "fp16" or "fp8". reason: fit to follow the name and a colon. float32, bf16: rates of matrix
    products in GFLOP/s, None where they were not measured. note: a sentence for the log where it is slow, else "".
    kept: an interrupted run began with it.
    """

    name: str
    reason: str
    float32: float | None = None
    bf16: float | None = None
    note: str = ""
    kept: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times as fast as float32 bf16 is, None where it was not measured."""
        return self.bf16 / self.float32 if self.float32 and self.bf16 else None

    def sentence(self) -> str:
        """For a line of the log, without a full stop."""
        return f"precision {told(self.name)}: {'kept, as the run began with it' if self.kept else self.reason}"

    def facts(self) -> dict:
        """What was measured, for settings.json and metrics.jsonl; None where nothing was."""
        rates = {"float32_gflops": self.float32, "bf16_gflops": self.bf16, "ratio": self.ratio}
        return {name: value and round(value, 2) for name, value in rates.items()} | {"reason": self.reason}

    @classmethod
    def began_with(cls, settings: Mapping) -> "Precision":
        """That of an interrupted run, from what stands in its settings.json."""
        facts = settings.get(MEASURED) or {"reason": "as the run began"}
        rates = facts.get("float32_gflops"), facts.get("bf16_gflops")
        return cls(settings["mixed_precision"], facts["reason"], *rates, kept=True)


def told(name: str) -> str:
    """The name for people: that of float32 is "no" for Accelerate."""
    return "float32" if name == "no" else name


def asked_at_launch(environment: Mapping[str, str]) -> str | None:
    """The precision that accelerate launch was told; it says "no" also where it was told nothing, which asks for nothing."""
    asked = environment.get(LAUNCHER, "no").lower()
    return asked if asked in ("bf16", "fp16", "fp8") else None


# ---- the machine


def native_bf16(device: str) -> bool:
    """Whether the hardware computes in bf16 itself. device: "cpu" or "cuda".

    oneDNN says yes of every x86 processor with AVX-512, where it emulates; so the instructions are asked for, too.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available() or not _says(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return any(_says(torch.cpu, name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _says(owner: object, name: str) -> bool:
    """The answer of one of PyTorch's private questions; no where a version does not have it."""
    question = getattr(owner, name, None)
    return bool(question and question())


def measure_products(device: str = "cpu") -> tuple[float, float]:
    """Rates of matrix products in (float32, bf16), in GFLOP/s: best of a few, about a third of a second together.

    Matrices have 2048 rows and columns, fewer where that would take long, as it does where bf16 is emulated.
    """
    return _rate(torch.float32, device), _rate(torch.bfloat16, device)


def float32_rate(device: str = "cpu") -> float:
    """Rate of matrix products in float32, in GFLOP/s, in a tenth of a second."""
    return _rate(torch.float32, device)


def _rate(kind: torch.dtype, device: str) -> float:
    size = SMALLEST
    _product_seconds(size, kind, device)  # the first one also makes its kernel
    best = _product_seconds(size, kind, device)
    while size < LARGEST and best < QUICK:
        size *= 2
        best = _product_seconds(size, kind, device)
    until = time.perf_counter() + SPENT
    while time.perf_counter() < until:
        best = min(best, _product_seconds(size, kind, device))
    return 2 * size**3 / best / 1e9


def _product_seconds(size: int, kind: torch.dtype, device: str) -> float:
    """Seconds of one product of two square matrices."""
    matrix = torch.ones(size, size, dtype=kind, device=device)
    count = 1 if device == "cpu" else PRODUCTS
    _wait(device)
    started = time.perf_counter()
    for _ in range(count):
        matrix @ matrix
    _wait(device)
    return (time.perf_counter() - started) / count


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


# ---- the choice


def choose(device: str, asked: str | None = None, kept: Precision | None = None) -> Precision:
    """What a run computes in on this process.

    Args:
        device: "cpu", "cuda", ... asked: by the user; None: what fits the machine. kept: what an interrupted run began with, which
            goes before what fits the machine.

    Raises:
        InputError: it was asked for and cannot be had here, or only emulated on a CPU.
    """
    if kept is not None:
        check_asked(kept.name, device, emulated=True)
        return replace(kept, note=_note_on_kept(kept.name, device, measure=asked is None))
    if asked is None:
        return fitting(device)
    check_asked(asked, device)
    return Precision(asked, "as asked for", note=f"{EMULATED}." if _is_emulated(asked, device) else "")


def fitting(device: str, rates: tuple[float, float] | None = None) -> Precision:
    """What fits the machine. rates: of `measure_products` where they are known; else they are measured if they matter."""
    if device not in ("cpu", "cuda"):
        return Precision("no", f"on {device} bf16 is taken only where it is asked for")
    if not native_bf16(device):
        return Precision("no", f"this {'processor' if device == 'cpu' else 'GPU'} has no native bf16")
    if device == "cuda":
        return Precision("bf16", "this GPU has it natively")
    float32, bf16 = rates or measure_products()
    found = f"({bf16:.0f} against {float32:.0f} GFLOP/s)"
    if bf16 < WORTH * float32:
        return Precision(
            "no", f"in bf16 a product of matrices is only {bf16 / float32:.1f} times as fast {found}", float32, bf16
        )
    return Precision(
        "bf16", f"a product of matrices is {bf16 / float32:.1f} times as fast as in float32 {found}", float32, bf16
    )


def agreed(choices: Sequence[Precision]) -> Precision:
    """One for all processes of a run: bf16 only if each of them says so, and then with the figures of the one that gains least."""
    least = min(choices, key=lambda choice: (choice.name == "bf16", choice.ratio or math.inf))
    return replace(least, note=next((choice.note for choice in choices if choice.note), ""))


def check_asked(asked: str | None, device: str, *, emulated: bool = False) -> None:
    """Refuse what was asked for and does not work on this device. Raises InputError.

    emulated: let bf16 pass on a CPU that only emulates it, since it was begun with elsewhere, or nothing is trained.
    """
    emulated = emulated or os.environ.get(ALLOW_EMULATED) == "1"
    if asked == "fp16" and device == "cpu":
        raise InputError(
            "--mixed_precision fp16: expected a GPU, found only the CPU. Leave it out, or use no (or bf16 on a CPU that has it)."
        )
    if device == "cpu" and not emulated and _is_emulated(asked, device):
        raise InputError(
            "--mixed_precision bf16: expected a processor with native bf16, found one without, where bf16 is emulated and two to three times slower "
            "than float32, or worse. Leave it out, in the config of accelerate launch too, or give --mixed_precision no."
        )


def _is_emulated(name: str | None, device: str) -> bool:
    return name == "bf16" and device in ("cpu", "cuda") and not native_bf16(device)


def _note_on_kept(name: str, device: str, *, measure: bool) -> str:
    """A sentence where another precision would be faster on this machine; only what can be told unmeasured without `measure`."""
    if _is_emulated(name, device):
        return f"{EMULATED}; the run keeps the precision it began with."
    here = fitting(device) if measure and name in ("no", "bf16") else None
    if here and name == "no" and here.name == "bf16":
        return f"bf16 would be faster here ({here.reason}); the run keeps float32, which it began with."
    if here and name == "bf16" and here.ratio and here.ratio < 1:
        return f"bf16 is slower than float32 here ({here.bf16:.0f} against {here.float32:.0f} GFLOP/s); the run keeps the precision it began with."
    return ""
