"""How much faster is each part in the precision that fits the machine (auto) than in float32?

    python -m benchmarks.speed.precision --repeats 3 --json precision.json

Generator steps (the shapes of distilgpt2 and of SmolLM2-135M, random weights) and retriever steps (all-MiniLM-L6-v2),
encoding of passages, answers, and likelihoods. The two precisions alternate, each in a process of its own; the table
has medians and the ratios of each pair of processes. Where auto is float32, the ratios show the noise of the machine.
Left out: whether answers stay the same (quality/precision.py).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from benchmarks.shared.measuring import spread
from benchmarks.speed.micro_batches import ANSWER, ROWS, SHAPE, TOKENS, WORDS, retriever_work
from cozyrag.cli import entry_point
from cozyrag.config import TrainingSettings
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import reading_precision
from cozyrag.models.lean_layers import bf16_step
from cozyrag.models.loading import training_config
from cozyrag.models.prompts import Example
from cozyrag.models.retriever import Retriever
from cozyrag.models.token_losses import TokenLosses
from cozyrag.runtime.precision import display_name, fitting, measure_products
from cozyrag.training import retriever_phase
from cozyrag.training.generator_phase import generator_cut, generator_step
from cozyrag.training.trainer import trainable

DISTILGPT2 = GPT2Config(n_layer=6)
NUMBER, NEW_TOKENS = 64, 8  # texts that are encoded, answered, or scored; tokens of each answer
QUESTION = "Which river flows past the old stone bridge?"
PARTS = {
    "distilgpt2": "generator steps, distilgpt2, rows/s",
    "plain distilgpt2": "the same, layers of transformers, rows/s",
    "smollm2": "generator steps, SmolLM2, rows/s",
    "plain smollm2": "the same, layers of transformers, rows/s",
    "retriever": "retriever steps, questions/s",
    "plain retriever": "the same, attention of PyTorch, questions/s",
    "encoding": "encoding, passages/s",
    "answers": "answers, SmolLM2, questions/s",
    "likelihoods": "likelihoods, SmolLM2, rows/s",
}


def seconds_of(work: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Seconds of a second call; the first one loads kernels."""
    work()
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def step_of(accelerator: Accelerator, module: torch.nn.Module, gradients: Callable[[], object]) -> Callable[[], None]:
    """A whole step: gradients and AdamW."""
    optimizer = torch.optim.AdamW(trainable(module), lr=1e-5, fused=True)

    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generator_of(accelerator: Accelerator, model: PreTrainedModel) -> Generator:
    """A generator with these weights and a small tokenizer, which infers in the precision of the Accelerator."""
    generator = Generator(model.to(accelerator.device), Generator.from_scratch([QUESTION, *WORDS]).tokenizer)
    generator.precision = reading_precision(accelerator.mixed_precision)
    return generator


def training_step(
    accelerator: Accelerator, generator: Generator, around: Callable[..., AbstractContextManager] = bf16_step
) -> Callable[[], None]:
    """A step of the generator over ROWS rows. around: as training enters it for each step."""
    generator.model.train()
    cut = generator_cut(accelerator, generator, TrainingSettings(), TOKENS)
    module = accelerator.prepare(TokenLosses(generator.model))
    rows = [Example(torch.randint(5, 8_000, (TOKENS,)).tolist(), TOKENS - ANSWER) for _ in range(ROWS)]

    def gradients() -> None:
        with around(accelerator, generator.model):
            generator_step(accelerator, module, rows, pad_id=0, cut=cut)

    return step_of(accelerator, module, gradients)


