"""Retrieval in a run: the index of the current retriever, the searches over it, and contexts tables made with them.

Left out: which tables are made when and kept on disk (round_cache.py), and the searches themselves (passage_index.py,
hybrid.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import SentenceWords
from cozyrag.retrieval.contexts import SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.index_file import made_by
from cozyrag.retrieval.lance_database import database_of
from cozyrag.retrieval.opening import Index, open_index
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.retrieval.reranking import Reranking
from cozyrag.retrieval.words_of_texts import WordsOfTexts
from cozyrag.retrieval.words_on_disk import WordSearch, word_search
from cozyrag.runtime.fingerprints import weights_fingerprint
from cozyrag.training.run_log import RunLog

WEIGHT_QUESTIONS = 1000  # training questions on which the fusion weights are fitted
RETRIEVE_TOGETHER = 256  # questions of one search


def fusion_questions(questions: Dataset, settings: Settings) -> Dataset:
    """The training questions for fitting the weights of the search: a tenth of them, from which neither retriever nor
    reranker learns, or up to all if neither trains.

    On questions that a model has learned from, its scores look better than on new ones and would weigh too much.
    """
    if settings.contexts.retrieval != "hybrid" and settings.models.reranker is None:
        return questions.select([])
    training = settings.training
    learns = training.rounds and (
        (training.retriever_steps != 0 and training.retriever_epochs > 0)
        or (settings.models.reranker is not None and training.reranker_steps != 0 and training.reranker_epochs > 0)
    )
    limit = min(WEIGHT_QUESTIONS, len(questions) // 10 if learns else len(questions))
    return take(questions, limit, training.seed) if limit else questions.select([])


def context_filter(settings: Settings, retriever: Retriever) -> str:
    """The context filter of a run: a retriever without mean pooling has no vectors of sentences."""
    return settings.contexts.context_filter if retriever.reads_sentences else "sparse"


@dataclass(frozen=True)
class Snapshot:
    """Retrieval with one state of the retriever: nothing in it changes after it is made.

    fingerprint: of all weights of the retriever; `index.fingerprint` is of those that encode passages. reranker: of the
    reranker; "" if there is none.
    """

    fingerprint: str
    reranker: str
    index: Index
    searcher: Searcher
    builder: ContextBuilder


class Retrieval:
    """Retrieval with one retriever over the passages of a run, in the round that the log is in."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: Settings,
        *,
        corpus: Corpus,
        generator: Generator,
        retriever: Retriever,
        reranker: Reranker | None = None,
        log: RunLog,
    ):
        self.accelerator = accelerator
        self.settings = settings
        self.corpus = corpus
        self.generator = generator
        self.retriever = retriever
        self.reranker = reranker
        self.log = log
        self.folder = Path(settings.output.output_dir)
        self.passages = Passages.of(corpus.passages, mapped=bool(corpus.passages.cache_files))
        self.context_filter = context_filter(settings, retriever)
        self._index: Index | None = None
        self._snapshot: Snapshot | None = None
        self._measured: tuple[str, Dataset] | None = None  # the last measured table, by its fingerprint

    def contexts(self, questions: Dataset, desc: str, *, noise: float = 0.0, measured: bool = False) -> Dataset:
        """Retrieve for a table of questions. Each process takes a share, and all get the whole table.

        `measured`: with the rank of the positive in each search, for an evaluation. The last such table is kept: a
        rollback check and the evaluation after it may ask for the same.
        """
        snapshot = self.snapshot()
        search = snapshot.searcher.each_search if measured else snapshot.searcher.search
        reranking = snapshot.searcher.reranking
        digest = _digest(
            snapshot.fingerprint,
            snapshot.index.fingerprint,
            snapshot.searcher.mode,
            str(snapshot.searcher.fusion_weights),
            snapshot.reranker,
            str(reranking and reranking.weight),
            questions._fingerprint,
            str(self.log.round),
            str(self.accelerator.process_index),
            str(noise),
            str(measured),
        )
        if self._measured is not None and self._measured[0] == digest:
            return self._measured[1]
        with self.log.timed("retrieve", self.log.round):
            share = questions.shard(self.accelerator.num_processes, self.accelerator.process_index, contiguous=True)
            bar = tqdm(total=len(share), desc=desc, unit="question")
            contexts = attach_contexts(
                share,
                search=lambda texts: search(texts, SEARCH_DEPTH),
                builder=snapshot.builder,
                fingerprint=digest,
                noise=noise,
                noise_seed=f"{self.settings.training.seed}|{self.log.round}",
                batch_size=RETRIEVE_TOGETHER,
                progress=bar.update,
                measured=measured,
            )
            bar.close()
            if self.accelerator.num_processes > 1:
                parts, features = gather_object([contexts[:]]), contexts.features
                contexts = Dataset.from_dict(
                    {name: [value for part in parts for value in part[name]] for name in features}, features=features
                )
        if measured:
            self._measured = digest, contexts
        return contexts

    def snapshot(self) -> Snapshot:
        """Retrieval with the models as they are now. In hybrid mode, new vectors get new fusion weights; scores of
        another reranker get another weight."""
        fingerprint = weights_fingerprint(self.retriever.model)
        reranker = self.reranker.fingerprint() if self.reranker is not None else ""
        kept = self._snapshot
        if kept is None or kept.fingerprint != fingerprint:
            index, mode = self.index(), self.settings.contexts.retrieval
            lexical, words = self._word_search(index)
            builder = self._builder(index, words)
            searcher = Searcher(index, lexical, encode=self.encode_questions, mode=mode, words=words)
            if mode == "hybrid":
                searcher = self._with_fitted_weights(searcher, builder, fingerprint)
            kept = Snapshot(fingerprint, "", index, searcher, builder)
        if kept.reranker != reranker:
            kept = replace(kept, reranker=reranker, searcher=self._with_reranking(kept, fingerprint + reranker))
        self._snapshot = kept
        return kept

    def _word_search(self, index: Index) -> WordSearch:
        """Search by words, made once: training changes no words."""
        if self._snapshot is not None:
            return self._snapshot.searcher.lexical, self._snapshot.searcher.words
        with self.log.timed("index", self.log.round):
            contexts = self.settings.contexts
            return word_search(index, mode=contexts.retrieval, stemmer=contexts.stemmer)

    def _builder(self, index: Index, words: SentenceWords | WordsOfTexts | None) -> ContextBuilder:
        """A context builder over this index."""
        source = sentence_source(index, self.retriever)
        if self._snapshot is not None:
            return replace(self._snapshot.builder, sentence_vectors=source)
        return ContextBuilder(
            self.passages,
            self.generator.count_tokens,
            top_k=self.settings.contexts.top_k,
            budget=self.settings.contexts.context_tokens,
            hard_negatives=self.settings.training.hard_negatives,
            score_by=self.context_filter,
            sentence_vectors=source,
            words=words,
        )

    def description(self) -> dict:
        """How the pair searches, for cozyrag.json."""
        chosen, searcher = self.settings.contexts, self.snapshot().searcher
        facts = {"mode": chosen.retrieval, "stemmer": chosen.stemmer, "weights": asdict(searcher.fusion_weights)}
        if searcher.reranking is None:
            return facts
        return facts | {"reranking": {"depth": searcher.reranking.depth, "weight": searcher.reranking.weight}}

    def _with_fitted_weights(self, searcher: Searcher, builder: ContextBuilder, fingerprint: str) -> Searcher:
        """The search with fusion weights fitted on training questions whose gold passage is known."""
        questions, rows = self._known(builder)
        if not questions:
            self.log.info(
                "No gold passage is known for the questions kept for fitting, so dense and sparse scores are fused "
                "with the default weights."
            )
            return searcher
        with self.log.timed("fit fusion weights", self.log.round):
            fitted, facts = searcher.fitted(questions, rows)
        # rounding differs between machines, but all processes need the same weights
        weights = Weights(**broadcast_object_list([asdict(fitted.fusion_weights)])[0])
        self._record_weights(fingerprint, facts)
        return replace(fitted, weights=weights)

    def _with_reranking(self, kept: Snapshot, fingerprint: str) -> Searcher:
        """The search with the reranker and its fitted weight; an untrained one changes nothing."""
        if self.reranker is None:
            return replace(kept.searcher, reranking=None)
        reranking = Reranking(self.reranker.score, self.passages, self.settings.contexts.rerank_passages)
        if not self.reranker.is_trained:
            return replace(kept.searcher, reranking=reranking)
        with self.log.timed("fit reranker weight", self.log.round):
            fitted, facts = kept.searcher.reranked_with(reranking, *self._known(kept.builder))
        weight = broadcast_object_list([fitted.reranking.weight if fitted.reranking else 0.0])[0]
        self._record_weights(fingerprint, facts)
        return replace(fitted, reranking=replace(reranking, weight=weight))

    def _known(self, builder: ContextBuilder) -> tuple[list[str], list[int]]:
        """The questions for fitting whose gold passage is known, and its row."""
        columns = fusion_questions(self.corpus.questions, self.settings)[:]
        row_of = builder.passages.rows_of(columns["passage_id"])
        known = [
            (question, row_of[gold])
            for question, gold in zip(columns["question"], columns["passage_id"], strict=True)
            if gold is not None
        ]
        return [question for question, _ in known], [row for _, row in known]

    def _record_weights(self, fingerprint: str, facts: dict) -> None:
        """Record fitted weights once: a resumed run fits the same ones again."""
        if not self.log.holds(kind="weights", retriever=fingerprint):
            self.log.record({"kind": "weights", "round": self.log.round, "retriever": fingerprint} | facts)

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32, the vectors of questions."""
        return self.retriever.encode(texts, kind="query", batch_size=self.settings.contexts.encode_batch_size)

    def forget(self) -> None:
        """Drop the index after the retriever was rolled back: the one saved with the older retriever is read again."""
        self._index = None

    def index(self) -> Index:
        """The index of the retriever as it is now: in memory, read from the output folder or from --index, or made."""
        fingerprint = self.retriever.fingerprint()
        if self._index is not None and self._index.fingerprint == fingerprint:
            return self._index
        self._index = self._kept_index(fingerprint) if self._index is None else None
        if self._index is None:
            with self.log.timed("index", self.log.round):
                vectors, sentences = self._encode_passages()
                self._index = PassageIndex(
                    self.corpus.passages,
                    vectors,
                    fingerprint=fingerprint,
                    sentences=sentences,
                    precision=self.retriever.reads_in(self.settings.contexts.index_precision),
                )
        return self._index

    def _kept_index(self, fingerprint: str) -> Index | None:
        """The index of the output folder, or that of --index, if it was made with this retriever.

        A database of another retriever is refused: who has one does not expect its passages to be encoded into memory.
        """
        if made_by(self.folder / "index") == fingerprint:
            try:
                return open_index(self.folder / "index", fingerprint=fingerprint)
            except InputError as error:
                self.log.info(f"{error.args[0].split(' Copy ')[0]} The passages are indexed again.")
        given = self.settings.data.index
        if given is not None and (database_of(given) or made_by(given) == fingerprint):
            return open_index(given, fingerprint=fingerprint, expected=self.passages)
        return None

    def _encode_passages(self) -> tuple[np.ndarray, SentenceVectors | None]:
        """Vectors of all passages and of their sentences; each process encodes a share.

        Longest passages first, so that the progress bar never promises too much.
        """
        keep = self.settings.contexts.keep_sentence_vectors and self.context_filter != "sparse"
        mine = range(len(self.passages.ids))[self.accelerator.process_index :: self.accelerator.num_processes]
        order = sorted(mine, key=lambda row: -len(self.passages.texts[row]))
        size = self.settings.contexts.encode_batch_size
        vectors: dict[int, np.ndarray] = {}
        sentences: dict[int, np.ndarray] = {}
        reading = self.retriever.reading_in(self.settings.contexts.index_precision)
        with reading, tqdm(total=len(order), desc=f"round {self.log.round}: indexing", unit="passage") as bar:
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
        everything = np.stack([vectors[row] for row in range(len(self.passages.ids))])
        if not keep:
            return everything, None
        found = [sentences[row] for row in range(len(self.passages.ids))]
        return everything, SentenceVectors.join(found, everything.shape[1])


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
