"""Sides of the speed benchmark for training: the package, the reference loop, the trainers of the libraries.

Each side loads its models again before every repetition, which is not timed, so that all start from equal weights. Left
out: the index and retrieval (retrieval_sides.py), measuring (measuring.py), the loop itself (reference_loop.py).
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from benchmarks.shared import reference_loop
from benchmarks.shared.measuring import Build, Run, Side
from benchmarks.shared.speed_data import Asked, Models, Prompts
from cozyrag.config import TrainingSettings
from cozyrag.models.batching import answer_tokens, collate
from cozyrag.models.generator import Generator
from cozyrag.models.token_losses import TokenLosses
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.generator_phase import train_generator
from cozyrag.training.retriever_phase import train_retriever
from cozyrag.training.trainer import PhaseCallback, StepReport

OURS, PENALIZED, REFERENCE = "CoZyRAG", "CoZyRAG, penalties on", "reference loop"
HF_TRAINER, ST_TRAINER, ST_LOOP = "transformers.Trainer", "SentenceTransformerTrainer", "plain loop, library's loss"
RETRIEVER_RATE = TrainingSettings().retriever_learning_rate  # for all sides
PENALTIES = {"repeat_penalty": 0.1, "keyword_penalty": 0.1, "short_penalty": 0.1}

Triplets = list[tuple[str, str, str]]  # question, positive, negative


class Table:
    """Columns with the part of the interface of a Dataset that the trainer uses; datasets may not be installed."""

    def __init__(self, **columns: list):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, list]:
        return {name: column[rows] for name, column in self.columns.items()}

    def select_columns(self, names: list[str]) -> "Table":
        """The same rows with these columns only."""
        return Table(**{name: self.columns[name] for name in names})


@dataclass
class Losses(PhaseCallback):
    """A callback that collects the losses of a phase and saves nothing."""

    values: list[float] = field(default_factory=list)

    def after_step(self, report: StepReport) -> None:
        """Append the loss."""
        self.values.append(report.loss)


@dataclass(frozen=True)
class Place:
    """The device and the precision of all sides."""

    device: torch.device
    bf16: bool

    def accelerator(self) -> Accelerator:
        """A new Accelerator, because Trainer resets the state that accelerators share."""
        return Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="bf16" if self.bf16 else "no",
            step_scheduler_with_optimizer=False,
        )

    def arguments(self, folder: str) -> dict:
        """TrainingArguments of both trainers: one epoch, no reports, no checkpoints."""
        return {
            "output_dir": folder,
            "num_train_epochs": 1,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
            "bf16": self.bf16,
            "dataloader_pin_memory": self.device.type != "cpu",
        }


# ---- the generator phase


def our_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace, **changes: object
) -> Callable[[int], Callable[[], Generator]]:
    """`train_generator` over the first rows, with the defaults of the package and `changes` to them."""
    chosen = {"generator_batch_size": options.generator_batch, "generator_learning_rate": options.learning_rate}
    settings = TrainingSettings(**chosen | changes)

    def build(rows: int) -> Callable[[], Generator]:
        accelerator = place.accelerator()
        generator = Generator.load(models.generator_folder)
        generator.model.to(place.device)
        answers = [[answer] for answer in prompts.answers[:rows]]
        table = Table(question=prompts.questions[:rows], context=prompts.contexts[:rows], answers=answers)

        def run() -> Generator:
            train_generator(
                accelerator,
                generator,
                table,
                settings=settings,
                context_tokens=options.context_tokens,
                round_number=1,
                callback=Losses(),
            )
            return generator

        return run

    return build


def reference_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace
) -> Callable[[int], Callable[[], Generator]]:
    """The reference loop over the first rows, with the dropout of the config."""

    def build(rows: int) -> Callable[[], Generator]:
        model = AutoModelForCausalLM.from_pretrained(
            models.generator_folder, dtype=torch.float32, trust_remote_code=False
        ).to(place.device)
        generator = Generator(model, AutoTokenizer.from_pretrained(models.generator_folder, trust_remote_code=False))

        def run() -> Generator:
            torch.manual_seed(options.seed)
            reference_loop.train_generator(
                model,
                generator.tokenizer,
                prompts.examples[:rows],
                prompts.questions[:rows],
                device=place.device,
                autocast=place.bf16,
                learning_rate=options.learning_rate,
                batch_size=options.reference_batch,
                pad_to=options.pad_to,
            )
            return generator

        return run

    return build


def trainer_generator(models: Models, prompts: Prompts, place: Place, options: Namespace) -> Build:
    """transformers.Trainer over the same token ids, padded to the longest of a batch, dropout as in the config."""

    def build(rows: int) -> Run:
        model = AutoModelForCausalLM.from_pretrained(
            models.generator_folder, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(models.generator_folder, trust_remote_code=False)
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                **place.arguments(folder),
                per_device_train_batch_size=options.generator_batch,
                learning_rate=options.learning_rate,
                remove_unused_columns=False,
            )
            trainer = Trainer(
                model,
                arguments,
                train_dataset=prompts.examples[:rows],
                data_collator=lambda batch: reference_loop.padded(batch, pad_id=pad_id, pad_to=0),
            )
        trainer.remove_callback(PrinterCallback)
        return trainer.train

    return build


def generator_sides(models: Models, prompts: Prompts, place: Place, options: Namespace) -> list[Side]:
    """Ours without and with penalties, the reference loop, transformers.Trainer."""
    pairs, batch = options.pairs, options.generator_batch
    reference = reference_generator(models, prompts, place, options)
    return [
        Side(OURS, pairs, batch, our_generator(models, prompts, place, options)),
        Side(PENALIZED, pairs, batch, our_generator(models, prompts, place, options, **PENALTIES)),
        Side(REFERENCE, options.reference_pairs, options.reference_batch, reference),
        Side(HF_TRAINER, pairs, batch, trainer_generator(models, prompts, place, options)),
    ]


@torch.inference_mode()
def answer_loss(generator: Generator, prompts: Prompts, batch_size: int) -> float:
    """Nats per answer token, without dropout."""
    losses = TokenLosses(generator.model.eval())
    total = 0.0
    for start in range(0, len(prompts.examples), batch_size):
        batch = collate(prompts.examples[start : start + batch_size], pad_id=generator.tokenizer.pad_token_id)
        total += losses(**{name: tensor.to(generator.device) for name, tensor in batch.items()}).sum().item()
    return total / answer_tokens(prompts.examples)


# ---- the retriever phase


def our_retriever(
    models: Models, asked: Asked, passages: Passages, negatives: list[int], place: Place, options: Namespace
) -> Build:
    """`train_retriever` over the first rows, each with its gold passage and one hard negative."""
    settings = TrainingSettings(retriever_batch_size=options.retriever_batch)

    def build(rows: int) -> Run:
        accelerator = place.accelerator()
        retriever = models.load_retriever(str(place.device), options.passage_tokens)
        table = Table(
            question=asked.questions[:rows],
            answers=[[answer] for answer in asked.answers[:rows]],
            positive=asked.gold[:rows],
            id=[str(row) for row in range(rows)],
            negatives=[[row] for row in negatives[:rows]],
            rows=[[row] for row in asked.gold[:rows]],
        )
        return lambda: train_retriever(
            accelerator, retriever, table, passages, settings=settings, round_number=1, callback=Losses()
        )

    return build


def st_trainer(models: Models, triplets: Triplets, place: Place, options: Namespace) -> Build:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss; needs datasets."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    def build(rows: int) -> Run:
        model = models.load_retriever(str(place.device), options.passage_tokens).model
        columns = zip(("anchor", "positive", "negative"), zip(*triplets[:rows], strict=True), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                **place.arguments(folder),
                per_device_train_batch_size=options.retriever_batch,
                learning_rate=RETRIEVER_RATE,
            )
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments,
                train_dataset=Dataset.from_dict({name: list(column) for name, column in columns}),
                loss=MultipleNegativesRankingLoss(model, scale=20.0),
            )
        trainer.remove_callback(PrinterCallback)
        return trainer.train

    return build


def st_loop(models: Models, triplets: Triplets, place: Place, options: Namespace) -> Build:
    """The same loss and batches in a plain loop; does not need datasets."""

    def build(rows: int) -> Run:
        model = models.load_retriever(str(place.device), options.passage_tokens).model
        return lambda: reference_loop.train_retriever(
            model,
            triplets[:rows],
            autocast=place.bf16,
            learning_rate=RETRIEVER_RATE,
            batch_size=options.retriever_batch,
        )

    return build


def retriever_sides(
    models: Models, asked: Asked, passages: Passages, place: Place, options: Namespace, *, with_datasets: bool
) -> list[Side]:
    """Ours, SentenceTransformerTrainer if datasets is installed, and its loss in a plain loop.

    Negatives are drawn at random, which costs as much in training as mined ones; mining is part of retrieval.
    """
    drawn = torch.randint(1, max(2, len(passages.ids)), (len(asked.gold),), generator=torch.Generator().manual_seed(0))
    negatives = [(gold + step) % len(passages.ids) for gold, step in zip(asked.gold, drawn.tolist(), strict=True)]
    triplets = list(zip(asked.questions, passages.select(asked.gold), passages.select(negatives), strict=True))
    size, warm_up = options.retriever_pairs, options.retriever_batch
    sides = [Side(OURS, size, warm_up, our_retriever(models, asked, passages, negatives, place, options))]
    if with_datasets:
        sides.append(Side(ST_TRAINER, size, warm_up, st_trainer(models, triplets, place, options)))
    return [*sides, Side(ST_LOOP, size, warm_up, st_loop(models, triplets, place, options))]
