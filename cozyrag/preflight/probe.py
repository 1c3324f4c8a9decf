"""Seconds and bytes of each part of a run on this machine: a few real steps on a sample of the run's tables.

The probe calls what a run calls, on few rows first, then on more as long as they fit into the time of the part.
Weights, modes and random states are restored. Left out: how often a run repeats each part (plan.py).
"""

import copy
import io
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from cozyrag.config import Settings, TrainingSettings
from cozyrag.data.corpus import Corpus
from cozyrag.data.passages import read_column, rows_of
from cozyrag.data.questions import take
from cozyrag.evaluation.evaluation import evaluate_pair
from cozyrag.models.fsdp import held_bytes
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.preflight.loss_check import left_as_found
from cozyrag.retrieval.reranking import Reranking
from cozyrag.runtime.atomic_files import replacing, save_tensors
from cozyrag.training.generator_phase import generator_cut, generator_token_bytes, train_generator
from cozyrag.training.lm_feedback import answer_likelihoods
from cozyrag.training.reranker_phase import train_reranker
from cozyrag.training.retriever_phase import retriever_usable, train_retriever
from cozyrag.training.run_log import RunLog, peak_memory
from cozyrag.training.run_retrieval import Retrieval, fusion_questions
from cozyrag.training.trainer import PhaseCallback, StepReport, encoder_cut, encoder_token_bytes, trainable

T = TypeVar("T")
SECONDS = {
    "index": 4.0, "retrieve": 2.0, "rerank": 3.0, "evaluation": 4.0, "feedback": 3.0, "generator": 6.0,
    "retriever": 6.0, "reranker": 6.0,
}  # fmt: skip
PASSAGES = 100  # searched, at least
SAMPLE = 512  # questions, at most
STEPS = 1000  # of a phase, at most
WRITTEN = 32_000_000  # bytes written to time the disk
COMPARISON = 3e-8  # seconds that one more passage adds to the dense and the sparse search for a question


