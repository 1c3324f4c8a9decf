"""Check this machine: what is installed, what is free, whether the Hub answers, and whether a few steps lower a loss.

`inspect_machine` collects facts and `judge` judges them, so that tests can judge any machine. Left out: what one run
needs (`cozyrag plan`), and its settings and data (`cozyrag doctor SETTINGS`).
"""

import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from transformers import GPT2Config

from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.smollm2 import HINT
from cozyrag.retrieval.passage_index import search_shards
from cozyrag.runtime.hardware import CGROUP, free_memory
from cozyrag.runtime.precision import Precision, display_name, fitting, measure_products

OLDEST_PYTHON = (3, 11)
NEEDED_MEMORY = 4e9  # weights, gradients and AdamW states of both default models take 1.7 GB; libraries, data, a batch
NEEDED_DISK = 4e9  # two checkpoints with AdamW states, the finished pair, and the models in the Hub's cache
EXTRAS = {  # of setup.cfg, with a module of each
    "demo": "gradio",
    "serve": "fastapi",
    "endpoint": "openai",
    "plots": "matplotlib",
    "pdf": "pypdf",
    "web": "trafilatura",
    "office": "pypandoc",
    "lora": "peft",
    "int8": "onnxruntime",
    "lancedb": "lancedb",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "benchmarks": "evaluate",
}
HUB_SECONDS = 4.0
STEPS = 20
SHARE_LEFT = 0.9  # the loss of the self-test falls to about half


@dataclass(frozen=True)
class Machine:
    """Facts about a machine. memory, disk: free bytes. openmp: names of the OpenMP runtimes that are loaded.

    hub: why it does not answer, or "". losses: before and after a few training steps. faiss_agrees: whether FAISS finds
    what NumPy finds. rates: of matrix products in (float32, bf16), in GFLOP/s. precision: what training would use.
    """

    system: str
    python: tuple[int, ...]
    torch: str
    torch_cuda: bool
    nvidia: bool
    openmp: tuple[str, ...]
    duplicates_allowed: bool
    cores: int
    threads_asked: str
    memory: float
    disk: float
    missing: tuple[str, ...]
    hub: str
    losses: tuple[float, float]
    faiss_agrees: bool
    rates: tuple[float, float]
    precision: Precision


@dataclass(frozen=True)
class Check:
    """The result of one check. remedy: what to do, or "". stops: whether no run can work on this machine."""

    what: str
    found: str
    remedy: str = ""
    stops: bool = False

    def __str__(self) -> str:
        mark = "FAULT" if self.stops else "note" if self.remedy else "ok"
        return f"{mark:5}  {self.what}: {self.found}{f'. {self.remedy}' if self.remedy else ''}"


def check_machine(folder: str = ".", *, endpoint: str | None = None) -> Iterator[str]:
    """The findings as lines; `folder`: where the output would go. Raises InputError if one of them stops every run."""
    started = time.perf_counter()
    findings = judge(inspect_machine(folder, endpoint=endpoint or constants.ENDPOINT))
    yield from map(str, findings)
    faults = [finding for finding in findings if finding.stops]
    if faults:
        found = "; ".join(f"{fault.what}: {fault.found}" for fault in faults)
        raise InputError(f"This machine cannot train as it is: {found}. {faults[0].remedy}.")
    yield f"Checked in {time.perf_counter() - started:.1f} s. This machine can train."


# ---- facts


def inspect_machine(folder: str, *, endpoint: str) -> Machine:
    """The facts about this machine. FAISS is used before runtimes are listed, so that its own is loaded."""
    faiss_agrees, losses = try_faiss(), try_training()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = fitting(device)
    return Machine(
        system=platform.system(),
        python=tuple(sys.version_info[:3]),
        torch=torch.__version__,
        torch_cuda=torch.cuda.is_available(),
        nvidia=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        openmp=openmp_runtimes(Path("/proc/self/maps")),
        duplicates_allowed=os.environ.get("KMP_DUPLICATE_LIB_OK", "").upper() in ("TRUE", "1"),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        threads_asked=os.environ.get("OMP_NUM_THREADS", ""),
        memory=free_memory(CGROUP),
        disk=shutil.disk_usage(folder).free,
        missing=tuple(extra for extra, module in EXTRAS.items() if importlib.util.find_spec(module) is None),
        hub=ask_hub(endpoint),
        losses=losses,
        faiss_agrees=faiss_agrees,
        rates=precision.rates or measure_products(device),
        precision=precision,
    )


def openmp_runtimes(maps: Path) -> tuple[str, ...]:
    """Names of the OpenMP runtimes loaded in this process; empty on systems without /proc (macOS)."""
    if not maps.exists():
        return ()
    found = re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)[^/\s]*)$", maps.read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(sorted({Path(path).name for path in found}))


def ask_hub(endpoint: str) -> str:
    """Why the Hub does not answer within seconds, or "". Any HTTP status counts as an answer."""
    try:
        get_session().head(endpoint, timeout=HUB_SECONDS)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (HTTPError, OSError) as error:
        return f"{endpoint} does not answer ({type(error).__name__})"
    return ""


def try_faiss() -> bool:
    """Whether FAISS finds the nearest vectors that NumPy finds."""
    vectors = np.random.default_rng(0).standard_normal((200, 32), dtype=np.float32)
    rows = search_shards([vectors], vectors[:20], 1)[1][:, 0]
    return bool(np.array_equal(rows, (vectors[:20] @ vectors.T).argmax(1)))


