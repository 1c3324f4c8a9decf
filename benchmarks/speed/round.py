"""How fast is a training round? Compares the package with a plain loop and with the trainers of the libraries.

    python -m benchmarks.speed.round                                      # the quickstart set
    python -m benchmarks.speed.round --only index retrieval --json speed.json
    python -m benchmarks.speed.round --questions squad_train.jsonl.gz --pairs 4096 --reference_pairs 512      # on a GPU

Four parts of a round, at the size of the default models (distilgpt2's shape with random weights, all-MiniLM-L6-v2):
generator  training of the generator: ours, the reference loop (reference_loop.py), transformers.Trainer, TRL's
           SFTTrainer (if installed: pip install trl)
retriever  training of the retriever: ours, SentenceTransformerTrainer, its loss in a plain loop
index      vectors of passages: ours (with those of all sentences), SentenceTransformer.encode
retrieval  questions to contexts, encoding included: ours, one question and one sentence at a time

With --fed_rag_python, FedRAG's trainers run in that environment: RALT for the generator, and LSR for the retriever
beside our LM-supervised training. Libraries' trainers run as they come, and in bf16 too with --bf16_sides.

The sides alternate, and the table has the median over --repeats, the lowest, and the highest. Sides may process
different numbers of rows, because rows per second are compared. The generator part also measures matrix products and
the share of their rate that ours achieves. Of generator and retriever, the loss on held-out questions is measured after
each side has trained on the same questions (--learn_pairs).

Without datasets and faiss, the parts generator, retriever (without SentenceTransformerTrainer), and index run on
.jsonl(.gz) files; retrieval needs both. Left out: several processes or GPUs, evaluation, saving.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.shared import stub_modules
from benchmarks.shared.measuring import ratios, spread
from benchmarks.shared.round_benchmark import PARTS, PEAK, UNITS, Benchmark, parse
from benchmarks.shared.training_sides import OURS, SFT, ST_TRAINER, has_trl
from cozyrag.cli import entry_point

FORMULA = (
    "Model FLOPs: 6 * (4 d^2 + 2 d m) for each token and layer but the last (matrices, forward and backward) and 6 * "
    "d * length^2 for each example and such layer (causal attention); the last layer, 6 * 3 d^2 for each token, and 6 "
    "* (d^2 + 2 d m) + 12 * d * length for each answer token; head, 6 * d * vocabulary for each answer token. Padding "
    "does not count."
)


def parts_table(benchmark: Benchmark) -> list[str]:
    """A row for each side of each part."""
    lines = [
        "| part | side | rows per second (median) | lowest to highest | CoZyRAG is faster by | lowest to highest | "
        "peak memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part, sides in benchmark.measured.items():
        for name, each in sides.items():
            if name == PEAK:
                continue
            faster = ratios(sides[OURS], each)
            compared = f"{median(faster):.2f}x | {spread(faster, '.2f')}" if name != OURS else "1 | "
            lines.append(
                f"| {part}, {UNITS[part]} | {name} | {each.rate:.4g} | {spread(each.rates, '.4g')} | {compared} | "
                f"{each.memory / 2**30:.2f} GiB |"
            )
    return lines


def round_table(benchmark: Benchmark) -> list[str]:
    """A row for each whole round, extrapolated from its parts."""
    options, rounds = benchmark.options, benchmark.rounds()
    title = f"a round of {options.round_pairs:,} pairs and {options.round_passages:,} passages, extrapolated"
    if not rounds:
        return [f"Unknown: {title}. It needs the parts {', '.join(PARTS)}."]
    lines = [f"| {title} | minutes | CoZyRAG is faster by |", "|---|---:|---:|"]
    return lines + [
        f"| {name} | {seconds / 60:.1f} | {seconds / rounds[OURS]:.2f}x |" for name, seconds in rounds.items()
    ]


def learned_table(benchmark: Benchmark, part: str) -> list[str]:
    """A row for the held-out loss of each side of a part."""
    unit = {"generator": "loss per answer token", "retriever": "contrastive loss per question"}[part]
    lines = [
        f"| after {benchmark.options.learn_pairs} questions, {part} | {unit}, held-out questions | steps | seconds |",
        "|---|---:|---:|---:|",
    ]
    return lines + [
        f"| {name} | {each['loss']:.3f} | {each['steps']} | {each['seconds']:.1f} |"
        for name, each in benchmark.learned[part].items()
    ]


def report(benchmark: Benchmark) -> str:
    """All tables as Markdown."""
    blocks = [[", ".join(f"{name} {value}" for name, value in benchmark.machine().items())], parts_table(benchmark)]
    if used := benchmark.utilisation():
        dtype = "bfloat16" if benchmark.place.device.type == "cuda" else "float32"
        blocks.append(
            [
                f"Generator steps achieve {used['achieved'] / 1e9:.1f} GFLOP/s, {used['share']:.1%} of what "
                f"{dtype} matrix products reach here ({used['peak'] / 1e9:.1f} GFLOP/s). {FORMULA}"
            ]
        )
    blocks.append(round_table(benchmark))
    blocks += [learned_table(benchmark, part) for part in benchmark.learned]
    return "\n\n".join("\n".join(block) for block in blocks)


def missing_parts(only: Sequence[str]) -> list[str]:
    """Sentences about the parts that cannot run on this machine."""
    names = " and ".join(stub_modules.MISSING)
    lines = []
    if stub_modules.MISSING and "retrieval" in only:
        lines.append(f"Left out, because {names} cannot be imported: retrieval, and therefore the whole round.")
    if "generator" in only and not has_trl():
        lines.append(f"Left out: {SFT}. It needs datasets, and trl: pip install trl")
    if "datasets" in stub_modules.MISSING and "retriever" in only:
        lines.append(f"Left out, because datasets cannot be imported: {ST_TRAINER}. Its loss runs in a plain loop.")
    return lines


def compare(options: argparse.Namespace) -> None:
    """Measure and report."""
    for line in missing_parts(options.only):
        print(line, file=sys.stderr)
    benchmark = Benchmark(options)
    benchmark.run()
    print(report(benchmark))
    if options.json:
        Path(options.json).write_text(json.dumps(benchmark.to_dict(), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    options = parse(__doc__)
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
