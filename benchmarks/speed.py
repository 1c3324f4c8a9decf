"""How fast a round is: ours, a plainly written loop, and the libraries' own trainers, in one run on one machine.

    python benchmarks/speed.py                                      # the quickstart set
    python benchmarks/speed.py --only index retrieval --json speed.json
    python benchmarks/speed.py --questions squad_train.jsonl.gz --pairs 4096 --reference_pairs 512      # on a GPU

Four parts of a round, at the size of the default models (distilgpt2's shape with random weights, all-MiniLM-L6-v2):
generator  training of the generator: ours, the reference loop (reference_loop.py), transformers.Trainer
retriever  training of the retriever: ours, SentenceTransformerTrainer, its loss in a plain loop
index      vectors of passages: ours (with those of all sentences), SentenceTransformer.encode
retrieval  questions to contexts, encoding included: ours, one question and one sentence at a time

Sides take turns, and medians over --repeats are printed with the lowest and highest. Numbers of rows may differ between
sides, since what counts is rows per second. The generator part also measures this machine's matrix products, and what
share of them ours achieves; and what both loops have learned after equally many questions (--learn_pairs).
Without datasets and faiss the parts generator, retriever (less SentenceTransformerTrainer) and index run, on .jsonl(.gz) files;
retrieval needs both. Left out: several processes or GPUs, examination, saving.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import stand_ins
import torch
import transformers
from contenders import (
    HF_TRAINER,
    OURS,
    PENALIZED,
    REFERENCE,
    ST_ENCODE,
    ST_LOOP,
    ST_TRAINER,
    Place,
    Retrieval,
    answer_loss,
    generator_sides,
    index_sides,
    our_generator,
    reference_generator,
    retriever_sides,
)
from measuring import Measured, matrix_products, measure, ratios, round_seconds, training_flops, wait_for
from speed_data import Asked, Models, Prompts, make_prompts, read_corpus
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, GPT2Config

from cozyrag.cli import entry_point
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import Example

PARTS = ("generator", "retriever", "index", "retrieval")
UNITS = {"generator": "QA pairs", "retriever": "pairs", "index": "passages", "retrieval": "questions"}
PEAK = "matrix product"
# Which side does each part of a whole round; where there are several, the first one that was measured.
ROUNDS = {
    OURS: {"generator": [OURS], "retriever": [OURS], "index": [OURS], "retrieval": [OURS]},
    PENALIZED: {"generator": [PENALIZED], "retriever": [OURS], "index": [OURS], "retrieval": [OURS]},
    REFERENCE: {"generator": [REFERENCE], "retriever": [ST_LOOP], "index": [ST_ENCODE], "retrieval": [REFERENCE]},
    "libraries' trainers": {
        "generator": [HF_TRAINER],
        "retriever": [ST_TRAINER, ST_LOOP],
        "index": [ST_ENCODE],
        "retrieval": [REFERENCE],
    },
}
FORMULA = (
    "Model FLOPs: 6 * (4 d^2 + 2 d m) for each token and layer but the last (matrices, forward and backward) and 6 * d * length^2 for "
    "each example and such layer (causal attention); the last layer, 6 * 3 d^2 for each token, and 6 * (d^2 + 2 d m) + 12 * d * length "
    "for each answer token; head, 6 * d * vocabulary for each answer token. Padding does not count."
)


class Benchmark:
    """One run: what is chosen, what is worked on, and what was measured so far."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(options.seed)
        self.options = options
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        self.place = Place(device, precision == "bf16")
        self.asked, self.passages = read_corpus(options.questions, options.passages, seed=options.seed)
        self.models = Models(
            self.passages.texts + self.asked.questions,
            GPT2Config(
                n_layer=options.layers, n_embd=options.width, n_head=options.heads, vocab_size=options.vocabulary
            ),
            generator=options.generator,
            tokenizer=options.tokenizer,
            retriever=options.retriever,
        )
        self.measured: dict[str, dict[str, Measured]] = {}
        self.learned: dict[str, dict[str, float]] = {}
        self.flops_per_pair: float | None = None

    def run(self) -> None:
        """Measure the parts chosen, in the order of a round."""
        acts = {
            "generator": self._generator,
            "retriever": self._retriever,
            "index": self._index,
            "retrieval": self._retrieval,
        }
        for part in PARTS:
            if part in self.options.only and not (part == "retrieval" and stand_ins.MISSING):
                acts[part]()
        if "generator" in self.options.only and self.options.learn_pairs:
            self._learn()

    def _measure(self, part: str, sides: list) -> None:
        found = measure(part, sides, repeats=self.options.repeats, device=self.place.device)
        self.measured[part] = {each.name: each for each in found}

    def prompts(self, asked: Asked) -> Prompts:
        """What the generators train on, from these questions."""
        return make_prompts(
            asked,
            self.passages,
            AutoTokenizer.from_pretrained(self.models.generator_folder),
            context_tokens=self.options.context_tokens,
            max_length=AutoConfig.from_pretrained(self.models.generator_folder).max_position_embeddings,
        )

    def _generator(self) -> None:
        options, device = self.options, self.place.device
        prompts = self.prompts(self.asked.first(max(options.pairs, options.reference_pairs)))
        size = options.product_size or (8192 if device.type == "cuda" else 2048)
        sides = generator_sides(self.models, prompts, self.place, options)
        self._measure("generator", [*sides, matrix_products(size, options.products, device)])
        config = AutoConfig.from_pretrained(self.models.generator_folder)
        if config.model_type == "gpt2":  # the formula is of its layers
            self.flops_per_pair = gpt2_flops(config, prompts.examples[: options.pairs]) / options.pairs

    def _retriever(self) -> None:
        asked = self.asked.first(self.options.retriever_pairs)
        with_datasets = "datasets" not in stand_ins.MISSING
        sides = retriever_sides(
            self.models, asked, self.passages, self.place, self.options, with_datasets=with_datasets
        )
        self._measure("retriever", sides)

    def _index(self) -> None:
        self._measure("index", index_sides(self.models, self.passages, self.place, self.options))

    def _retrieval(self) -> None:
        asked = self.asked.first(max(self.options.retrieval_questions, self.options.reference_questions))
        self._measure("retrieval", Retrieval(self.models, asked, self.passages, self.place, self.options).sides())

    def _learn(self) -> None:
        """Loss on held-out questions before, and after each loop has trained on the same others once."""
        options = self.options
        train, held_out = (self.prompts(part) for part in self.asked.split(options.learn_pairs, options.held_out))
        before = Generator.load(self.models.generator_folder)
        before.model.to(self.place.device)
        loss = answer_loss(before, held_out, options.generator_batch)
        self.learned["before"] = {"loss": loss, "steps": 0, "seconds": 0.0}
        small = our_generator(
            self.models, train, self.place, options, generator_batch_size=options.reference_batch
        )  # the same number of steps as the reference loop: tells the code from the batch size
        loops = {
            OURS: (our_generator(self.models, train, self.place, options), options.generator_batch),
            f"{OURS}, batches of {options.reference_batch}": (small, options.reference_batch),
            REFERENCE: (reference_generator(self.models, train, self.place, options), options.reference_batch),
        }
        for name, (build, batch) in tqdm(loops.items(), desc="what is learned", unit="loop"):
            act = build(options.learn_pairs)
            began = time.perf_counter()
            generator = act()
            wait_for(self.place.device)
            seconds = time.perf_counter() - began
            loss = answer_loss(generator, held_out, options.generator_batch)
            self.learned[name] = {"loss": loss, "steps": -(-options.learn_pairs // batch), "seconds": seconds}

    # ---- what is told

    def rounds(self) -> dict[str, float]:
        """Seconds of a whole round of each way whose four parts were all measured."""
        found = {}
        for name, ways in ROUNDS.items():
            rates = {}
            for part, sides in ways.items():
                measured = self.measured.get(part, {})
                first = next((side for side in sides if side in measured), None)
                if first is not None:
                    rates[part] = measured[first].rate
            if len(rates) == len(PARTS):
                found[name] = round_seconds(rates, pairs=self.options.round_pairs, passages=self.options.round_passages)
        return found

    def utilisation(self) -> dict[str, float]:
        """FLOP/s of matrix products and of our generator steps, and their ratio (the median over the repetitions)."""
        if self.flops_per_pair is None:
            return {}
        ours, peak = self.measured["generator"][OURS], self.measured["generator"][PEAK]
        shares = [self.flops_per_pair * mine / most for mine, most in zip(ours.rates, peak.rates, strict=True)]
        return {"achieved": self.flops_per_pair * ours.rate, "peak": max(peak.rates), "share": median(shares)}

    def machine(self) -> dict[str, str | int]:
        """Where it ran."""
        cuda = self.place.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.place.device)
            if cuda
            else platform.processor() or platform.machine(),
            "cores": os.cpu_count() or 0,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if self.place.bf16 else "fp32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def to_dict(self) -> dict:
        """Everything, for --json."""
        return {
            "machine": self.machine(),
            "options": vars(self.options),
            "parts": {
                part: {
                    name: {
                        "unit": "FLOP" if name == PEAK else UNITS[part],
                        "rates": each.rates,
                        "rate": each.rate,
                        "memory": each.memory,
                    }
                    for name, each in sides.items()
                }
                for part, sides in self.measured.items()
            },
            "faster": {
                part: {name: ratios(sides[OURS], each) for name, each in sides.items() if name not in (OURS, PEAK)}
                for part, sides in self.measured.items()
            },
            "utilisation": self.utilisation(),
            "round_seconds": self.rounds(),
            "learned": self.learned,
        }


def gpt2_flops(config: GPT2Config, examples: Sequence[Example]) -> int:
    """Model FLOPs of training a GPT-2 once on these examples."""
    return training_flops(
        layers=config.n_layer,
        width=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        vocabulary=config.vocab_size,
        lengths=[len(example.input_ids) for example in examples],
        targets=[len(example.input_ids) - example.prompt_length for example in examples],
    )


def spread(values: list[float], digits: str) -> str:
    """Lowest to highest."""
    return f"{min(values):{digits}} to {max(values):{digits}}"


def parts_table(benchmark: Benchmark) -> list[str]:
    """A line for each side of each part."""
    lines = [
        "| part | side | rows per second (median) | lowest to highest | CoZyRAG is faster by | lowest to highest | peak memory |",
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
    """A whole round of each way."""
    options, rounds = benchmark.options, benchmark.rounds()
    of = f"a round of {options.round_pairs:,} pairs and {options.round_passages:,} passages, extrapolated"
    if not rounds:
        return [f"Not known: {of}. It needs the parts {', '.join(PARTS)}."]
    lines = [f"| {of} | minutes | CoZyRAG is faster by |", "|---|---:|---:|"]
    return lines + [
        f"| {name} | {seconds / 60:.1f} | {seconds / rounds[OURS]:.2f}x |" for name, seconds in rounds.items()
    ]


def learned_table(benchmark: Benchmark) -> list[str]:
    """What was learned."""
    lines = [
        f"| after {benchmark.options.learn_pairs} questions | loss per answer token, held-out questions | steps | seconds |",
        "|---|---:|---:|---:|",
    ]
    return lines + [
        f"| {name} | {each['loss']:.3f} | {each['steps']} | {each['seconds']:.1f} |"
        for name, each in benchmark.learned.items()
    ]


def report(benchmark: Benchmark) -> str:
    """All tables as Markdown."""
    used = benchmark.utilisation()
    blocks = [[", ".join(f"{name} {value}" for name, value in benchmark.machine().items())], parts_table(benchmark)]
    if used:
        dtype = "bfloat16" if benchmark.place.device.type == "cuda" else "float32"
        blocks.append(
            [
                f"Generator steps achieve {used['achieved'] / 1e9:.1f} GFLOP/s, {used['share']:.1%} of what {dtype} matrix products "
                f"reach here ({used['peak'] / 1e9:.1f} GFLOP/s). {FORMULA}"
            ]
        )
    blocks.append(round_table(benchmark))
    if benchmark.learned:
        blocks.append(learned_table(benchmark))
    return "\n\n".join("\n".join(block) for block in blocks)


def missing_parts(only: list[str]) -> list[str]:
    """Sentences about what cannot run here."""
    names = " and ".join(stand_ins.MISSING)
    said = []
    if stand_ins.MISSING and "retrieval" in only:
        said.append(f"Left out, since {names} cannot be imported: retrieval, and with it the whole round.")
    if "datasets" in stand_ins.MISSING and "retriever" in only:
        said.append(f"Left out, since datasets cannot be imported: {ST_TRAINER}; its loss runs in a plain loop.")
    return said


def compare(options: argparse.Namespace) -> None:
    """Measure and tell."""
    for sentence in missing_parts(options.only):
        print(sentence, file=sys.stderr)
    benchmark = Benchmark(options)
    benchmark.run()
    print(report(benchmark))
    if options.json:
        Path(options.json).write_text(json.dumps(benchmark.to_dict(), indent=2) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_HelpFormatter)
    add_data(parser.add_argument_group("data and models"))
    add_amounts(parser.add_argument_group("how much is measured"))
    add_training(parser.add_argument_group("how it is trained and searched: the package's defaults"))
    return parser.parse_args(arguments)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the lines of the description."""


def add_data(group) -> None:
    """What is worked on."""
    group.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of a round to measure")
    group.add_argument(
        "--questions", help="questions with gold passages, any format of train.py; none: the quickstart set"
    )
    group.add_argument("--passages", help="passages; none: those that the question file carries")
    group.add_argument("--generator", help="checkpoint to start from; none: random weights of the shape below")
    group.add_argument("--tokenizer", help="folder of a tokenizer for random weights; none: one trained on the texts")
    group.add_argument(
        "--retriever",
        default="embedded",
        help="embedded, a folder, or random: all-MiniLM-L6-v2's shape without its weights",
    )
    group.add_argument("--layers", type=int, default=6, help="layers of the random generator (distilgpt2: 6)")
    group.add_argument("--width", type=int, default=768, help="its width")
    group.add_argument("--heads", type=int, default=12, help="its attention heads")
    group.add_argument("--vocabulary", type=int, default=50257, help="its vocabulary")
    group.add_argument("--device", help="cpu or cuda; none: cuda if there is one")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="of all training; none: bf16 on a GPU, else fp32")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    group.add_argument("--json", help="file for all numbers, each repetition's too")


def add_amounts(group) -> None:
    """How much of it."""
    for name, default, meaning in (
        ("repeats", 3, "repetitions in which the sides take turns, after one warm-up"),
        ("pairs", 128, "QA pairs a repetition: ours and transformers.Trainer"),
        ("reference_pairs", 16, "QA pairs a repetition: reference loop"),
        ("learn_pairs", 128, "questions after which the losses are compared; 0: not compared"),
        ("held_out", 64, "questions on which that loss is measured"),
        ("retriever_pairs", 128, "pairs a repetition of the retriever"),
        ("index_passages", 256, "passages a repetition of the index"),
        ("searched_passages", 1000, "passages that retrieval searches"),
        ("retrieval_questions", 512, "questions a repetition of retrieval: ours"),
        ("reference_questions", 16, "questions a repetition of retrieval: reference loop"),
        ("round_pairs", 20_000, "pairs of the extrapolated round"),
        ("round_passages", 21_000, "passages of the extrapolated round"),
        ("products", 10, "matrix products a repetition"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, help=meaning)
    group.add_argument("--product_size", type=int, help="side of their matrices; none: 2048 on a CPU, 8192 on a GPU")


def add_training(group) -> None:
    """How the parts are done."""
    for name, default, meaning in (
        ("generator_batch", 32, "pairs of a generator step: ours and transformers.Trainer"),
        ("reference_batch", 4, "pairs of a generator step: reference loop"),
        ("pad_to", 256, "tokens to which the reference loop pads"),
        ("retriever_batch", 64, "pairs of a retriever step, all sides"),
        ("encode_batch", 64, "passages that we encode at once"),
        ("context_tokens", 128, "budget of a context, in tokens of the generator"),
        ("passage_tokens", 160, "what the retriever reads of a passage"),
        ("top_k", 4, "passages found that make a context"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, help=meaning)
    group.add_argument("--learning_rate", type=float, default=1e-4, help="of the generator, all sides")


def main() -> None:
    """The command line."""
    options = parse()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
