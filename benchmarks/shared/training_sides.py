"""Sides of the speed benchmark for training: the package, the reference loop, the trainers of the libraries.

Each side loads its models again before every repetition, which is not timed, so that all start from equal weights. Its
run returns the trained model; its warm-up is one batch. Left out: trainers that need another Python environment
(foreign_sides.py), index and retrieval (retrieval_sides.py), measuring (measuring.py), the loop (reference_loop.py).
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from benchmarks.shared import reference_loop, stub_modules
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
SFT, SFT_KEEPING = "trl.SFTTrainer", "trl.SFTTrainer, no gradient checkpointing"
IN_BF16 = ", bf16"
RETRIEVER_RATE = TrainingSettings().retriever_learning_rate  # for all sides
PENALTIES = {"repeat_penalty": 0.1, "keyword_penalty": 0.1, "short_penalty": 0.1}

Trained = TypeVar("Trained", Generator, SentenceTransformer)
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

    def of_libraries(self, options: Namespace) -> "dict[str, Place]":
        """The precisions of the libraries' trainers, by what they add to a side's name: float32 as it comes, bf16."""
        bf16 = self.bf16 or options.bf16_sides
        return {"": replace(self, bf16=False)} | ({IN_BF16: replace(self, bf16=True)} if bf16 else {})

    def accelerator(self) -> Accelerator:
        """A new Accelerator: Trainer changes the state that accelerators share, its precision too."""
        AcceleratorState._reset_state(reset_partial_state=True)
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
        generator = as_it_comes(models)
        generator.model.to(place.device)

        def run() -> Generator:
            torch.manual_seed(options.seed)
            reference_loop.train_generator(
                generator.model,
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


def trainer_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace
) -> Callable[[int], Callable[[], Generator]]:
    """transformers.Trainer over the same token ids, padded to the longest of a batch, dropout as in the config."""

    def build(rows: int) -> Callable[[], Generator]:
        generator = as_it_comes(models)
        pad_id = generator.tokenizer.pad_token_id
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                **place.arguments(folder),
                per_device_train_batch_size=options.generator_batch,
                learning_rate=options.learning_rate,
                remove_unused_columns=False,
            )
            trainer = Trainer(
                generator.model,
                arguments,
                train_dataset=prompts.examples[:rows],
                data_collator=lambda batch: reference_loop.padded(batch, pad_id=pad_id, pad_to=0),
            )
        return running(trainer, generator)

    return build


def sft_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace, **changes: object
) -> Callable[[int], Callable[[], Generator]]:
    """TRL's SFTTrainer over the same token ids, with the loss of the answers only; needs trl and datasets.

    Its defaults hold (gradient checkpointing among them), but for `changes` and for bf16, which is on by default.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def build(rows: int) -> Callable[[], Generator]:
        generator = as_it_comes(models)
        examples = prompts.examples[:rows]
        # The form that a prompt-completion data set has once it is tokenized.
        answers = [[int(at >= each.prompt_length) for at in range(len(each.input_ids))] for each in examples]
        table = Dataset.from_dict({"input_ids": [each.input_ids for each in examples], "completion_mask": answers})
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                **place.arguments(folder),
                **changes,
                per_device_train_batch_size=options.generator_batch,
                learning_rate=options.learning_rate,
                completion_only_loss=True,
            )
            trainer = SFTTrainer(generator.model, arguments, train_dataset=table, processing_class=generator.tokenizer)
        return running(trainer, generator)

    return build


def has_trl() -> bool:
    """Whether TRL can run: it is no requirement, and needs datasets."""
    return bool(find_spec("trl")) and "datasets" not in stub_modules.MISSING


def as_it_comes(models: Models) -> Generator:
    """The generator in float32 with the dropout of its config."""
    model = AutoModelForCausalLM.from_pretrained(models.generator_folder, dtype=torch.float32, trust_remote_code=False)
    return Generator(model, AutoTokenizer.from_pretrained(models.generator_folder, trust_remote_code=False))


def running(trainer: Trainer, trained: Trained) -> Callable[[], Trained]:
    """A run of a trainer, which returns what it has trained."""
    trainer.remove_callback(PrinterCallback)

    def run() -> Trained:
        trainer.train()
        return trained

    return run


