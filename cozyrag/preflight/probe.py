"""What each part of a run costs on this machine, measured in seconds of work on a sample of the real tables.

It calls the code of the run itself: the encoding of passages, the search, the context maker, the answering. Every part has
a share of the budget, begins small, takes larger bites as far as they fit, and stops when its share is spent or it is sure
enough. Weights, modes and random states are put back. Left out: the steps of training (phase_probe.py), how often a part
comes up in a run and what that adds up to (plan.py).
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.numpy import save_file

from cozyrag.data.questions import take
from cozyrag.data.sentences import SentenceVectors
from cozyrag.models.generator import Decoding
from cozyrag.preflight.cost_model import Costs, Line, bite, fit, is_sure, spread
from cozyrag.preflight.gauges import timed
from cozyrag.preflight.loss_check import left_as_found
from cozyrag.preflight.phase_probe import Subject, generator_cost, retriever_cost, stand_ins
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.run_log import peak_memory
from cozyrag.training.run_retrieval import RETRIEVE_TOGETHER, context_builder, context_filter

SAMPLE = 512  # questions, at most
CHARACTERS = 4_000_000  # of passages that are searched, at most
WRITTEN = 32_000_000  # bytes written to see how fast files are


@contextmanager
def _as_found(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Weights, modes and random states as before, whatever happens between; gradients are gone."""
    kept = [{name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()} for model in models]
    with left_as_found(models):
        try:
            yield
        finally:
            for model, state in zip(models, kept, strict=True):
                model.load_state_dict(state)
                model.zero_grad()


