"""What a run is made on and what that takes: the machine, its free memory, the versions, an estimate of the energy.

The estimate of the energy is arithmetic from assumed watts, said with it; nothing is measured. Left out: carbon, which depends on where
the electricity comes from, and speed (plan.py).
"""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

PACKAGES = (
    "cozyrag",
    "torch",
    "transformers",
    "sentence-transformers",
    "datasets",
    "accelerate",
    "faiss-cpu",
    "huggingface_hub",
)
CGROUP = Path("/sys/fs/cgroup")  # of this process's container on Linux
CORE_WATTS = 10.0  # a busy core of a desktop or server processor: 65 to 125 W over 8 to 16 cores
MEMORY_WATTS = 0.375  # a gigabyte: 3 W for 8 GB, https://mlco2.github.io/codecarbon/methodology.html
GPU_WATTS = 300.0  # a GPU whose board power is not known here
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
    """What the run runs on, fit for JSON: system, processor, cores, memory in GB, GPUs by name, versions of packages.

    Args:
        processes: of the run, on one machine. threads: of each. device: "cpu", "cuda", ...
    """
    gpus = (
        [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if device == "cuda" else []
    )
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "busy_cores": min(processes * threads, os.cpu_count() or 1),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpus": gpus[:processes],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def free_memory(cgroup: Path = CGROUP) -> float:
    """Bytes that this process may still take: those of the machine, or those of its container where they are fewer."""
    free = psutil.virtual_memory().available
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


def room_for_training(device: torch.device) -> float:
    """Bytes that a process may take for training: those free on its GPU, else its share of those free on the machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _processor() -> str:
    """Its name as Linux knows it; elsewhere what Python knows, which may be little."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_sentence(machine: Mapping) -> str:
    """The machine in a line."""
    gpus = f"; {', '.join(machine['gpus'])}" if machine["gpus"] else "; no GPU"
    return (
        f"{machine['processor']}, {machine['busy_cores']} of {machine['cores']} cores, {machine['memory_gb']} GB of memory{gpus}; "
        f"{machine['system']}"
    )


def energy_sentence(machine: Mapping, seconds: float) -> str:
    """Kilowatt-hours of so many seconds, with the formula and every assumed number."""
    hours = seconds / 3600
    parts = [(machine["busy_cores"], "busy cores", CORE_WATTS), (machine["memory_gb"], "GB of memory", MEMORY_WATTS)]
    parts += [(1, name, _board_watts(name)) for name in machine["gpus"]]
    watts = sum(count * each for count, _, each in parts)
    terms = " + ".join(f"{count} {name} × {each:g} W" for count, name, each in parts)
    return f"about {hours * watts / 1000:.2g} kWh = {hours:.2g} h × ({terms}); these watts are assumed, not measured"


def _board_watts(name: str) -> float:
    words = name.replace("-", " ").split()
    return float(next((watts for model, watts in BOARD_WATTS.items() if model in words), GPU_WATTS))
