"""The hardware and software of a run: machine, free memory, versions of packages, an estimate of the energy.

The energy is computed from assumed watts, which are stated with it; nothing is measured. Left out: carbon, which
depends on the source of the electricity, and speed (plan.py).
"""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

PACKAGES = "cozyrag torch transformers sentence-transformers datasets accelerate faiss-cpu huggingface_hub".split()
ROUNDING = {"processor": "processor", "busy_cores": "busy cores", "gpus": "GPUs"}  # facts that decide the order of sums
CGROUP = Path("/sys/fs/cgroup")  # of this process's container on Linux
CORE_WATTS = 10.0  # a busy core of a desktop or server processor: 65 to 125 W over 8 to 16 cores
MEMORY_WATTS = 0.375  # a gigabyte: 3 W for 8 GB, https://mlco2.github.io/codecarbon/methodology.html
GPU_WATTS = 300.0  # a GPU whose board power is not listed here
BOARD_WATTS = {
    "T4": 70,
    "L4": 72,
    "A10": 150,
    "V100": 300,
    "A100": 400,
    "H100": 700,
    "H200": 700,
    "3090": 350,
    "4090": 450,
}


def machine_facts(*, processes: int, threads: int, device: str) -> dict:
    """The machine of a run, for JSON: system, processor, cores, memory in GB, GPUs by name, versions of packages.

    Args:
        processes: of the run, on one machine. threads: of each process. device: "cpu", "cuda", ...
    """
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count() if device == "cuda" else 0
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": _processor(),
        "cores": cores,
        "busy_cores": min(processes * threads, cores),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpus": [torch.cuda.get_device_name(number) for number in range(min(gpus, processes))],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def changed_rounding(before: Mapping, now: Mapping) -> str | None:
    """A sentence on how two `machine_facts` differ in what decides the rounding of sums; None if they do not.

    Entries that only one of them has, from another version of this package, are not compared.
    """
    olds, news = map(_rounding, (before, now))
    names = [name for name in news if name in olds and olds[name] != news[name]]
    changed = [f"{name} (was {olds[name]}, now {news[name]})" for name in names]
    if not changed:
        return None
    return (
        f"Note: this run began with other {', '.join(changed)}. It will end as good, but not with the same losses and "
        "weights to the last bit."
    )


def _rounding(machine: Mapping) -> dict[str, object]:
    """What decides the rounding of sums, by its name in a sentence."""
    named = {words: machine[name] for name, words in ROUNDING.items() if name in machine}
    return named | {f"version of {name}": each for name, each in machine.get("versions", {}).items()}


def free_memory(cgroup: Path = CGROUP) -> float:
    """Bytes that this process may still allocate: those free on the machine, or in its container if they are fewer."""
    free = psutil.virtual_memory().available
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


def room_for_training(device: torch.device) -> float:
    """Bytes that a process may use for training: those free on its GPU, else its share of the free memory."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _processor() -> str:
    """The model name on Linux; elsewhere what Python reports, which may be little."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").split("\n") if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_sentence(machine: Mapping) -> str:
    """The facts of `machine_facts` in one line."""
    return (
        f"{machine['processor']}, {machine['busy_cores']} of {machine['cores']} cores, {machine['memory_gb']} GB of "
        f"memory; {', '.join(machine['gpus']) or 'no GPU'}; {machine['system']}"
    )


def energy_sentence(machine: Mapping, seconds: float) -> str:
    """The kilowatt-hours of so many seconds, with the formula and all assumed numbers."""
    hours = seconds / 3600
    parts = [(machine["busy_cores"], "busy cores", CORE_WATTS), (machine["memory_gb"], "GB of memory", MEMORY_WATTS)]
    for name in machine["gpus"]:
        words = name.replace("-", " ").split()
        parts.append((1, name, next((float(each) for model, each in BOARD_WATTS.items() if model in words), GPU_WATTS)))
    watts = sum(count * each for count, _, each in parts)
    terms = " + ".join(f"{count} {name} × {each:g} W" for count, name, each in parts)
    return f"about {hours * watts / 1000:.2g} kWh = {hours:.2g} h × ({terms}); these watts are assumed, not measured"