@dataclass(frozen=True)
class Line:
    """Seconds of a part: `each` for every row, `fixed` for every call or step, `once` for set-up and tear-down."""

    each: float = 0.0
    fixed: float = 0.0
    once: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What the probe measured while all processes work: seconds of each part by its rows, and bytes.

    lines: "index" and "words" (BM25 and the words of sentences) by passages; "fit" (fusion weights), "retrieve",
    "evaluation", "feedback" and "rerank" by questions; "generator", "retriever" and "reranker" by rows; "write" by
    bytes. usable: share of
    the questions that the retriever can learn from. Bytes: row, of the contexts table; held and stored, of the index
    for a passage in memory and on disk; answers, at the peak of answering; activations, at the peak of a step of each
    phase; before and peak, of this process before the probe and at most. spent: seconds of the probe.
    """

    lines: Mapping[str, Line]
    usable: float
    row: float
    held: float
    stored: float
    answers: int
    activations: Mapping[str, int]
    before: int
    peak: int = 0
    spent: float = 0.0

    def seconds(self, part: str, calls: float, rows: float) -> float:
        """Seconds of that many calls or steps of a part with that many rows in total; 0 without calls."""
        line = self.lines.get(part, Line())
        return line.once + calls * line.fixed + rows * line.each if calls else 0.0


class Watch(PhaseCallback):
    """Records the seconds of each step of `rows` rows; ends the phase after two steps, once the time is over."""

    def __init__(self, rows: int, seconds: float):
        self.rows, self.ends = rows, time.perf_counter() + seconds
        self.steps: list[float] = []

    def after_step(self, report: StepReport) -> bool:
        """All processes stop together: the first one decides."""
        self.steps.append(self.rows / report.rate)
        return of_first_process(len(self.steps) > 1 and time.perf_counter() > self.ends)


class Probe:
    """Measures the parts of one run; `measure` is the entry point."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        corpus: Corpus,
        generator: Generator,
        retriever: Retriever,
        reranker: Reranker | None = None,
    ):
        self.accelerator, self.corpus, self.generator, self.retriever = accelerator, corpus, generator, retriever
        self.reranker = reranker
        self.settings, self.contexts, self.training = settings, settings.contexts, settings.training
        self.base, self.peak = 0, 0
        self.lines: dict[str, Line] = {}
        self.activations: dict[str, int] = {}

    def measure(self) -> Costs:
        """All costs, the same on every process."""
        started, before, silent = time.perf_counter(), psutil.Process().memory_info().rss, io.StringIO()
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(silent), redirect_stderr(silent):
            self.folder, self.log = Path(folder), RunLog(self.accelerator, Path(folder), [])
            models = [each.model for each in (self.generator, self.retriever, self.reranker) if each is not None]
            with left_as_found(models, weights=True):
                self._grown()  # from here
                self.base = self._grown()
                retrieval = self._index()
                table = self._retrieve(retrieval)
                self._rerank(table, retrieval)
                self._grown()
                self._answer(table)
                answers, likelihoods = self._grown(), self._feedback(table, retrieval)
                usable = retriever_usable(table[:], self.training, likelihoods)
                if self.training.rounds:
                    self._train(table, retrieval, likelihoods)
            self.lines["write"] = Line(timed(self._write) / WRITTEN)
        self._grown()
        return of_first_process(
            Costs(
                self.lines, len(usable) / len(table), table.data.nbytes / len(table), *self._index_bytes(retrieval),
                answers, self.activations, before, self.peak, time.perf_counter() - started,
            )
        )  # fmt: skip

    def _line(self, part: str, whole: int, measure: Callable[[int], tuple[float, float]]) -> None:
        self.lines[part] = line_of(self.accelerator, part, whole, measure)

    def _read(self, part: str, table: Dataset, whole: int, work: Callable[[Dataset], object]) -> None:
        """Time `work` on rows of a table, each time on the next ones."""
        at = 0

        def measure(count: int) -> tuple[float, float]:
            nonlocal at
            chosen, at = table.select([(at + row) % len(table) for row in range(count)]), at + count
            return count, timed(lambda: work(chosen))

        self._line(part, min(whole, len(table)), measure)

    def _grown(self) -> int:
        """Peak bytes since the last call, beyond those at the start; without /proc since the start of the process."""
        device, switch = self.accelerator.device, Path("/proc/self/clear_refs")
        self.peak = max(self.peak, peak_memory())
        found = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif os.access(switch, os.W_OK):
            switch.write_text("5")
        return max(0, found - self.base)

    def _write(self) -> None:
        """Write a file as a checkpoint is written."""
        with replacing(self.folder / "written") as partly:
            save_tensors({"block": np.zeros(WRITTEN // 4, dtype=np.float32)}, partly / "block.safetensors")

    # ---- index and search

    def _retrieval(self, questions: Dataset, rows: Sequence[int]) -> Retrieval:
        """Retrieval in these passages. The output folder is empty, for an index that is there would be read."""
        output = replace(self.settings.output, output_dir=str(self.folder))
        settings = self.settings._replace(data=replace(self.settings.data, index=None), output=output)
        tables = Corpus(questions, questions, self.corpus.passages.select(rows))
        models = self.generator, self.retriever
        return Retrieval(
            self.accelerator, settings, corpus=tables, generator=models[0], retriever=models[1], log=self.log
        )

    def _index(self) -> Retrieval:
        """Index passages of similar length, as in a batch; then a sample for search, BM25 and the fusion weights."""
        longest, random, most = 5 * (self.retriever.model.max_seq_length or math.inf), np.random.default_rng(0), 1
        lengths = np.array([min(len(text) + 1, longest) for text in self.corpus.passages["text"]])
        order = np.argsort(lengths)

        def measure(count: int) -> tuple[float, float]:
            nonlocal most
            at, most = random.integers(len(order) - count + 1), count
            rows = order[at : at + count].tolist()
            return lengths[rows].sum() / lengths.mean(), timed(self._retrieval(self.corpus.questions, rows).index)

        self._line("index", len(order), measure)
        retrieval = self._sample(min(len(order), max(PASSAGES, most)))
        retrieval.index()
        self.log.rows.clear()
        retrieval.snapshot()
        spent = Counter[str]()
        for row in self.log.rows:
            spent[row.get("part", "")] += row.get("seconds", 0.0)
        asked = fusion_questions(retrieval.corpus.questions, self.settings)["passage_id"]
        self.lines["words"] = Line(spent["index"] / len(retrieval.passages.ids))
        self.lines["fit"] = Line(spent["fit fusion weights"] / max(1, sum(name is not None for name in asked)))
        return retrieval

    def _sample(self, count: int) -> Retrieval:
        """Retrieval for questions of a sample in `count` passages: their gold ones and evenly spread ones."""
        sample, passages = take(self.corpus.questions, SAMPLE, self.training.seed), self.corpus.passages
        row_of = rows_of(read_column(passages, "id"), sample["passage_id"])
        gold = [row_of.get(name, -1) for name in sample["passage_id"]]
        spread = np.linspace(0, len(passages) - 1, count).astype(int).tolist()
        rows = list(dict.fromkeys([row for row in gold if row >= 0] + spread))[:count]
        known = {-1, *rows}
        return self._retrieval(sample.select([place for place, row in enumerate(gold) if row in known]), rows)

    def _index_bytes(self, retrieval: Retrieval) -> tuple[float, float]:
        """Bytes of the index for a passage, with BM25 in memory and with the text on disk."""
        index, texts, snapshot = retrieval.index(), retrieval.passages.texts, retrieval.snapshot()
        vectors = index.nbytes
        words = sum(each.nbytes for each in (snapshot.builder.words, snapshot.searcher.lexical) if each)
        return (vectors + words) / len(texts), (vectors + sum(len(text.encode()) for text in texts)) / len(texts)

    def _retrieve(self, retrieval: Retrieval) -> Dataset:
        """Contexts of as many questions as fit."""
        questions, made = retrieval.corpus.questions, [retrieval.corpus.questions]

        def work(asked: Dataset) -> None:
            made.append(retrieval.contexts(asked, "", noise=self.training.context_noise))

        self._read("retrieve", questions, len(questions), work)
        more = COMPARISON * (len(self.corpus.passages) - len(retrieval.passages.ids))
        for part in ("retrieve", "fit"):
            self.lines[part] = replace(self.lines[part], each=self.lines[part].each + more)
        return max(made[1:], key=len)

    def _rerank(self, table: Dataset, retrieval: Retrieval) -> None:
        """Time the reranker on the first passages of as many questions as fit."""
        if self.reranker is None:
            return
        reranking = Reranking(self.reranker.score, retrieval.passages, self.contexts.rerank_passages)

        def work(asked: Dataset) -> None:
            columns = asked.select_columns(["question", "rows"])[:]
            reranking.points(columns["question"], np.array(columns["rows"]))

        self._read("rerank", table, len(table), work)

    # ---- the generator's answers, its feedback, and training

    def _answer(self, table: Dataset) -> None:
        def work(asked: Dataset) -> None:
            evaluate_pair(
                self.accelerator,
                self.generator,
                asked,
                top_k=self.contexts.top_k,
                decoding=Decoding.of(self.contexts),
                batch_size=self.contexts.answer_batch_size,
                no_answer_threshold=1.0 if self.training.no_answer else None,
            )

        whole = self.contexts.answer_batch_size * self.accelerator.num_processes
        with self.generator.reading():
            self._read("evaluation", table, whole, work)

    def _feedback(self, table: Dataset, retrieval: Retrieval) -> np.ndarray | None:
        """Time the generator's feedback; gives likelihoods of the shape that the retriever phase takes, or None."""
        if not self.training.feedback_weight or self.training.retriever_steps == 0:
            return None

        def work(asked: Dataset) -> None:
            answer_likelihoods(
                self.accelerator, self.generator, asked, retrieval.context_filter, lambda: retrieval.snapshot().builder,
                retrieval.encode_questions, passages=self.training.feedback_passages,
                context_tokens=self.contexts.context_tokens, batch_size=self.contexts.answer_batch_size,
                folder=self.folder / str(time.perf_counter_ns()),
            )  # fmt: skip

        answered = table.select([row for row, answers in enumerate(table["answers"]) if answers])
        if len(answered):
            with self.generator.reading():
                self._read("feedback", answered, len(answered), work)
        passages = min(self.training.feedback_passages, len(table["rows"][0]))
        return np.array([[0.0 if answers else np.nan] * passages for answers in table["answers"]], dtype=np.float32)

    def _train(self, table: Dataset, retrieval: Retrieval, likelihoods: np.ndarray | None) -> None:
        tokens, passages = self.contexts.context_tokens, retrieval.passages
        train = partial(train_generator, self.accelerator, self.generator, table, context_tokens=tokens)
        cut = generator_cut(self.accelerator, self.generator, self.training, tokens)
        limit = cut.tokens, generator_token_bytes(self.accelerator, self.generator, self.training, tokens)
        whole = self.training.generator_batch_size * tokens
        self._phase("generator", train, self.generator.model, limit, whole)
        train = partial(train_retriever, self.accelerator, self.retriever, table, passages, likelihoods=likelihoods)
        cut = encoder_cut(self.accelerator, self.retriever)
        limit = cut.tokens, encoder_token_bytes(self.accelerator, self.retriever)
        self._phase("retriever", train, self.retriever.model, limit)
        if self.reranker is not None:
            depth = self.contexts.rerank_passages
            train = partial(train_reranker, self.accelerator, self.reranker, table, passages, depth=depth)
            limit = (
                encoder_cut(self.accelerator, self.reranker).tokens,
                encoder_token_bytes(self.accelerator, self.reranker),
            )
            self._phase("reranker", train, self.reranker.model, limit)

    def _phase(
        self, name: str, train: Callable[..., int], model: torch.nn.Module, limit: tuple, whole: int = 0
    ) -> None:
        """limit: tokens of a micro-batch, and bytes of the activations of a token; None: unknown. whole: tokens of a
        step. On a CPU these are counted too: what loading has freed serves the first steps, so the process grows less.
        """
        batch = vars(self.training)[f"{name}_batch_size"]
        self._grown()
        self.lines[name], largest = phase_line(self.accelerator, name, train, self.training)
        activations = max(0, self._grown() - 3 * held_bytes(trainable(model)))
        most = min(activations * batch / largest, math.prod(each or math.inf for each in limit))
        counted = min(whole, limit[0] or 0) * (limit[1] or 0) if self.accelerator.device.type == "cpu" else 0
        self.activations[name] = round(max(activations, most, counted))


def line_of(accelerator: Accelerator, part: str, whole: int, measure: Callable[[int], tuple[float, float]]) -> Line:
    """A line through the (rows, seconds) that `measure` gives: one row a process first, then more while they fit."""
    count, ends, over = min(accelerator.num_processes, whole), time.perf_counter() + SECONDS[part], False
    measure(count)  # sets caches up
    measured: list[tuple[float, float]] = []
    while not over:
        measured.append(measure(count))
        over, seconds = of_first_process((time.perf_counter() > ends, measured[-1][1]))
        count = next_count(whole, count, seconds, SECONDS[part] / 2)
    return fit(measured)


def phase_line(
    accelerator: Accelerator, name: str, train: Callable[..., int], training: TrainingSettings
) -> tuple[Line, int]:
    """Seconds of the steps of a phase by their rows, and the most rows that were tried; the weights move.

    Args:
        train: `train_generator` or its like, without settings, round_number and callback.
    """
    largest, once = 0, 0.0

    def measure(rows: int) -> tuple[float, float]:
        """The mean step, without the first one, which sets memory up."""
        nonlocal largest, once
        settings, watch = copy.copy(training), Watch(rows, SECONDS[name] / 8)
        vars(settings).update({f"{name}_batch_size": rows, f"{name}_steps": STEPS, f"{name}_epochs": STEPS})
        whole = timed(lambda: train(settings=settings, round_number=1, callback=watch))
        largest, once = max(largest, rows), max(0.0, whole - sum(watch.steps))
        return rows, float(np.mean(watch.steps[1:]))

    line = line_of(accelerator, name, vars(training)[f"{name}_batch_size"], measure)
    return replace(line, once=once), largest


def next_count(whole: int, rows: int, seconds: float, time: float) -> int:
    """How many of `whole` rows to measure next: as many as fit into the time, at most four times the last `rows`."""
    return min(whole, rows * min(4, max(1, int(time / max(seconds, 1e-9)))))


def fit(measured: Sequence[tuple[float, float]]) -> Line:
    """The line through (rows, seconds) by least squares; through zero if sizes differ too little or it falls."""
    rows, seconds = (np.array(column, dtype=float) for column in zip(*measured, strict=True))
    if rows.max() >= 1.5 * rows.min():
        each, fixed = np.polyfit(rows, seconds, 1)
        if each > 0 and fixed > 0:
            return Line(float(each), float(fixed))
    return Line(float(seconds.sum() / rows.sum()))


def timed(work: Callable[[], object]) -> float:
    """Seconds of a piece of work, including what it leaves to a GPU."""
    clock = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - clock


def of_first_process(value: T) -> T:
    """The value of the first process, on all of them."""
    return broadcast_object_list([value])[0]
