"""What qa.py and retrieval.py stand on: models, questions and passages loaded, and contexts made for every way to search.

What is done together (blocks of questions, batches) is the same for any number of processes, so that results are too. Left
out: what is compared, and how it is told.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset
from latency import Clock
from pairs import Pair, Reading, base_names, load_pair
from searching import accelerator_of, stored_index
from suites import Task, load_task

from cozyrag.evaluation.evaluation import evaluate_pair
from cozyrag.evaluation.metrics import contains_answer, normalize_answer
from cozyrag.models.generator import Decoding, Generator
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import CONTEXT_FEATURES, SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.passage_index import PassageIndex, Passages

TOGETHER = 256  # questions searched for at once


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that this benchmark and retrieval.py share."""
    parser.add_argument("model", metavar="MODEL", help="output folder of a run, user/name on the Hub, or `embedded`")
    parser.add_argument("--json", metavar="OUT", type=Path, required=True, help="where the numbers go: OUT.json")
    parser.add_argument(
        "--index", metavar="FOLDER", type=Path, help="where vectors are kept (default: `vectors` beside OUT)"
    )
    parser.add_argument(
        "--base_retriever", metavar="NAME", help="what MODEL's retriever was (default: as its run noted)"
    )
    parser.add_argument(
        "--base_generator", metavar="NAME", help="what MODEL's generator was (default: as its run noted)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each process (default: its share of the cores)")


@dataclass
class Bench:
    """What all rows share."""

    accelerator: Accelerator
    options: argparse.Namespace
    task: Task
    reading: Reading
    clock: Clock
    lexical: LexicalIndex
    builder: ContextBuilder

    def base_names(self) -> tuple[str | None, str | None]:
        """Names of the (retriever, generator) that the model was trained from, as far as they are known."""
        return base_names(self.options.model, self.options.base_retriever, self.options.base_generator)

    def index(self, pair: Pair) -> PassageIndex:
        """The pair's index of the task's passages: its own if these are they, else that of the vectors kept."""
        if pair.index is not None and pair.index.passages == self.builder.passages:
            return pair.index
        with self.clock.timed(f"passages of the {pair.name}"):
            return stored_index(self.accelerator, self.options.index, self.task.passages, pair.retriever)

    def searcher(self, pair: Pair, index: PassageIndex, mode: str, *, whole: bool = False) -> Searcher:
        """The pair's search; where its weights were never fitted, they are now, on questions trained on, as a run does.

        `whole`: passages count as wholes and not as their best sentences, with weights of their own.
        """
        encode = lambda texts: pair.retriever.encode(texts, kind="query", batch_size=64)  # noqa: E731
        words, weights = (None, None) if whole else (self.builder.words, pair.weights)
        searcher = Searcher(index, self.lexical, encode=encode, mode=mode, words=words, weights=weights)
        if mode == "hybrid" and weights is None and self.task.weigh is not None:
            columns = self.task.weigh[:]
            known = [
                (question, self.builder.row_of[gold])
                for question, gold in zip(columns["question"], columns["passage_id"], strict=True)
                if gold in self.builder.row_of
            ]
            if known:
                with self.clock.timed("weighing the searches"):
                    searcher.fit_fusion_weights(*(list(column) for column in zip(*known, strict=True)))
        searcher.weights = Weights(**broadcast_object_list([asdict(searcher.weights)])[0])
        return searcher

    def read_with(self, pair: Pair, index: PassageIndex, score_by: str) -> None:
        """Have the maker choose sentences this way, by this pair's vectors."""
        self.builder.score_by = score_by if pair.retriever.reads_sentences else "sparse"
        self.builder.sentence_vectors = sentence_source(index, pair.retriever)

    def contexts(self, searcher: Searcher, name: str) -> Dataset:
        """The contexts table of all questions; every process does some blocks of them and all get the whole."""
        questions, accelerator = self.task.questions, self.accelerator
        starts = range(0, len(questions), TOGETHER)[accelerator.process_index :: accelerator.num_processes]
        mine = [row for start in starts for row in range(start, min(start + TOGETHER, len(questions)))]
        with (
            tqdm(total=len(mine), desc=f"retrieving: {name}", unit="question") as bar,
            self.clock.timed(f"retrieving: {name}"),
        ):
            made = attach_contexts(
                questions.select(mine),
                search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
                builder=self.builder,
                fingerprint=f"benchmark-{name.split()[0]}-{accelerator.process_index}",
                batch_size=TOGETHER,
                progress=bar.update,
            )
            parts = gather_object([(mine, made[:])])
        table: dict[str, list] = {column: [None] * len(questions) for column in CONTEXT_FEATURES}
        for rows, columns in parts:
            for column, values in columns.items():
                for row, value in zip(rows, values, strict=True):
                    table[column][row] = value
        return Dataset.from_dict(table, features=CONTEXT_FEATURES)

    def with_passages(
        self, contexts: Dataset, vectors_of: Callable[[Sequence[str]], np.ndarray | None], rows: list[list[int]]
    ) -> Dataset:
        """The table with these passages read instead of those found; vectors are not needed where words choose the sentences."""
        columns = contexts[:]
        questions = columns["question"]
        made: list[str] = []
        for start in range(0, len(rows), TOGETHER):
            block = slice(start, start + TOGETHER)
            made += self.builder.contexts(questions[block], rows[block], vectors_of(questions[block]))
        held = [
            contains_answer(normalize_answer(text), answers)
            for text, answers in zip(made, columns["answers"], strict=True)
        ]
        return Dataset.from_dict(
            columns | {"rows": rows, "context": made, "answer_in_context": held}, features=CONTEXT_FEATURES
        )

    def answer(self, generator: Generator, contexts: Dataset, name: str, threshold: float | None) -> list[dict]:
        """Examined rows."""
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


def open_bench(options: argparse.Namespace) -> tuple[Bench, Pair]:
    """Load the models and the tables. Raises InputError for what cannot be used."""
    options.index = options.index or options.json.parent / "vectors"
    accelerator = accelerator_of(options.threads)
    pair, reading = load_pair(options.model, accelerator.device)
    task = load_task(options, pair.index)
    passages = Passages.of(task.passages)
    builder = ContextBuilder(
        passages, pair.generator.count_tokens, top_k=reading.top_k, budget=reading.context_tokens, score_by="sparse",
        words=SentenceWords(passages.titles, passages.sentences(), stemmer=reading.stemmer),
    )  # fmt: skip
    lexical = LexicalIndex(passages.to_read(), stemmer=reading.stemmer)
    return Bench(accelerator, options, task, reading, Clock(), lexical, builder), pair