def rates(precision: str) -> dict[str, float]:
    """Rows per second of each part in that precision."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=precision, step_scheduler_with_optimizer=False)
    synchronize = torch.accelerator.synchronize if accelerator.device.type != "cpu" else lambda: None
    draw = random.Random(0)
    passages = [" ".join(draw.choices(WORDS, k=110)) for _ in range(NUMBER)]
    asked, contexts = [QUESTION] * NUMBER, [" ".join(text.split()[:70]) for text in passages]

    def rate(count: int, work: Callable[[], object]) -> float:
        return count / seconds_of(work, synchronize)

    found = {}
    retriever = Retriever.load_embedded(max_tokens=192, device=str(accelerator.device))
    retriever.precision = reading_precision(precision)
    found["encoding"] = rate(NUMBER, lambda: retriever.encode(passages, kind="document", batch_size=NUMBER))
    module, gradients = retriever_work(accelerator, "auto")
    found["retriever"] = rate(64, step_of(accelerator, module, gradients))
    with patch.object(retriever_phase, "attention_by_products", lambda *_: nullcontext()):
        found["plain retriever"] = rate(64, step_of(accelerator, module, gradients))
    small = generator_of(accelerator, GPT2LMHeadModel(training_config(DISTILGPT2, 0.0)))
    found["distilgpt2"] = rate(ROWS, training_step(accelerator, small))
    found["plain distilgpt2"] = rate(ROWS, training_step(accelerator, small, lambda *_: nullcontext()))
    generator = generator_of(accelerator, LlamaForCausalLM(SHAPE))
    limits = {"context_tokens": 96, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    found["answers"] = rate(NUMBER, lambda: generator.write(asked, contexts, **limits))
    answers = ["the river"] * NUMBER
    found["likelihoods"] = rate(NUMBER, lambda: generator.log_likelihoods(asked, contexts, answers, context_tokens=96))
    found["smollm2"] = rate(ROWS, training_step(accelerator, generator))
    found["plain smollm2"] = rate(ROWS, training_step(accelerator, generator, lambda *_: nullcontext()))
    return found


def in_own_process(precision: str, threads: int) -> dict[str, float]:
    """The rates, measured in a new process, whose memory and kernels are its own."""
    command = [sys.executable, "-m", "benchmarks.speed.precision", "--one", precision, "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


def compare(options: argparse.Namespace) -> None:
    """Measure in alternation, print the table, and write it."""
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(rates(options.one)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    auto = fitting(device)
    print(f"auto: {auto.sentence()}.")
    measured: dict[str, list[dict[str, float]]] = {"float32": [], "auto": []}
    for repetition in range(options.repeats):
        for name, precision in (("float32", "no"), ("auto", auto.name)):
            print(f"repetition {repetition + 1} of {options.repeats}: {name}", file=sys.stderr)
            measured[name].append(in_own_process(precision, options.threads))
    peak = dict(zip(("float32", "bf16"), measure_products(device), strict=True)) if auto.ratio else {}
    print("\n".join(table_of(measured, display_name(auto.name))))
    if peak:
        print(f"\n{share_of_peak(measured['auto'], peak[reading_precision(auto.name)])}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"auto": auto.name, "rates": measured, "products": peak}, indent=2) + "\n")


def table_of(measured: dict[str, list[dict[str, float]]], auto: str) -> list[str]:
    """The lines of the table."""
    lines = [f"| part | float32 | auto ({auto}) | ratio, median | lowest to highest |", "|---|---:|---:|---:|---:|"]
    for part, title in PARTS.items():
        before, after = ([run[part] for run in measured[name]] for name in ("float32", "auto"))
        gains = [new / old for old, new in zip(before, after, strict=True)]
        lines.append(
            f"| {title} | {median(before):.2f} | {median(after):.2f} | {median(gains):.2f} | {spread(gains, '.2f')} |"
        )
    return lines


def share_of_peak(runs: list[dict[str, float]], peak: float) -> str:
    """How much of the rate of a square product, in GFLOP/s, the generator steps of SmolLM2's shape reach.

    Six FLOPs for each weight of the layers and token; attention, head, and optimizer count as nothing.
    """
    with torch.device("meta"):
        layers = LlamaForCausalLM(SHAPE).model.layers
    flops = 6 * TOKENS * sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    each = {name: median(run[name] for run in runs) * flops / 1e9 for name in ("smollm2", "plain smollm2")}
    shares = ", ".join(f"{PARTS[name].removesuffix(', rows/s')} {rate:.0f}" for name, rate in each.items())
    percents = " and ".join(f"{100 * rate / peak:.0f} %" for rate in each.values())
    return f"GFLOP/s in the products of the layers: {shares}: {percents} of the {peak:.0f} of a square product."


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each precision (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="output file")
    parser.add_argument("--one", choices=("no", "bf16"), help="measure one precision in this process")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
