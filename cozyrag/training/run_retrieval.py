"""Search as a run needs it: the index of the retriever as it is now, both searches, and contexts tables made with them.

Left out: which tables are made when and kept on disk (round_cache.py), and the searches themselves (passage_index.py, hybrid.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset

from cozyrag.config import Settings
from cozyrag.data.corpus import Corpus
from cozyrag.data.questions import take
from cozyrag.data.sentences import SentenceVectors
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import CONTEXT_FEATURES, SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.passage_index import PassageIndex, Passages, made_by
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.training.run_log import RunLog

WEIGHT_QUESTIONS = 1000  # training questions on which the two searches are weighed against each other
RETRIEVE_TOGETHER = 256  # questions that are searched for at once


def fusion_questions(questions: Dataset, settings: Settings) -> Dataset:
    """The training questions on which a hybrid search is weighed: a tenth of them, of which the retriever learns nothing.

    On questions that it has learned, its vectors look better than they are for any other question, and would count too much.
    """
    limit = fusion_limit(len(questions), settings)
    return take(questions, limit, settings.training.seed) if limit else questions.select([])


def fusion_limit(questions: int, settings: Settings) -> int:
    """How many of so many training questions those are; as many as are of use, where the retriever learns nothing anyway."""
    if settings.contexts.retrieval != "hybrid":
        return 0
    training = settings.training
    learns = training.rounds and training.retriever_steps != 0 and training.retriever_epochs > 0
    return min(WEIGHT_QUESTIONS, questions // 10 if learns else questions)


def context_builder(
    passages: Passages, settings: Settings, generator: Generator, retriever: Retriever
) -> ContextBuilder:
    """What makes the contexts of a run; its sentence vectors come with the index."""
    return ContextBuilder(
        passages,
        generator.count_tokens,
        top_k=settings.contexts.top_k,
        budget=settings.contexts.context_tokens,
        hard_negatives=settings.training.hard_negatives,
        score_by=settings.contexts.context_filter if retriever.reads_sentences else "sparse",
    )


class Retrieval:
    """Searching with one retriever over the passages of a run; `round` is the one that is being run."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        *,
        corpus: Corpus,
        generator: Generator,
        retriever: Retriever,
        log: RunLog,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.corpus = corpus
        self.retriever = retriever
        self.log = log
        self.folder = Path(settings.output.output_dir)
        self.round = 0
        self.index: PassageIndex | None = None
        self.lexical: LexicalIndex | None = None
        self.searcher: Searcher | None = None
        self.searched_by = ""  # fingerprint of all weights it was made for: those that read questions count too
        self.passages = Passages.of(corpus.passages)
        self.builder = context_builder(self.passages, settings, generator, retriever)

    def contexts(self, questions: Dataset, desc: str, *, noise: float = 0.0) -> Dataset:
        """Retrieve for a table of questions; every process does a share and all get the whole."""
        searcher = self.current_searcher()
        with self.log.timed("retrieve", self.round):
            share = questions.shard(self.accelerator.num_processes, self.accelerator.process_index, contiguous=True)
            bar = tqdm(total=len(share), desc=desc, unit="question")
            contexts = attach_contexts(
                share,
                search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
                builder=self.builder,
                fingerprint=_digest(
                    self.searched_by,
                    searcher.index.fingerprint,
                    searcher.mode,
                    str(searcher.weights),
                    questions._fingerprint,
                    str(self.round),
                    str(self.accelerator.process_index),
                    str(noise),
                ),
                noise=noise,
                noise_seed=f"{self.settings.training.seed}|{self.round}",
                batch_size=RETRIEVE_TOGETHER,
                progress=bar.update,
            )
            bar.close()
            if self.accelerator.num_processes > 1:
                parts = gather_object([contexts[:]])
                contexts = Dataset.from_dict(
                    {name: [value for part in parts for value in part[name]] for name in CONTEXT_FEATURES},
                    features=CONTEXT_FEATURES,
                )
        return contexts

    def current_searcher(self) -> Searcher:
        """The search over the index as it is now; in hybrid mode its weights are fitted anew whenever the vectors are new."""
        index, weights = self.current_index(), weights_fingerprint(self.retriever.model)
        if self.searcher is not None and self.searched_by == weights:
            return self.searcher
        self.searched_by = weights
        mode = self.settings.contexts.retrieval
        self._index_words(mode)
        self.builder.sentence_vectors = sentence_source(index, self.retriever)
        self.searcher = Searcher(index, self.lexical, encode=self.encode_questions, mode=mode, words=self.builder.words)
        if mode == "hybrid":
            self._fit_fusion_weights(self.searcher)
        return self.searcher

    def _index_words(self, mode: str) -> None:
        """The words of passages and sentences, which no training changes."""
        stemmer = self.settings.contexts.stemmer
        with self.log.timed("index", self.round):
            if mode != "dense" and self.lexical is None:
                self.lexical = LexicalIndex(self.passages.to_read(), stemmer=stemmer)
            if self.builder.words is None:
                self.builder.words = SentenceWords(self.passages.titles, self.passages.sentences(), stemmer=stemmer)

    def description(self) -> dict:
        """How the pair searches, for cozyrag.json."""
        chosen, weights = self.settings.contexts, self.current_searcher().weights
        return {"mode": chosen.retrieval, "stemmer": chosen.stemmer, "weights": asdict(weights)}

    def _fit_fusion_weights(self, searcher: Searcher) -> None:
        """What vectors and words count, by training questions whose gold passage is known."""
        columns = fusion_questions(self.corpus.questions, self.settings)[:]
        known = [
            (question, self.builder.row_of[gold])
            for question, gold in zip(columns["question"], columns["passage_id"], strict=True)
            if gold is not None
        ]
        if not known:
            self.log.info(
                "No gold passage is known of the questions kept for it, so vectors and words are weighed against each other as usual."
            )
            return
        with self.log.timed("fit fusion weights", self.round):
            facts = searcher.fit_fusion_weights(*(list(column) for column in zip(*known, strict=True)))
        # rounding differs between machines: processes must not part
        searcher.weights = Weights(**broadcast_object_list([asdict(searcher.weights)])[0])
        if not self.log.holds(
            kind="weights", retriever=self.searched_by
        ):  # a resumed run fits what it has fitted before
            self.log.record({"kind": "weights", "round": self.round, "retriever": self.searched_by} | facts)

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.retriever.encode(texts, kind="query", batch_size=self.settings.contexts.encode_batch_size)

    def current_index(self) -> PassageIndex:
        """The index of the retriever as it is now: kept, read from the output folder, or made anew."""
        fingerprint = self.retriever.fingerprint()
        if self.index is None and made_by(self.folder / "index") == fingerprint:
            self.index = self._saved_index(fingerprint)
        given = self.settings.data.index
        if self.index is None and given is not None and made_by(given) == fingerprint:
            self.index = PassageIndex.load(given, fingerprint=fingerprint, expected=self.passages)
        if self.index is None or self.index.fingerprint != fingerprint:
            with self.log.timed("index", self.round):
                vectors, sentences = self._encode_passages()
                self.index = PassageIndex(
                    self.corpus.passages,
                    vectors,
                    fingerprint=fingerprint,
                    sentences=sentences,
                    precision=self.retriever.reads_in(self.settings.contexts.index_precision),
                )
        return self.index

    def _saved_index(self, fingerprint: str) -> PassageIndex | None:
        try:
            return PassageIndex.load(self.folder / "index", fingerprint=fingerprint)
        except InputError as error:
            self.log.info(f"{error.args[0].split(' Copy ')[0]} The passages are indexed again.")
            return None

    def _encode_passages(self) -> tuple[np.ndarray, SentenceVectors | None]:
        """Vectors of all passages and their sentences, every process encoding a share.

        Longest first, so the time left is never underrated.
        """
        keep = self.settings.contexts.keep_sentence_vectors and self.builder.score_by != "sparse"
        mine = range(len(self.passages.ids))[self.accelerator.process_index :: self.accelerator.num_processes]
        order = sorted(mine, key=lambda row: -len(self.passages.texts[row]))
        size = self.settings.contexts.encode_batch_size
        vectors: dict[int, np.ndarray] = {}
        sentences: dict[int, np.ndarray] = {}
        reading = self.retriever.reading_in(self.settings.contexts.index_precision)
        with reading, tqdm(total=len(order), desc=f"round {self.round}: indexing", unit="passage") as bar:
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                texts = self.passages.select(rows)
                if keep:
                    made, own = self.retriever.encode_passages(texts, self.passages.spans(rows), batch_size=size)
                    sentences.update(zip(rows, own.of(range(len(rows))), strict=True))
                else:
                    made = self.retriever.encode(texts, kind="document", batch_size=size)
                vectors.update(zip(rows, made, strict=True))
                bar.update(len(rows))
        if self.accelerator.num_processes > 1:
            for part in gather_object([(vectors, sentences)]):
                vectors |= part[0]
                sentences |= part[1]
        rows = range(len(self.passages.ids))
        everything = np.stack([vectors[row] for row in rows])
        return everything, SentenceVectors.join([sentences[row] for row in rows], everything.shape[1]) if keep else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
