"""The steps that qa.py and retrieval.py share: load models and questions, search, build contexts, answer.

Batches and blocks of questions are the same for any number of processes, so the results are too. Left out: which
systems are compared, and how results are reported.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset

from benchmarks.shared.corpus import accelerator_of, stored_index
from benchmarks.shared.pairs import Pair, ReadingSettings, base_names, load_pair
from benchmarks.shared.suites import Task, load_task
from cozyrag.evaluation.evaluation import evaluate_pair
from cozyrag.models.generator import Decoding, Generator
from cozyrag.pair_evaluation import contexts_of
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import ContextBuilder, sentence_source
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.run_log import peak_memory

WARM_UP = 3  # questions that are not timed


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model and the output."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="output folder of a run, user/name on the Hub, or `embedded`")
    add("--json", metavar="OUT", type=Path, required=True, help="output file; the other files are written beside it")
    add("--index", metavar="FOLDER", type=Path, help="cache of vectors (default: `vectors` beside OUT)")
    add("--base_retriever", metavar="NAME", help="retriever that MODEL was trained from (default: from settings.json)")
    add("--base_generator", metavar="NAME", help="generator that MODEL was trained from (default: from settings.json)")
    add("--threads", type=int, help="CPU threads of each process (default: its share of the cores)")


# ---- times


@dataclass
class Clock:
    """Seconds that the main process spent in each part of a benchmark."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a part."""
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


def latencies(answer: Callable[[list[str]], object], questions: Sequence[str]) -> dict:
    """Median and 95th percentile, in milliseconds, of questions asked one at a time, after WARM_UP others."""
    for question in questions[:WARM_UP]:
        answer([question])
    took = []
    for question in tqdm(questions, desc="one question at a time", unit="question"):
        began = time.perf_counter()
        answer([question])
        took.append(1000 * (time.perf_counter() - began))
    middle, slow = np.quantile(took, [0.5, 0.95])
    return {"questions": len(took), "p50_ms": round(float(middle), 1), "p95_ms": round(float(slow), 1)}


def machine_facts(accelerator: Accelerator) -> dict:
    """The machine, the number of processes and threads, and the peak memory."""
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    return {
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": system,
        "peak_memory_gb": round(peak_memory() / 1e9, 2),
    }


# ---- search, contexts, answers


@dataclass(frozen=True)
class Bench:
    """The questions and passages, and the steps that all systems of a benchmark go through."""

    accelerator: Accelerator
    options: argparse.Namespace
    task: Task
    reading: ReadingSettings
    lexical: LexicalIndex
    sparse_builder: ContextBuilder
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def load(cls, options: argparse.Namespace, precision: str | None = None) -> tuple["Bench", Pair]:
        """Load the tables and MODEL, which infers in `precision`. Raises InputError for unusable input."""
        options.index = options.index or options.json.parent / "vectors"
        accelerator = accelerator_of(options.threads)
        pair, reading = load_pair(options.model, accelerator.device, precision)
        task = load_task(options, pair.index)
        passages = Passages.of(task.passages)
        builder = ContextBuilder(
            passages, pair.generator.count_tokens, top_k=reading.top_k, budget=reading.context_tokens,
            words=SentenceWords(passages.titles, passages.sentences(), stemmer=reading.stemmer),
        )  # fmt: skip
        lexical = LexicalIndex(passages.to_read(), stemmer=reading.stemmer)
        return cls(accelerator, options, task, reading, lexical, builder), pair

    def base_names(self) -> tuple[str | None, str | None]:
        """Names of the (retriever, generator) that MODEL was trained from, if known."""
        return base_names(self.options.model, self.options.base_retriever, self.options.base_generator)

    def introduce(self, pair: Pair, questions: int) -> None:
        """Print questions, passages, and model."""
        passages = len(self.task.passages)
        self.accelerator.print(f"{questions} questions of {self.task.name}, {passages} passages, model {pair.name}.")

    def known_golds(self, table: Dataset) -> list[tuple[str, int]]:
        """(question, row of its gold passage) for the questions whose gold passage is among the passages."""
        columns = table[:]
        row_of = self.sparse_builder.passages.rows_of(columns["passage_id"])
        pairs = zip(columns["question"], columns["passage_id"], strict=True)
        return [(question, row_of[gold]) for question, gold in pairs if gold in row_of]

    def index(self, pair: Pair) -> PassageIndex:
        """The index that the pair came with if it is of the task's passages, otherwise one from cached vectors."""
        if pair.index is not None and pair.index.passages == self.sparse_builder.passages:
            return pair.index
        with self.clock.timed(f"passages of the {pair.name}"):
            return stored_index(self.accelerator, self.options.index, self.task.passages, pair.retriever)

    def searcher(
        self, pair: Pair, index: PassageIndex, mode: str, *, whole: bool = False, reranked: bool = False
    ) -> Searcher:
        """The search of the pair. Fusion weights that were never fitted are fitted on training questions, as in a run.

        `whole`: score whole passages instead of their best sentences, with other weights. `reranked`: with the pair's
        reranker, if it has one.
        """
        searcher = Searcher(
            index,
            self.lexical,
            encode=lambda texts: pair.retriever.encode(texts, kind="query", batch_size=64),
            mode=mode,
            words=None if whole else self.sparse_builder.words,
            weights=None if whole else pair.weights,
        )
        if mode == "hybrid" and searcher.weights is None and self.task.fusion is not None:
            if known := self.known_golds(self.task.fusion):
                with self.clock.timed("fitting the fusion weights"):
                    searcher, _ = searcher.fitted(*(list(column) for column in zip(*known, strict=True)))
        # All processes use the weights that the main process fitted.
        [weights] = broadcast_object_list([asdict(searcher.fusion_weights)])
        reranking = replace(pair.reranking, passages=index.passages) if reranked and pair.reranking else None
        return replace(searcher, weights=Weights(**weights), reranking=reranking)

    def builder(self, pair: Pair, index: PassageIndex) -> ContextBuilder:
        """The context builder with the context filter of MODEL and the sentence vectors of `pair`."""
        if self.reading.context_filter == "sparse" or not pair.retriever.reads_sentences:
            return self.sparse_builder
        vectors = sentence_source(index, pair.retriever)
        return replace(self.sparse_builder, score_by=self.reading.context_filter, sentence_vectors=vectors)

    def contexts(self, searcher: Searcher, builder: ContextBuilder, name: str) -> Dataset:
        """The contexts table of all questions. Every process makes some blocks of it, and all get the whole table."""
        step = f"retrieving: {name}"
        with self.clock.timed(step):
            return contexts_of(self.accelerator, self.task.questions, searcher, builder, step)

    def answer(self, generator: Generator, contexts: Dataset, name: str, threshold: float | None) -> list[dict]:
        """The evaluated rows of one system."""
        with self.clock.timed(f"answering: {name}"):
            _, rows = evaluate_pair(
                self.accelerator,
                generator,
                contexts,
                top_k=self.reading.top_k,
                decoding=Decoding.of(self.reading),
                no_answer_threshold=threshold,
                batch_size=self.options.batch_size,
                desc=f"answering: {name}",
            )
        return rows


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON, in a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
