"""Sides of the speed benchmark for index and retrieval: the package, `encode` of the library, the reference loop.

Left out: the training parts (training_sides.py), measuring (measuring.py), the loop itself (reference_loop.py).
"""

import itertools
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

import numpy as np
from tqdm.auto import tqdm

from benchmarks.shared import reference_loop
from benchmarks.shared.measuring import Build, Run, Side
from benchmarks.shared.speed_data import Asked, Models
from benchmarks.shared.training_sides import OURS, REFERENCE, Place
from cozyrag.models.generator import Generator
from cozyrag.models.int8_encoding import FLOAT32, INT8
from cozyrag.retrieval.passage_index import Passages

OURS_INT8 = "CoZyRAG, int8"
ST_ENCODE, ST_ENCODE_EQUAL = "SentenceTransformer.encode", "SentenceTransformer.encode, our length limit"


def index_sides(models: Models, passages: Passages, place: Place, options: Namespace) -> list[Side]:
    """Ours in float32 and 8 bits, with vectors of all sentences; `encode` with its own length limit and with ours."""

    def ours(rows: int, precision: str = FLOAT32) -> Run:
        retriever = models.load_retriever(str(place.device), options.passage_tokens)
        chosen, reading = range(rows), ExitStack()
        reading.enter_context(retriever.reading_in(precision))  # converts the model, which is not timed

        def run() -> object:
            with reading:
                return retriever.encode_passages(
                    passages.select(chosen), passages.spans(chosen), batch_size=options.encode_batch
                )

        return run

    def library(limit: int | None) -> Build:
        def build(rows: int) -> Run:
            model = models.load_retriever(str(place.device), limit).model
            return lambda: model.encode(passages.select(range(rows)), show_progress_bar=False)

        return build

    size, warm_up = min(options.index_passages, len(passages.ids)), options.encode_batch
    int8 = place.device.type == "cpu" and find_spec("onnx") and find_spec("onnxruntime")
    return [
        Side(OURS, size, warm_up, ours),
        *([Side(OURS_INT8, size, warm_up, partial(ours, precision=INT8))] if int8 else []),
        Side(ST_ENCODE, size, warm_up, library(None)),
        Side(ST_ENCODE_EQUAL, size, warm_up, library(options.passage_tokens)),
    ]


def searched(asked: Asked, passages: Passages, limit: int) -> tuple[Passages, list[str]]:
    """The passages that are searched, gold ones first and `limit` at most, and the gold id of each question."""
    rows = list(dict.fromkeys([*asked.gold, *range(len(passages.ids))]))[: max(limit, len(set(asked.gold)))]
    columns = ([column[row] for row in rows] for column in (passages.ids, passages.titles, passages.texts))
    return Passages(*columns), [passages.ids[row] for row in asked.gold]


class Retrieval:
    """An index of passages, and two implementations of the way from questions to contexts; needs datasets and faiss."""

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

    def ours(self, rows: int) -> Run:
        """`attach_contexts` with hybrid search, as in a training run, with empty caches."""
        from datasets import Dataset

        from cozyrag.retrieval.contexts import SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
        from cozyrag.retrieval.hybrid import Searcher

        def encode(texts: Sequence[str]) -> np.ndarray:
            return self.retriever.encode(texts, kind="query", batch_size=self.options.encode_batch)

        searcher = Searcher(self.index, self.lexical, encode=encode, mode="hybrid", words=self.words)
        builder = ContextBuilder(
            self.passages,
            self.generator.count_tokens,
            top_k=self.options.top_k,
            budget=self.options.context_tokens,
            hard_negatives=1,
            score_by="hybrid",
            sentence_vectors=sentence_source(self.index, self.retriever),
            words=self.words,
        )
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

    def reference(self, rows: int) -> Run:
        """The reference loop: one question and one sentence at a time."""
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
