"""The options and the measurements of the speed benchmark of a training round (speed/round.py, speed/levers.py).

Left out: the sides of each part (training_sides.py, retrieval_sides.py), tables (speed/round.py).
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import transformers
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import AutoConfig, GPT2Config

from benchmarks.shared import stub_modules
from benchmarks.shared.foreign_sides import (
    FedRAG,
    foreign_generator_sides,
    foreign_retriever_sides,
    trained_generator,
    trained_retriever,
)
from benchmarks.shared.measuring import (
    Measured,
    Side,
    matrix_products,
    measure,
    ratios,
    round_seconds,
    training_flops,
    wait_for,
)
from benchmarks.shared.retrieval_sides import ST_ENCODE, Retrieval, index_sides
from benchmarks.shared.speed_data import Asked, Models, Prompts, make_prompts, read_corpus
from benchmarks.shared.training_sides import (
    HF_TRAINER,
    IN_BF16,
    OURS,
    PENALIZED,
    REFERENCE,
    SFT,
    SFT_KEEPING,
    ST_LOOP,
    ST_TRAINER,
    Place,
    answer_loss,
    generator_sides,
    our_generator,
    ranking_loss,
    retriever_sides,
    triplets_of,
)
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import Example

PARTS = ("generator", "retriever", "index", "retrieval")
UNITS = {"generator": "QA pairs", "retriever": "pairs", "index": "passages", "retrieval": "questions"}
PEAK = "matrix product"
# The side of each part in a whole round. Of several, the fastest that was measured.
ROUNDS = {
    OURS: {"generator": [OURS], "retriever": [OURS], "index": [OURS], "retrieval": [OURS]},
    PENALIZED: {"generator": [PENALIZED], "retriever": [OURS], "index": [OURS], "retrieval": [OURS]},
    REFERENCE: {"generator": [REFERENCE], "retriever": [ST_LOOP], "index": [ST_ENCODE], "retrieval": [REFERENCE]},
    "libraries' trainers": {
        "generator": [name + precision for name in (HF_TRAINER, SFT, SFT_KEEPING) for precision in ("", IN_BF16)],
        "retriever": [ST_TRAINER, ST_TRAINER + IN_BF16, ST_LOOP],
        "index": [ST_ENCODE],
        "retrieval": [REFERENCE],
    },
}


class Benchmark:
    """The data and models of one benchmark, and its measurements."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(options.seed)
        self.options = options
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
        self.place = Place(device, precision == "bf16")
        self.asked, self.passages = read_corpus(options.questions, options.passages, seed=options.seed)
        self.models = Models(
            [*self.passages.texts, *self.asked.questions],
            GPT2Config(
                n_layer=options.layers, n_embd=options.width, n_head=options.heads, vocab_size=options.vocabulary
            ),
            generator=options.generator,
            tokenizer=options.tokenizer,
            retriever=options.retriever,
        )
        self.measured: dict[str, dict[str, Measured]] = {}
        self.learned: dict[str, dict[str, dict[str, float]]] = {}
        self.flops_per_pair: float | None = None

    def run(self) -> None:
        """Measure the chosen parts in the order of a round."""
        if "generator" in self.options.only:
            self._generator()
        if "retriever" in self.options.only:
            asked = self.asked.first(max(self.options.retriever_pairs, self.options.supervised_pairs))
            self._measure("retriever", self.retriever_sides(asked))
        if "index" in self.options.only:
            self._measure("index", index_sides(self.models, self.passages, self.place, self.options))
        if "retrieval" in self.options.only and not stub_modules.MISSING:
            asked = self.asked.first(max(self.options.retrieval_questions, self.options.reference_questions))
            self._measure("retrieval", Retrieval(self.models, asked, self.passages, self.place, self.options).sides())
        if "generator" in self.options.only and self.options.learn_pairs:
            self._learn_generator()
        if "retriever" in self.options.only and self.options.learn_pairs:
            self._learn_retriever()

    def _measure(self, part: str, sides: Sequence[Side]) -> None:
        found = measure(part, sides, repeats=self.options.repeats, device=self.place.device)
        self.measured[part] = {each.name: each for each in found}

    def prompts(self, asked: Asked) -> Prompts:
        """Training data of the generators from these questions."""
        generator = Generator.load(self.models.generator_folder)
        return make_prompts(asked, self.passages, generator, context_tokens=self.options.context_tokens)

    def generator_sides(self, prompts: Prompts) -> list[Side]:
        """All sides that train a generator on these prompts."""
        given = self.models, prompts, self.place, self.options
        return [*generator_sides(*given), *(foreign_generator_sides(*given) if self.options.fed_rag_python else [])]

    def retriever_sides(self, asked: Asked) -> list[Side]:
        """All sides that train a retriever on these questions."""
        given, known = (
            (self.models, asked, self.passages, self.place, self.options),
            "datasets" not in stub_modules.MISSING,
        )
        sides = retriever_sides(*given, with_datasets=known)
        return [*sides, *(foreign_retriever_sides(*given) if self.options.fed_rag_python else [])]

    def _generator(self) -> None:
        options, device = self.options, self.place.device
        prompts = self.prompts(self.asked.first(max(options.pairs, options.reference_pairs)))
        size = options.product_size or (8192 if device.type == "cuda" else 2048)
        sides = self.generator_sides(prompts)
        self._measure("generator", [*sides, matrix_products(size, options.products, device)])
        config = AutoConfig.from_pretrained(self.models.generator_folder, trust_remote_code=False)
        if config.model_type == "gpt2":  # training_flops knows the layers of GPT-2 only
            self.flops_per_pair = gpt2_flops(config, prompts.examples[: options.pairs]) / options.pairs

    def _learn_generator(self) -> None:
        """Held-out loss before training, and after one pass of each side over the same questions."""
        options = self.options
        train, held_out = (self.prompts(part) for part in self.asked.split(options.learn_pairs, options.held_out))
        # As many steps as the reference loop, which separates the effect of the code from that of the batch size.
        small = our_generator(self.models, train, self.place, options, generator_batch_size=options.reference_batch)
        name, batch = f"{OURS}, batches of {options.reference_batch}", options.reference_batch
        sides = [side for side in self.generator_sides(train) if side.name != PENALIZED]

        def loss(trained: Generator | FedRAG) -> float:
            generator = trained_generator(self.models, trained) if isinstance(trained, FedRAG) else trained
            generator.model.to(self.place.device)
            return answer_loss(generator, held_out, options.generator_batch)

        before = Generator.load(self.models.generator_folder)
        self._learn("generator", before, [*sides, Side(name, options.learn_pairs, batch, small)], loss)

    def _learn_retriever(self) -> None:
        """The same for the retriever."""
        options = self.options
        train, held_out = self.asked.split(options.learn_pairs, options.held_out)
        triplets = triplets_of(held_out, self.passages)

        def loss(trained: SentenceTransformer | FedRAG) -> float:
            model = trained_retriever(trained, self.place, options) if isinstance(trained, FedRAG) else trained
            return ranking_loss(model, triplets, options.retriever_batch)

        before = self.models.load_retriever(str(self.place.device), options.passage_tokens).model
        self._learn("retriever", before, self.retriever_sides(train), loss)

    def _learn(self, part: str, before: object, sides: Sequence[Side], loss: Callable[..., float]) -> None:
        self.learned[part] = {"before": {"loss": loss(before), "steps": 0, "seconds": 0.0}}
        for side in tqdm(sides, desc=f"held-out loss: {part}", unit="side"):
            run = side.build(self.options.learn_pairs)
            began = time.perf_counter()
            trained = run()
            wait_for(self.place.device)
            seconds = time.perf_counter() - began
            steps = -(-self.options.learn_pairs // side.warm_up)
            self.learned[part][side.name] = {"loss": loss(trained), "steps": steps, "seconds": seconds}

    # ---- results

    def rounds(self) -> dict[str, float]:
        """Seconds of each whole round whose four parts were measured."""
        found = {}
        for name, ways in ROUNDS.items():
            rates = {}
            for part, sides in ways.items():
                measured = self.measured.get(part, {})
                if known := [measured[side].rate for side in sides if side in measured]:
                    rates[part] = max(known)
            if len(rates) == len(PARTS):
                found[name] = round_seconds(rates, pairs=self.options.round_pairs, passages=self.options.round_passages)
        return found

    def utilisation(self) -> dict[str, float]:
        """FLOP/s of our generator steps and of matrix products, and their ratio (the median over the repetitions)."""
        if self.flops_per_pair is None:
            return {}
        ours, peak = self.measured["generator"][OURS], self.measured["generator"][PEAK]
        shares = [self.flops_per_pair * mine / most for mine, most in zip(ours.rates, peak.rates, strict=True)]
        return {"achieved": self.flops_per_pair * ours.rate, "peak": max(peak.rates), "share": median(shares)}

    def machine(self) -> dict[str, str | int]:
        """The device, threads, precision, and versions."""
        device = self.place.device
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return {
            "device": named or platform.processor() or platform.machine(),
            "cores": os.cpu_count() or 0,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if self.place.bf16 else "fp32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def to_dict(self) -> dict:
        """All results, for --json."""
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


# ---- options


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the lines of the description."""


def parse(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of a speed benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    add_data(parser.add_argument_group("data and models"))
    add_amounts(parser.add_argument_group("amounts"))
    add_training(parser.add_argument_group("training and search; the defaults are those of the package"))
    return parser.parse_args(arguments)


def add_data(group: argparse._ArgumentGroup) -> None:
    """Add the options of data, models, device, and output."""
    add = group.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of a round to measure")
    add("--questions", help="questions with gold passages, any format of train.py; none: the quickstart set")
    add("--passages", help="passages; none: those in the question file")
    add("--generator", help="checkpoint to start from; none: random weights of the shape below")
    add("--tokenizer", help="folder of a tokenizer for random weights; none: one trained on the texts")
    add(
        "--retriever",
        default="embedded",
        help="embedded, a folder, or random: the shape of all-MiniLM-L6-v2 with random weights",
    )
    add("--layers", type=int, default=6, help="layers of the random generator (distilgpt2: 6)")
    add("--width", type=int, default=768, help="its width")
    add("--heads", type=int, default=12, help="its attention heads")
    add("--vocabulary", type=int, default=50257, help="its vocabulary")
    add("--device", help="cpu or cuda; none: cuda if available")
    add("--precision", choices=("fp32", "bf16"), help="of all training; none: bf16 on a GPU, else fp32")
    add("--bf16_sides", action="store_true", help="the libraries' trainers in bf16 too; on if --precision is bf16")
    add(
        "--fed_rag_python",
        metavar="PATH",
        help='interpreter of an environment for FedRAG (pip install "fed-rag[huggingface]"); none: without FedRAG',
    )
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--json", help="output file for all numbers of all repetitions")


def add_amounts(group: argparse._ArgumentGroup) -> None:
    """Add the numbers of rows and repetitions."""
    for name, default, meaning in (
        ("repeats", 3, "repetitions, in which the sides alternate, after one warm-up"),
        ("pairs", 128, "QA pairs of a repetition: ours and the libraries' trainers"),
        ("reference_pairs", 16, "QA pairs of a repetition: reference loop"),
        ("learn_pairs", 128, "questions after which the losses are compared; 0: no comparison"),
        ("held_out", 64, "questions on which the losses are measured"),
        ("retriever_pairs", 128, "pairs of a repetition of the retriever"),
        ("supervised_pairs", 16, "pairs of a repetition of the LM-supervised retriever (with --fed_rag_python)"),
        ("index_passages", 256, "passages of a repetition of the index"),
        ("searched_passages", 1000, "passages that retrieval searches"),
        ("retrieval_questions", 512, "questions of a repetition of retrieval: ours"),
        ("reference_questions", 16, "questions of a repetition of retrieval: reference loop"),
        ("round_pairs", 20_000, "pairs of the extrapolated round"),
        ("round_passages", 21_000, "passages of the extrapolated round"),
        ("products", 10, "matrix products of a repetition"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, help=meaning)
    group.add_argument("--product_size", type=int, help="side of the matrices; none: 2048 on a CPU, 8192 on a GPU")


def add_training(group: argparse._ArgumentGroup) -> None:
    """Add batch sizes, lengths, and the learning rate."""
    for name, default, meaning in (
        ("generator_batch", 32, "pairs of a generator step: ours and the libraries' trainers"),
        ("reference_batch", 4, "pairs of a generator step: reference loop"),
        ("pad_to", 256, "tokens to which the reference loop pads"),
        ("retriever_batch", 64, "pairs of a retriever step, all sides"),
        ("encode_batch", 64, "passages that we encode at once"),
        ("context_tokens", 128, "budget of a context, in tokens of the generator"),
        ("passage_tokens", 160, "tokens of a passage that the retriever reads"),
        ("top_k", 4, "retrieved passages whose sentences compete for the context"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, help=meaning)
    group.add_argument("--learning_rate", type=float, default=1e-4, help="of the generator, all sides")
