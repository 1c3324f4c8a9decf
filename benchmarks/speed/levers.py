"""What is each optimisation of the generator phase worth? Measures the phase without one at a time.

    python -m benchmarks.speed.levers --json levers.json

The sides alternate in one process, on the same questions and weights; data and sizes are options of round.py. The table
also shows the ratio of FLOPs that arithmetic predicts, where it does. Left out: comparison with other programs
(round.py).
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from benchmarks.shared.measuring import Run, Side, measure, ratios, spread, training_flops
from benchmarks.shared.round_benchmark import Benchmark, parse
from benchmarks.shared.speed_data import Prompts
from benchmarks.shared.training_sides import our_generator
from cozyrag.cli import entry_point
from cozyrag.models import loading, token_losses
from cozyrag.models.prompts import Example
from cozyrag.training import step_order
from cozyrag.training.step_order import plan_steps

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Lever:
    """One optimisation, named by what replaces it. `without`, `changes` of settings, or `context_tokens` takes it out.

    `predicted`: how many times as long the phase takes by arithmetic; None: unknown.
    """

    name: str
    predicted: float | None = None
    without: Callable[[], AbstractContextManager] = nullcontext
    changes: tuple[tuple[str, object], ...] = ()
    context_tokens: int | None = None


# ---- the phase without one optimisation


def head_everywhere() -> AbstractContextManager:
    """Compute the logits of every position; the loss uses those of the answers."""

    def forward(self, input_ids, positions, targets, attention_mask=None, position_ids=None, **unused):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1)[positions].float(), targets, reduction="none")

    return patch.object(token_losses.TokenLosses, "forward", forward)


@contextmanager
def nothing_changed(*_) -> Iterator[None]:
    """Replaces the context manager that skips most of the last block."""
    yield


def last_block_everywhere() -> AbstractContextManager:
    """Compute the whole last block at every position."""
    return patch.object(token_losses, "read_only_at", nothing_changed)


def shuffled(lengths: np.ndarray, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Batches in random order, with short and long rows mixed."""
    order = random.permutation(len(lengths))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def unsorted() -> AbstractContextManager:
    """Do not sort rows by length."""
    return patch.object(step_order, "_one_epoch", shuffled)