def try_training() -> tuple[float, float]:
    """Loss of a tiny GPT-2 on one batch before and after a few gradient steps, on the device that a run would use."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    text = "Which river flows through Vienna? The Danube flows through Vienna."
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64)
    generator = Generator.from_scratch([text], config=config, vocab_size=300)
    model = torch.nn.Module.to(generator.model, "cuda" if torch.cuda.is_available() else "cpu").eval()
    ids = torch.tensor([generator.tokenizer(text)["input_ids"][:64]], device=model.device)
    weights, losses = list(model.parameters()), []
    for _ in range(STEPS + 1):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.1 * gradient
    torch.set_rng_state(state)
    return losses[0], losses[-1]


# ---- decisions


def judge(machine: Machine) -> list[Check]:
    """A finding for each fact, in the order in which a person would fix them."""
    checks = _python, _torch, _openmp, _threads, _memory, _disk, _extras, _hub, _faiss, _arithmetic, _training
    return [check(machine) for check in checks]


def _python(machine: Machine) -> Check:
    found = ".".join(map(str, machine.python))
    if machine.python[:2] < OLDEST_PYTHON:
        return Check("Python", found, "Create an environment with Python 3.11 or later", stops=True)
    return Check("Python", found)


def _torch(machine: Machine) -> Check:
    place = "trains on the GPU" if machine.torch_cuda else "trains on the CPU"
    if machine.nvidia and not machine.torch_cuda:
        remedy = (
            "There is an NVIDIA GPU: install the CUDA build of torch (https://pytorch.org/get-started/locally) "
            "or a newer driver"
        )
        return Check("torch", f"{machine.torch}, {place}", remedy)
    return Check("torch", f"{machine.torch}, {place}")


def _openmp(machine: Machine) -> Check:
    """Two runtimes abort the process on macOS. Elsewhere they compete for cores, and those of two makers may crash."""
    found = ", ".join(machine.openmp) or "unknown on this system"
    if machine.system == "Darwin" and not machine.duplicates_allowed:
        remedy = "Set KMP_DUPLICATE_LIB_OK=TRUE, or import cozyrag before torch and faiss, which sets it"
        return Check("OpenMP", "torch and FAISS each bring a runtime and macOS allows one", remedy, stops=True)
    makers = {found for name in machine.openmp for found in re.findall(r"^lib(gomp|omp|iomp5)", name)}
    if len(makers) > 1:
        remedy = (
            "Runtimes of several makers can crash together: install torch and faiss-cpu both from PyPI, "
            "or both from conda-forge"
        )
        return Check("OpenMP", found, remedy)
    return Check("OpenMP", found)


def _threads(machine: Machine) -> Check:
    asked = machine.threads_asked.split(",")[0].strip()
    found = f"{machine.cores} cores" + (f", OMP_NUM_THREADS={machine.threads_asked}" if asked else "")
    if asked and (not asked.isdigit() or not 1 <= int(asked) <= machine.cores):
        remedy = f"Unset OMP_NUM_THREADS, or set it to at most {machine.cores}: more threads than cores are slower"
        return Check("threads", found, remedy)
    return Check("threads", found)


def _memory(machine: Machine) -> Check:
    found = f"{machine.memory / 1e9:.1f} GB free"
    if machine.memory < NEEDED_MEMORY:
        remedy = (
            f"A run with the default models takes about {NEEDED_MEMORY / 1e9:.0f} GB: close programs or give "
            "--generator embedded, and see what `cozyrag plan` says"
        )
        return Check("memory", found, remedy)
    return Check("memory", found)


def _disk(machine: Machine) -> Check:
    found = f"{machine.disk / 1e9:.1f} GB free here"
    if machine.disk < NEEDED_DISK:
        remedy = (
            f"A run with the default models takes up to {NEEDED_DISK / 1e9:.0f} GB: make room, give --output_dir on "
            "another disk, or set HF_HOME"
        )
        return Check("disk", found, remedy)
    return Check("disk", found)


def _extras(machine: Machine) -> Check:
    if machine.missing:
        remedy = f'If they are wanted: pip install "cozyrag[{",".join(machine.missing)}]"'
        return Check("extras", f"not installed: {', '.join(machine.missing)}", remedy)
    return Check("extras", "all installed")


def _hub(machine: Machine) -> Check:
    if machine.hub:
        remedy = (
            f"Check the network, HTTPS_PROXY and HF_HUB_OFFLINE, or train without it: --retriever embedded and {HINT}"
        )
        return Check("Hugging Face Hub", machine.hub, remedy)
    return Check("Hugging Face Hub", "answers")


def _faiss(machine: Machine) -> Check:
    if not machine.faiss_agrees:
        remedy = "Reinstall it: pip install --force-reinstall --no-deps faiss-cpu"
        return Check("FAISS", "does not find the nearest vectors", remedy, stops=True)
    return Check("FAISS", "finds what NumPy finds")


def _arithmetic(machine: Machine) -> Check:
    """Speed in both precisions, the one that training uses, and why if it is not the faster one."""
    shown = [f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}" for rate in machine.rates]
    why = "" if machine.precision.ratio else f", {machine.precision.reason}"
    found = f"float32 {shown[0]}, bf16 {shown[1]} GFLOP/s; training takes {display_name(machine.precision.name)}{why}"
    return Check("arithmetic", found)


def _training(machine: Machine) -> Check:
    before, after = machine.losses
    found = f"the loss of a tiny model goes from {before:.2f} to {after:.2f} in {STEPS} steps"
    if not after <= SHARE_LEFT * before:  # true for NaN, too
        remedy = (
            "Arithmetic is not right here: reinstall torch, try --use_cpu, and without a GPU set "
            "ATEN_CPU_CAPABILITY=default"
        )
        return Check("training", found, remedy, stops=True)
    return Check("training", found)