def generator_sides(models: Models, prompts: Prompts, place: Place, options: Namespace) -> list[Side]:
    """Ours without and with penalties, the reference loop, transformers.Trainer, TRL's if it is installed."""
    pairs, batch = options.pairs, options.generator_batch
    reference = reference_generator(models, prompts, place, options)
    theirs = place.of_libraries(options)
    sides = [
        Side(OURS, pairs, batch, our_generator(models, prompts, place, options)),
        Side(PENALIZED, pairs, batch, our_generator(models, prompts, place, options, **PENALTIES)),
        Side(REFERENCE, options.reference_pairs, options.reference_batch, reference),
    ]
    for precision, at in theirs.items():
        sides.append(Side(HF_TRAINER + precision, pairs, batch, trainer_generator(models, prompts, at, options)))
    for precision, at in theirs.items() if has_trl() else ():
        keeping = sft_generator(models, prompts, at, options, gradient_checkpointing=False)
        sides.append(Side(SFT + precision, pairs, batch, sft_generator(models, prompts, at, options)))
        sides.append(Side(SFT_KEEPING + precision, pairs, batch, keeping))
    return sides


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

        def run() -> SentenceTransformer:
            train_retriever(
                accelerator, retriever, table, passages, settings=settings, round_number=1, callback=Losses()
            )
            return retriever.model

        return run

    return build


def st_trainer(models: Models, triplets: Triplets, place: Place, options: Namespace) -> Build:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss; needs datasets."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

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
        return running(trainer, model)

    return build


def st_loop(models: Models, triplets: Triplets, place: Place, options: Namespace) -> Build:
    """The same loss and batches in a plain loop; does not need datasets."""

    def build(rows: int) -> Run:
        model = models.load_retriever(str(place.device), options.passage_tokens).model

        def run() -> SentenceTransformer:
            torch.manual_seed(options.seed)
            reference_loop.train_retriever(
                model,
                triplets[:rows],
                autocast=place.bf16,
                learning_rate=RETRIEVER_RATE,
                batch_size=options.retriever_batch,
            )
            return model

        return run

    return build


def negatives_of(asked: Asked, passages: Passages) -> list[int]:
    """A negative of each question, drawn at random, which costs as much in training as a mined one."""
    drawn = torch.randint(1, max(2, len(passages.ids)), (len(asked.gold),), generator=torch.Generator().manual_seed(0))
    return [(gold + step) % len(passages.ids) for gold, step in zip(asked.gold, drawn.tolist(), strict=True)]


def triplets_of(asked: Asked, passages: Passages) -> Triplets:
    """Questions with the texts of their gold passage and of their negative."""
    texts = passages.select(asked.gold), passages.select(negatives_of(asked, passages))
    return list(zip(asked.questions, *texts, strict=True))


def retriever_sides(
    models: Models, asked: Asked, passages: Passages, place: Place, options: Namespace, *, with_datasets: bool
) -> list[Side]:
    """Ours, SentenceTransformerTrainer if datasets is installed, and its loss in a plain loop.

    Mining negatives is part of retrieval.
    """
    negatives, triplets = negatives_of(asked, passages), triplets_of(asked, passages)
    size, warm_up = options.retriever_pairs, options.retriever_batch
    sides = [Side(OURS, size, warm_up, our_retriever(models, asked, passages, negatives, place, options))]
    for precision, at in place.of_libraries(options).items() if with_datasets else ():
        sides.append(Side(ST_TRAINER + precision, size, warm_up, st_trainer(models, triplets, at, options)))
    return [*sides, Side(ST_LOOP, size, warm_up, st_loop(models, triplets, place, options))]


@torch.inference_mode()
def ranking_loss(model: SentenceTransformer, triplets: Triplets, batch_size: int) -> float:
    """The loss of all sides but the LM-supervised ones, in nats per question, without dropout."""
    objective = MultipleNegativesRankingLoss(model.eval(), scale=20.0)
    total = 0.0
    for start in range(0, len(triplets), batch_size):
        batch = triplets[start : start + batch_size]
        total += objective(reference_loop.columns_of(model, batch), None).item() * len(batch)
    return total / len(triplets)