def loaded_with(change: Callable[[PretrainedConfig], None]) -> AbstractContextManager:
    """Load models with a change of the config that the package trains with."""
    original = loading.training_config

    def changed(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
        config = original(config, dropout)
        change(config)
        return config

    return patch.object(loading, "training_config", changed)


def composed_activation(config: PretrainedConfig) -> None:
    """GPT-2's activation as first published: eight kernels instead of one."""
    config.activation_function = "gelu_new"


def with_dropout(config: PretrainedConfig) -> None:
    """The dropout of distilgpt2's config."""
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1


def eager_attention(config: PretrainedConfig) -> None:
    """Attention as separate products and a softmax."""
    config._attn_implementation = "eager"


def plain_optimizer() -> AbstractContextManager:
    """AdamW with one tensor and one operation at a time."""
    adamw = torch.optim.AdamW
    return patch.object(
        torch.optim, "AdamW", lambda *args, **named: adamw(*args, **named | {"fused": False, "foreach": False})
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One core instead of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- what arithmetic predicts


def flops(benchmark: Benchmark, lengths: Sequence[int], last: Sequence[int], head: Sequence[int]) -> int:
    """FLOPs of a pass over padded examples, with these positions of each in the last block and in the head."""
    shape = benchmark.models.shape
    layers = training_flops(
        layers=shape.n_layer, width=shape.n_embd, inner=4 * shape.n_embd, vocabulary=0, lengths=lengths, targets=last
    )
    return layers + 6 * shape.n_embd * shape.vocab_size * sum(head)


def padded(lengths: Sequence[int], steps: Sequence[np.ndarray]) -> list[int]:
    """The padded length of each row in its batch."""
    longest = {int(row): max(lengths[each] for each in step) for step in steps for row in step}
    return [longest[row] for row in range(len(lengths))]


def predictions(benchmark: Benchmark, examples: Sequence[Example], longer: Sequence[Example]) -> dict[str, float]:
    """The ratio of FLOPs without each optimisation: head, last block, sorting, and a longer context."""
    lengths = [len(example.input_ids) for example in examples]
    targets = [len(example.input_ids) - example.prompt_length for example in examples]
    batch = benchmark.options.generator_batch

    def steps(of: Sequence[int]) -> list[np.ndarray]:
        return plan_steps(of, batch_size=batch, epochs=1, max_steps=None, seed=benchmark.options.seed)

    rows = padded(lengths, steps(lengths))
    base = flops(benchmark, rows, targets, targets)
    more = [len(example.input_ids) for example in longer]
    with unsorted():
        loose = padded(lengths, steps(lengths))
    return {
        "head": flops(benchmark, rows, rows, rows) / base,
        "last block": flops(benchmark, rows, rows, targets) / base,
        "sorting": flops(benchmark, loose, targets, targets) / base,
        "context": flops(benchmark, padded(more, steps(more)), targets, targets) / base,
    }


def levers(benchmark: Benchmark, predicted: dict[str, float]) -> list[Lever]:
    """All optimisations."""
    double = 2 * benchmark.options.context_tokens
    threads = torch.get_num_threads()
    found = [
        Lever("head and last block at every position, not at answers only", predicted["head"], head_everywhere),
        Lever("all of the last block at every position", predicted["last block"], last_block_everywhere),
        Lever(
            f"contexts of {double} tokens, not filtered to {double // 2}", predicted["context"], context_tokens=double
        ),
        Lever("batches in random order, not sorted by length", predicted["sorting"], unsorted),
        Lever("activation of eight kernels, not one", None, lambda: loaded_with(composed_activation)),
        Lever("dropout of 0.1, not none", None, lambda: loaded_with(with_dropout)),
        Lever("attention written out, not one kernel", None, lambda: loaded_with(eager_attention)),
        Lever("AdamW tensor by tensor, not fused", None, plain_optimizer),
        Lever(f"batches of 4, not {benchmark.options.generator_batch}", None, changes=(("generator_batch_size", 4),)),
    ]
    return found + [Lever(f"one thread, not {threads}", float(threads), one_thread)] * (threads > 1)


def side(benchmark: Benchmark, prompts: Prompts, lever: Lever) -> Side:
    """The phase without one optimisation."""
    options = argparse.Namespace(**vars(benchmark.options))
    options.context_tokens = lever.context_tokens or options.context_tokens
    build = our_generator(benchmark.models, prompts, benchmark.place, options, **dict(lever.changes))

    def prepare(rows: int) -> Run:
        with lever.without():
            phase = build(rows)

        def run() -> object:
            with lever.without():
                return phase()

        return run

    return Side(lever.name, options.pairs, options.generator_batch, prepare)


# ---- the table


def table(found: list[tuple[Lever, list[float]]], rate: float, pairs: int) -> str:
    """How many times as long the phase takes without each optimisation."""
    lines = [
        f"The generator phase as it is: {rate:.2f} QA pairs a second ({pairs} pairs).",
        "",
        "| without the optimisation | predicted | measured (median) | lowest to highest |",
        "|---|---:|---:|---:|",
    ]
    for lever, times in found:
        predicted = f"{lever.predicted:.2f}x" if lever.predicted else "-"
        lines.append(f"| {lever.name} | {predicted} | {median(times):.2f}x | {spread(times, '.2f')} |")
    return "\n".join(lines)


def compare(options: argparse.Namespace) -> None:
    """Measure and report."""
    benchmark = Benchmark(options)
    asked = benchmark.asked.first(options.pairs)
    prompts = benchmark.prompts(asked)
    options.context_tokens *= 2
    longer = benchmark.prompts(asked)
    options.context_tokens //= 2
    chosen = levers(benchmark, predictions(benchmark, prompts.examples, longer.examples))
    sides = [side(benchmark, prompts, Lever(AS_IT_IS))]
    sides += [side(benchmark, longer if lever.context_tokens else prompts, lever) for lever in chosen]
    first, *others = measure("levers", sides, repeats=options.repeats, device=benchmark.place.device)
    found = [(lever, ratios(first, other)) for lever, other in zip(chosen, others, strict=True)]
    print(table(found, first.rate, options.pairs))
    if options.json:
        results = {lever.name: {"predicted": lever.predicted, "measured": times} for lever, times in found}
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    options = parse(__doc__)
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
