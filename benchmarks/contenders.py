"""The sides of each part of the speed benchmark: the package's own code, the reference loop, the libraries' trainers.

Each side loads its models anew before every repetition, untimed, so that all start from equal weights and none profits
from what another left behind. Left out: measuring (measuring.py), the loop itself (reference_loop.py).
"""

import itertools
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import numpy as np
import reference_loop
import torch
from accelerate import Accelerator
from measuring import Side
from speed_data import Asked, Models, Prompts
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

from cozyrag.config import TrainingSettings
from cozyrag.models.batching import answer_tokens, collate
from cozyrag.models.generator import Generator, TokenLosses
from cozyrag.models.int8_encoding import FLOAT32, INT8
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.generator_phase import train_generator
from cozyrag.training.retriever_phase import train_retriever
from cozyrag.training.trainer import PhaseCallback, StepReport

OURS, PENALIZED, REFERENCE = "CoZyRAG", "CoZyRAG, penalties on", "reference loop"
OURS_INT8 = "CoZyRAG, int8"
HF_TRAINER, ST_TRAINER, ST_LOOP = "transformers.Trainer", "SentenceTransformerTrainer", "plain loop, library's loss"
ST_ENCODE, ST_ENCODE_EQUAL = "SentenceTransformer.encode", "SentenceTransformer.encode, our length limit"
RETRIEVER_RATE = TrainingSettings().retriever_learning_rate  # for all sides
PENALTIES = {"repeat_penalty": 0.1, "keyword_penalty": 0.1, "short_penalty": 0.1}


class Table:
    """Columns that the trainer reads as it would a Dataset, which may not be installed."""

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
    """A watcher of a phase that keeps the losses and saves nothing."""

    values: list[float] = field(default_factory=list)

    def after_step(self, report: StepReport) -> None:
        """Keep the loss."""
        self.values.append(report.loss)


@dataclass(frozen=True)
class Place:
    """Where all sides compute, and how exactly."""

    device: torch.device
    bf16: bool

    def accelerator(self) -> Accelerator:
        """A fresh one: Trainer resets what accelerators share."""
        return Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="bf16" if self.bf16 else "no",
            step_scheduler_with_optimizer=False,
        )

    def arguments(self, folder: str) -> dict:
        """What TrainingArguments of both kinds of trainer are told: to train and nothing else."""
        return {
            "output_dir": folder, "num_train_epochs": 1, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "use_cpu": self.device.type == "cpu", "bf16": self.bf16,
            "dataloader_pin_memory": self.device.type != "cpu",
        }  # fmt: skip


# ---- the generator phase


def our_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace, **changes
) -> Callable[[int], Callable[[], Generator]]:
    """`train_generator` over the first rows, with the package's defaults and `changes` to them."""
    chosen = {"generator_batch_size": options.generator_batch, "generator_learning_rate": options.learning_rate}
    settings = TrainingSettings(**chosen | changes)

    def build(rows: int) -> Callable[[], Generator]:
        accelerator = place.accelerator()
        generator = Generator.load(models.generator_folder)
        generator.model.to(place.device)
        table = Table(
            question=prompts.questions[:rows],
            context=prompts.contexts[:rows],
            answers=[[answer] for answer in prompts.answers[:rows]],
        )

        def act() -> Generator:
            train_generator(
                accelerator, generator, table, settings=settings, context_tokens=options.context_tokens, round_number=1,
                callback=Losses(),
            )  # fmt: skip
            return generator

        return act

    return build


def reference_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace
) -> Callable[[int], Callable[[], Generator]]:
    """The plain loop over the first rows, the model as its config has it (dropout)."""

    def build(rows: int) -> Callable[[], Generator]:
        model = AutoModelForCausalLM.from_pretrained(models.generator_folder, dtype=torch.float32).to(place.device)
        generator = Generator(model, AutoTokenizer.from_pretrained(models.generator_folder))

        def act() -> Generator:
            torch.manual_seed(options.seed)
            reference_loop.train_generator(
                model, generator.tokenizer, prompts.examples[:rows], prompts.questions[:rows], device=place.device,
                autocast=place.bf16, learning_rate=options.learning_rate, batch_size=options.reference_batch,
                pad_to=options.pad_to,
            )  # fmt: skip
            return generator

        return act

    return build