class Probe(Subject):
    """Measures one run's parts; `measure` is all that is called."""

    def measure(self) -> Costs:
        """All costs, the same on every process."""
        started = time.perf_counter()
        with _as_found([self.generator.model, self.retriever.model]):
            self.growth.begin()
            encode, vectors, sentences, order = self._encoding()
            found = self._searching(vectors, sentences)
            columns = broadcast_object_list([found.columns])[0]
            asked, places = stand_ins(self, columns)
            generator = generator_cost(self, asked, places)
            retriever = retriever_cost(self, asked, places)
            answer, writing = self._answering(columns)
            feedback = self._feeding(columns, found.builder) if self.feeds else 0.0
        size = self.settings.contexts.encode_batch_size
        costs = Costs(
            encode=encode, batches=-(-len(order) // size), tokens=self._batch_tokens(order, size), lexical=found.lexical,
            search=found.search, first=found.first, reach=found.reach, weigh=found.weigh, generator=generator, retriever=retriever,
            feedback=feedback, answer=answer, write=self._writing(), row_bytes=found.row_bytes,
            sentences=sum(map(len, sentences)) / len(sentences) * len(self.passages.ids), lexical_bytes=found.lexical_bytes,
            writing=writing, exact=min(self.gold, default=0) >= 0 or len(columns["id"]) == len(self.gold),
        )  # fmt: skip
        costs = replace(costs, peak=max(self.growth.peak, peak_memory()), spent=time.perf_counter() - started)
        return broadcast_object_list([costs])[0]

    def _batch_tokens(self, rows: Sequence[int], size: int) -> float:
        """Tokens, with padding, of passages encoded in this order."""
        longest = [self.tokens(self.passages.texts[rows[at]]) for at in range(0, len(rows), size)]
        return sum(each * min(size, len(rows) - at * size) for at, each in enumerate(longest))

    # ---- index

    def _encoding(self) -> tuple[Line, np.ndarray, list[np.ndarray], list[int]]:
        """The cost of a batch, the vectors made on the way, the vectors of their sentences, and this process's rows in order."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, share = self.settings.contexts.encode_batch_size, self.share["index"]
        order = sorted(range(len(self.passages.ids))[rank::world], key=lambda row: -len(self.passages.texts[row]))
        order = order or [0]
        vectors, sentences, measured = [], [], []
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        warm = batches[len(batches) // 2][:4]
        with self.retriever.reading_in(self.settings.contexts.index_precision):
            self._encode(warm)
            begun = time.perf_counter()
            self._encode(warm)
            most = bite(size, len(warm), time.perf_counter() - begun, share)
            begun = time.perf_counter()
            for place in spread(len(batches)):
                rows = batches[place][:most]
                clock = time.perf_counter()
                made, own = self._encode(rows)
                now = time.perf_counter()
                measured.append((self._batch_tokens(rows, len(rows)), now - clock))
                vectors.append(made)
                sentences += own.of(range(len(rows)))
                if now - begun > share or is_sure(measured):
                    break
        return fit(measured), np.concatenate(vectors), sentences, order

    def _encode(self, rows: Sequence[int]) -> tuple[np.ndarray, SentenceVectors]:
        return self.retriever.encode_passages(
            self.passages.select(rows), self.passages.spans(rows), batch_size=len(rows)
        )

    # ---- search and contexts

    def _searching(self, vectors: np.ndarray, sentences: list[np.ndarray]) -> "_Found":
        """Search the passages, or as many as the probe can hold, for a sample of the questions."""
        sample = take(self.corpus.questions, SAMPLE, self.settings.training.seed)
        chosen = self._searched(sample)
        table, scale = self.corpus.passages.select(chosen), len(self.passages.ids) / len(chosen)
        passages = Passages.of(table)
        part = sum(map(len, passages.texts)) / max(1, sum(map(len, self.passages.texts)))
        mode, lexical, clock = self.settings.contexts.retrieval, None, time.perf_counter()
        if mode != "dense":
            lexical = LexicalIndex(passages.to_read(), stemmer=self.settings.contexts.stemmer)
        words = SentenceWords(passages.titles, passages.sentences(), stemmer=self.settings.contexts.stemmer)
        built = time.perf_counter() - clock
        dense = context_filter(self.settings, self.retriever) != "sparse"
        keep = self.settings.contexts.keep_sentence_vectors and dense
        index = PassageIndex(
            table, vectors[np.arange(len(table)) % len(vectors)], fingerprint="probe",
            sentences=_borrowed(passages, sentences) if keep else None,
        )  # fmt: skip
        builder = context_builder(
            passages,
            self.settings,
            self.generator,
            self.retriever,
            sentence_vectors=sentence_source(index, self.retriever),
            words=words,
        )
        searcher = Searcher(index, lexical, encode=self._encode_questions, mode=mode, words=words)
        share = self.share["retrieve"]
        first = sample.select(range(min(32, len(sample))))
        searcher.search(first["question"][:4], SEARCH_DEPTH)  # warm up
        seconds = timed(lambda: self._attach(first, searcher, builder))[0]
        sample = sample.select(range(bite(len(sample), len(first), seconds, share)))
        cold, _ = timed(lambda: self._attach(sample, searcher, builder))
        warm, contexts = timed(lambda: self._attach(sample, searcher, builder))
        grown = (scale - 1) * self._search_seconds(searcher, sample["question"])
        touched = len({row for rows in contexts["rows"] for row in rows})
        columns = contexts[:]
        for name in ("rows", "negatives"):
            columns[name] = [[chosen[row] for row in rows] for rows in columns[name]]
        columns["positive"] = [chosen[row] if row >= 0 else -1 for row in columns["positive"]]
        known = [(text, row) for text, row in zip(columns["question"], contexts["gold_row"], strict=True) if row >= 0]
        weigh = 0.0
        if mode == "hybrid" and known:
            weigh = timed(lambda: searcher.fitted(*map(list, zip(*known, strict=True))))[0] / len(known)
            weigh += grown / len(sample)
        return _Found(
            builder=builder, columns=columns, lexical=built / part, search=(warm + grown) / len(sample),
            first=max(0.0, cold - warm) / max(1, touched - len(first)), reach=-math.log(1 - min(touched / len(table), 0.999)) * len(table) / len(sample),
            weigh=weigh, row_bytes=contexts.data.nbytes / len(contexts), lexical_bytes=((lexical.nbytes if lexical else 0) + words.nbytes) / part,
        )  # fmt: skip

    def _searched(self, sample: Dataset) -> list[int]:
        """Rows of the passages that are searched: the gold ones of the sample, then evenly spread ones up to the limit."""
        total = len(self.passages.ids)
        count = max(100, int(total * CHARACTERS / max(1, sum(map(len, self.passages.texts)))))
        if count >= total:
            return list(range(total))
        gold = [self.row_of[name] for name in sample["passage_id"] if name in self.row_of]
        return sorted({*gold, *self.some(count)})

    def _attach(self, questions: Dataset, searcher: Searcher, builder: ContextBuilder) -> Dataset:
        return attach_contexts(
            questions,
            search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
            builder=builder,
            fingerprint=f"probe{time.perf_counter_ns()}",
            noise=self.settings.training.context_noise,
            batch_size=RETRIEVE_TOGETHER,
        )

    def _search_seconds(self, searcher: Searcher, texts: list[str]) -> float:
        """The part of the search that grows with the number of passages."""
        vectors = self._encode_questions(texts)
        seconds = timed(lambda: searcher.index.search(vectors, SEARCH_DEPTH))[0] if searcher.mode != "bm25" else 0.0
        return seconds + (timed(lambda: searcher.lexical.search(texts, SEARCH_DEPTH))[0] if searcher.lexical else 0.0)

    def _encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.retriever.encode(texts, kind="query", batch_size=self.settings.contexts.encode_batch_size)

    # ---- the generator at work

    def _answering(self, columns: dict[str, list]) -> tuple[Line, int]:
        """A batch of answers by its questions, and the bytes that writing takes."""
        chosen, share = self.settings.contexts, self.share["answer"]
        limits = Decoding.of(chosen).limits(not self.settings.training.no_answer)
        self.growth.bytes(reset=True)
        rows = sorted(range(len(columns["id"])), key=lambda row: len(columns["context"][row]))
        rows = [rows[place] for place in spread(len(rows))]

        def write(count: int, at: int = 0) -> float:
            mine = [rows[(at + each) % len(rows)] for each in range(count)]
            return timed(
                lambda: self.generator.write(
                    [columns["question"][row] for row in mine],
                    [columns["context"][row] for row in mine],
                    **limits,
                    batch_size=count,
                )
            )[0]

        first = min(4, chosen.answer_batch_size)
        write(first)
        most = bite(chosen.answer_batch_size, first, write(first), share)
        measured, begun = [], time.perf_counter()
        while not measured or (time.perf_counter() - begun < share and not is_sure(measured)):
            count = max(1, most // 2) if len(measured) % 3 == 2 else most
            measured.append((count, write(count, at=len(measured) * most)))
        return fit(measured), self.growth.bytes(reset=False)

    def _feeding(self, columns: dict[str, list], builder: ContextBuilder) -> float:
        """Seconds of the generator's feedback for a question."""
        chosen, judged = self.settings.contexts, self.settings.training.feedback_passages
        sub = builder.row_of
        rows = [row for row, answers in enumerate(columns["answers"]) if answers]
        if not rows:
            return 0.0

        def feed(count: int) -> float:
            pairs = [
                (row, sub[self.passages.ids[each]]) for row in rows[:count] for each in columns["rows"][row][:judged]
            ]
            asked = [columns["question"][row] for row, _ in pairs]
            vectors = self._encode_questions([columns["question"][row] for row in rows[:count]])
            repeated = np.repeat(vectors, [len(columns["rows"][row][:judged]) for row in rows[:count]], axis=0)
            self.generator.log_likelihoods(
                asked,
                builder.contexts(asked, [[passage] for _, passage in pairs], repeated),
                [columns["answers"][row][0] for row, _ in pairs],
                context_tokens=chosen.context_tokens,
                batch_size=chosen.answer_batch_size,
            )
            return min(count, len(rows))

        feed(2)
        seconds, count = timed(lambda: feed(4))
        seconds, count = timed(lambda: feed(bite(len(rows), count, seconds, 2 * self.share["feedback"])))
        return seconds / count

    def _writing(self) -> float:
        """Seconds of writing one byte of weights, to the folder for temporary files."""
        with tempfile.TemporaryDirectory() as folder:
            block = np.zeros(WRITTEN // 4, dtype=np.float32)
            return timed(lambda: save_file({"block": block}, Path(folder) / "block.safetensors"))[0] / WRITTEN


@dataclass(frozen=True)
class _Found:
    """What searching told; see Costs. `columns`: the contexts table of the sample, rows of passages as in the whole table."""

    builder: ContextBuilder
    columns: dict[str, list]
    lexical: float
    search: float
    first: float
    reach: float
    weigh: float
    row_bytes: float
    lexical_bytes: float


def _borrowed(passages: Passages, sentences: list[np.ndarray]) -> SentenceVectors:
    """Sentence vectors for all passages, as many as each has sentences, lent by the passages that were encoded."""
    pool = np.concatenate([np.zeros((1, sentences[0].shape[1])), *sentences]).astype(np.float16)
    ends = np.cumsum([len(own) for own in passages.sentences()], dtype=np.int64)
    return SentenceVectors(pool[np.arange(ends[-1]) % len(pool)], ends)