def trainer_generator(
    models: Models, prompts: Prompts, place: Place, options: Namespace
) -> Callable[[int], Callable[[], object]]:
    """transformers.Trainer over the same token ids, padded to the longest of a batch, the model as its config has it."""

    def build(rows: int) -> Callable[[], object]:
        model = AutoModelForCausalLM.from_pretrained(models.generator_folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(models.generator_folder)
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
    batch = options.generator_batch
    few = options.reference_pairs
    return [
        Side(OURS, options.pairs, batch, our_generator(models, prompts, place, options)),
        Side(PENALIZED, options.pairs, batch, our_generator(models, prompts, place, options, **PENALTIES)),
        Side(REFERENCE, few, options.reference_batch, reference_generator(models, prompts, place, options)),
        Side(HF_TRAINER, options.pairs, batch, trainer_generator(models, prompts, place, options)),
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
) -> Callable[[int], Callable[[], object]]:
    """`train_retriever` over the first rows, each with its gold passage and one hard negative."""
    settings = TrainingSettings(retriever_batch_size=options.retriever_batch)

    def build(rows: int) -> Callable[[], object]:
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


def st_trainer(
    models: Models, triplets: list[tuple[str, str, str]], place: Place, options: Namespace
) -> Callable[[int], Callable[[], object]]:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss; needs datasets."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    def build(rows: int) -> Callable[[], object]:
        model = models.load_retriever(str(place.device), options.passage_tokens).model
        columns = zip(("anchor", "positive", "negative"), zip(*triplets[:rows], strict=True), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            trainer = SentenceTransformerTrainer(
                model=model,
                args=SentenceTransformerTrainingArguments(
                    **place.arguments(folder),
                    per_device_train_batch_size=options.retriever_batch,
                    learning_rate=RETRIEVER_RATE,
                ),
                train_dataset=Dataset.from_dict({name: list(column) for name, column in columns}),
                loss=MultipleNegativesRankingLoss(model, scale=20.0),
            )
        trainer.remove_callback(PrinterCallback)
        return trainer.train

    return build


def st_loop(
    models: Models, triplets: list[tuple[str, str, str]], place: Place, options: Namespace
) -> Callable[[int], Callable[[], object]]:
    """The same loss and batch in a loop of a few lines; needs no datasets."""

    def build(rows: int) -> Callable[[], object]:
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
    """Ours, SentenceTransformerTrainer if it can be had, and its loss in a plain loop.

    Negatives are drawn at random, which costs training what mined ones do; mining is measured with retrieval.
    """
    drawn = torch.randint(1, max(2, len(passages.ids)), (len(asked.gold),), generator=torch.Generator().manual_seed(0))
    negatives = [(gold + step) % len(passages.ids) for gold, step in zip(asked.gold, drawn.tolist(), strict=True)]
    positive_texts, negative_texts = passages.select(asked.gold), passages.select(negatives)
    triplets = list(zip(asked.questions, positive_texts, negative_texts, strict=True))
    size, warm_up = options.retriever_pairs, options.retriever_batch
    sides = [Side(OURS, size, warm_up, our_retriever(models, asked, passages, negatives, place, options))]
    if with_datasets:
        sides.append(Side(ST_TRAINER, size, warm_up, st_trainer(models, triplets, place, options)))
    return [*sides, Side(ST_LOOP, size, warm_up, st_loop(models, triplets, place, options))]


# ---- the index and retrieval


def index_sides(models: Models, passages: Passages, place: Place, options: Namespace) -> list[Side]:
    """Ours, which gives the vectors of all sentences too, also with 8 bits, and `encode` as it comes and with our length limit."""

    def ours(rows: int, precision: str = FLOAT32) -> Callable[[], object]:
        retriever = models.load_retriever(str(place.device), options.passage_tokens)
        some, reading = range(rows), ExitStack()
        reading.enter_context(retriever.reading_in(precision))  # made ready here, untimed

        def act() -> object:
            with reading:
                return retriever.encode_passages(
                    passages.select(some), passages.spans(some), batch_size=options.encode_batch
                )

        return act

    def library(limit: int | None) -> Callable[[int], Callable[[], object]]:
        def build(rows: int) -> Callable[[], object]:
            model = models.load_retriever(str(place.device), limit).model
            return lambda: model.encode(passages.select(range(rows)), show_progress_bar=False)

        return build

    size, warm_up = min(options.index_passages, len(passages.ids)), options.encode_batch
    eight = place.device.type == "cpu" and find_spec("onnx") and find_spec("onnxruntime")
    return [
        Side(OURS, size, warm_up, ours),
        *([Side(OURS_INT8, size, warm_up, partial(ours, precision=INT8))] if eight else []),
        Side(ST_ENCODE, size, warm_up, library(None)),
        Side(ST_ENCODE_EQUAL, size, warm_up, library(options.passage_tokens)),
    ]


def searched(asked: Asked, passages: Passages, limit: int) -> tuple[Passages, list[str]]:
    """The passages that are searched, gold ones first and `limit` at most, and the gold id of each question."""
    rows = list(dict.fromkeys([*asked.gold, *range(len(passages.ids))]))[: max(limit, len(set(asked.gold)))]
    columns = ([column[row] for row in rows] for column in (passages.ids, passages.titles, passages.texts))
    return Passages(*columns), [passages.ids[row] for row in asked.gold]


class Retrieval:
    """An index of passages, and the two ways from questions to contexts that are compared on it; needs datasets and faiss."""

    def __init__(self, models: Models, asked: Asked, passages: Passages, place: Place, options: Namespace):
        import faiss
        from datasets import Dataset

        from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
        from cozyrag.retrieval.passage_index import PassageIndex

        self.asked, self.options = asked, options
        self.passages, self.gold = searched(asked, passages, options.searched_passages)
        self.generator = Generator.load(models.generator_folder)
        self.retriever = models.load_retriever(str(place.device), options.passage_tokens)
        texts, spans = self.passages.to_read(), self.passages.spans(range(len(self.passages.ids)))
        vectors, sentences = self.retriever.encode_passages(texts, spans, batch_size=options.encode_batch)
        table = Dataset.from_dict({"id": self.passages.ids, "title": self.passages.titles, "text": self.passages.texts})
        self.index = PassageIndex(table, vectors, fingerprint="benchmark", sentences=sentences)
        self.lexical = LexicalIndex(texts, stemmer="english")
        self.words = SentenceWords(self.passages.titles, self.passages.sentences(), stemmer="english")
        self.flat = faiss.IndexFlatIP(vectors.shape[1])
        self.flat.add(vectors)
        self._numbers = itertools.count()

    def ours(self, rows: int) -> Callable[[], object]:
        """`attach_contexts` with hybrid search, as a run does it, with fresh caches."""
        from datasets import Dataset

        from cozyrag.retrieval.contexts import SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
        from cozyrag.retrieval.hybrid import Searcher

        def encode(texts: Sequence[str]) -> np.ndarray:
            return self.retriever.encode(texts, kind="query", batch_size=self.options.encode_batch)

        searcher = Searcher(self.index, self.lexical, encode=encode, mode="hybrid", words=self.words)
        builder = ContextBuilder(
            self.passages, self.generator.count_tokens, top_k=self.options.top_k, budget=self.options.context_tokens,
            hard_negatives=1, score_by="hybrid", sentence_vectors=sentence_source(self.index, self.retriever), words=self.words,
        )  # fmt: skip
        questions = Dataset.from_dict(
            {
                "id": [f"q{row}" for row in range(rows)],
                "question": self.asked.questions[:rows],
                "answers": [[answer] for answer in self.asked.answers[:rows]],
                "passage_id": self.gold[:rows],
            }
        )
        return lambda: attach_contexts(
            questions,
            search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
            builder=builder,
            fingerprint=f"speed-{next(self._numbers)}",
        )

    def reference(self, rows: int) -> Callable[[], object]:
        """One question and one sentence at a time."""
        return lambda: [
            reference_loop.make_context(
                question,
                model=self.retriever.model,
                index=self.flat,
                passages=self.passages,
                tokenizer=self.generator.tokenizer,
                top_k=self.options.top_k,
                budget=self.options.context_tokens,
            )
            for question in tqdm(self.asked.questions[:rows], desc="reference loop", unit="question", leave=False)
        ]

    def sides(self) -> list[Side]:
        """Both."""
        return [
            Side(OURS, self.options.retrieval_questions, 8, self.ours),
            Side(REFERENCE, self.options.reference_questions, 2, self.reference),
        ]
