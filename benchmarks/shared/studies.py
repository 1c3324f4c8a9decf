"""The studies of ablation.py: train one phase with some settings and a seed, and score every question.

Left out: which settings are compared, and tables (parts/ablation.py).
"""

import argparse
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from accelerate.utils import tqdm
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from benchmarks.shared.corpus import accelerator_of, fewer, open_index, retriever_of
from benchmarks.shared.pairs import load_generator
from cozyrag.config import Settings, parse_settings
from cozyrag.data.passages import merge_passages
from cozyrag.data.questions import read_questions, take
from cozyrag.evaluation.evaluation import evaluate_pair
from cozyrag.evaluation.metrics import normalize_answer, ranks_of, recall_at, reciprocal_rank
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex
from cozyrag.training.generator_phase import train_generator
from cozyrag.training.lm_feedback import answer_likelihoods
from cozyrag.training.retriever_phase import train_retriever
from cozyrag.training.trainer import PhaseCallback

NGRAM, MIN_TOKENS = 3, 3  # tokens of a repeated n-gram; fewest tokens of an answer that is long enough
DEPTHS = (1, 5, 20)
FOUND = (*(f"R@{depth}" for depth in DEPTHS), "MRR@10")
DECODING_ONLY = {"--min_answer_tokens": 1, "--no_repeat_ngram_size": 1, "--extractive": 0}  # and their number of values

Scores = dict[str, list[float]]  # by metric, 0 to 1 for each question


def without_decoding(flags: str) -> str:
    """The flags without those that training ignores."""
    kept, words = [], iter(shlex.split(flags))
    for word in words:
        if word in DECODING_ONLY:
            for _ in range(DECODING_ONLY[word]):
                next(words)
        else:
            kept.append(word)
    return shlex.join(kept)


def settings_of(flags: str, seed: int) -> Settings:
    """The defaults for the user's own questions (the quickstart set has others), with these flags."""
    return parse_settings(["--questions", "own", *shlex.split(flags), "--seed", str(seed)])


# ---- how answers are written


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """seq-rep-n: the share of n-grams that occurred before; 0 for fewer than n tokens (Welleck et al. 2020, eq. 11)."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parrots(prediction: str, question: str, references: Sequence[str]) -> float:
    """1 if an answer has words and all of them are in the question, unless that is true of a reference too."""
    asked = set(normalize_answer(question).split())

    def all_asked(text: str) -> bool:
        words = normalize_answer(text).split()
        return bool(words) and set(words) <= asked

    return float(all_asked(prediction) and not any(all_asked(text) for text in references))


def too_short(length: int, references: Sequence[int], fewest: int = MIN_TOKENS) -> float:
    """1 if an answer has fewer tokens than `fewest` and than every reference."""
    return float(length < min([fewest, *references]))


def answer_style(rows: Sequence[Mapping], tokenizer: PreTrainedTokenizerBase) -> Scores:
    """Repetition, parroting, and too short answers, 0 to 1 for each question."""

    def ids(text: str) -> list[int]:
        return tokenizer(f" {text}", add_special_tokens=False)["input_ids"] if text else []

    return {
        f"seq-rep-{NGRAM}": [repetition(ids(row["prediction"])) for row in rows],
        "parroting": [parrots(row["prediction"], row["question"], row["answers"]) for row in rows],
        "too short": [
            too_short(len(ids(row["prediction"])), [len(ids(text)) for text in row["answers"]]) for row in rows
        ],
    }


# ---- what all variants share


class Setup:
    """The questions, the passages, and the untrained models with their search, shared by all variants."""

    def __init__(
        self, options: argparse.Namespace, train: Dataset, validation: Dataset, table: Dataset, index: PassageIndex
    ):
        self.options, self.train, self.validation, self.table, self.index = options, train, validation, table, index
        self.passages = index.passages
        self.accelerator = accelerator_of(options.threads)
        self.lexical = LexicalIndex(self.passages.to_read(), stemmer=options.stemmer)
        self.words = SentenceWords(self.passages.titles, self.passages.sentences(), stemmer=options.stemmer)
        self.generator = load_generator(options.generator, self.accelerator.device)
        self.retriever = retriever_of(options)
        self._contexts: dict[tuple, Dataset] = {}

    @classmethod
    def load(cls, options: argparse.Namespace) -> "Setup":
        """Read questions, passages, and vectors. Raises InputError for unusable input."""
        asked, train = read_questions(options.questions), read_questions(options.train)
        others = [read_questions(path).passages for path in options.also_passages]
        validation = take(asked.table, options.max_questions, 0)
        training = take(train.table, options.train_questions, 0)
        gold = {*validation["passage_id"][:], *training["passage_id"][:]}
        table = fewer(merge_passages([asked.passages, train.passages, *others]), options.max_passages, gold)
        return cls(options, training, validation, table, open_index(options, table, retriever_of(options)))

    def builder(self, settings: Settings) -> ContextBuilder:
        """The context builder of the settings, with the sentence vectors of the untrained retriever."""
        chosen = settings.contexts
        return ContextBuilder(
            self.passages,
            self.generator.count_tokens,
            top_k=chosen.top_k,
            budget=chosen.context_tokens,
            hard_negatives=settings.training.hard_negatives,
            score_by=chosen.context_filter,
            sentence_vectors=sentence_source(self.index, self.retriever),
            words=self.words,
        )

    def searcher(self, index: PassageIndex, retriever: Retriever, mode: str) -> Searcher:
        """Search with the default fusion weights, so that they are equal for all variants."""
        encode = lambda texts: retriever.encode(texts, kind="query", batch_size=64)  # noqa: E731
        return Searcher(index, self.lexical if mode != "dense" else None, encode=encode, mode=mode, words=self.words)

    def contexts(self, split: str, settings: Settings) -> Dataset:
        """The contexts table of the "train" or "validation" questions, made once for equal settings."""
        chosen, noise = settings.contexts, settings.training.context_noise if split == "train" else 0.0
        negatives = settings.training.hard_negatives
        key = (split, chosen.retrieval, chosen.top_k, chosen.context_tokens, chosen.context_filter, noise, negatives)
        if key not in self._contexts:
            table = self.train if split == "train" else self.validation
            searcher = self.searcher(self.index, self.retriever, chosen.retrieval)
            with tqdm(total=len(table), desc=f"searching ({split})", unit="question") as bar:
                self._contexts[key] = attach_contexts(
                    table,
                    search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
                    builder=self.builder(settings),
                    fingerprint=f"ablation-{len(self._contexts)}",
                    noise=noise,
                    batch_size=256,
                    progress=bar.update,
                )
        return self._contexts[key]


# ---- the two kinds of study


class GeneratorStudy:
    """Trains one generator phase for each variant and seed, then answers the validation questions."""

    names = ("EM", "F1", f"seq-rep-{NGRAM}", "parroting", "too short")

    def __init__(self, setup: Setup):
        self.setup = setup
        self.trained = lru_cache(maxsize=1)(self._trained)

    def _trained(self, flags: str, seed: int) -> Generator:
        """The generator after a phase. It serves all variants with the same flags of training."""
        settings, setup = settings_of(flags, seed), self.setup
        generator = load_generator(setup.options.generator, setup.accelerator.device)
        train_generator(
            setup.accelerator,
            generator,
            setup.contexts("train", settings),
            settings=settings.training,
            context_tokens=settings.contexts.context_tokens,
            round_number=1,
            callback=PhaseCallback(),
        )
        return generator

    def scores(self, flags: str, seed: int) -> Scores:
        """The scores of a variant."""
        settings, setup = settings_of(flags, seed), self.setup
        generator = self.trained(without_decoding(flags), seed)
        _, rows = evaluate_pair(
            setup.accelerator,
            generator,
            setup.contexts("validation", settings),
            top_k=settings.contexts.top_k,
            decoding=Decoding.of(settings.contexts),
            batch_size=settings.contexts.answer_batch_size,
            desc="answering",
        )
        found = {"EM": [row["em"] for row in rows], "F1": [row["f1"] for row in rows]}
        return found | answer_style(rows, generator.tokenizer)


class RetrieverStudy:
    """Trains one retriever phase for each variant and seed, then searches for the validation questions."""

    names = tuple(f"{mode} {metric}" for mode in ("dense", "hybrid") for metric in FOUND)

    def __init__(self, setup: Setup):
        self.setup = setup

    def scores(self, flags: str, seed: int) -> Scores:
        """The scores of a variant."""
        settings, setup = settings_of(flags, seed), self.setup
        retriever, contexts = retriever_of(setup.options), setup.contexts("train", settings)
        train_retriever(
            setup.accelerator,
            retriever,
            contexts,
            setup.passages,
            settings=settings.training,
            round_number=1,
            callback=PhaseCallback(),
            likelihoods=self._likelihoods(settings, contexts) if settings.training.feedback_weight else None,
        )
        with tempfile.TemporaryDirectory() as folder:
            index = open_index(argparse.Namespace(index=folder), setup.table, retriever)
            return {
                f"{mode} {metric}": values
                for mode in ("dense", "hybrid")
                for metric, values in self._found(setup.searcher(index, retriever, mode)).items()
            }

    def _likelihoods(self, settings: Settings, contexts: Dataset) -> np.ndarray:
        """What the teacher, the generator or a reranker, thinks of the passages found for each question."""
        setup = self.setup
        if setup.options.teacher:
            return self._scores_of_reranker(settings, contexts)
        with tqdm(desc="scoring passages with the generator", unit="passage") as bar:
            return answer_likelihoods(
                setup.accelerator,
                setup.generator,
                contexts,
                settings.contexts.context_filter,
                lambda: setup.builder(settings),
                lambda texts: setup.retriever.encode(texts, kind="query", batch_size=64),
                passages=settings.training.feedback_passages,
                context_tokens=settings.contexts.context_tokens,
                batch_size=settings.contexts.answer_batch_size,
                folder=Path(setup.options.index) / "feedback",
                progress=bar.update,
            )

    def _scores_of_reranker(self, settings: Settings, contexts: Dataset) -> np.ndarray:
        """Its scores, in units of the temperature: the loss divides by it, and the reranker has learned with 1."""
        reranker = Reranker.load(self.setup.options.teacher, device=str(self.setup.accelerator.device))
        columns, scores = contexts.select_columns(["question", "rows"])[:], []
        with tqdm(total=len(contexts), desc="scoring passages with the reranker", unit="question") as bar:
            for question, rows in zip(columns["question"], columns["rows"], strict=True):
                texts = self.setup.passages.select(rows[: settings.training.feedback_passages])
                scores.append(reranker.score([(question, text) for text in texts]))
                bar.update()
        return np.array(scores) * settings.training.feedback_temperature

    def _found(self, searcher: Searcher) -> Scores:
        columns = self.setup.validation[:]
        row_of = {key: row for row, key in enumerate(self.setup.passages.ids)}
        scores: Scores = {metric: [] for metric in FOUND}
        for start in range(0, len(columns["question"]), 256):
            block = slice(start, start + 256)
            found = searcher.search(columns["question"][block], max(DEPTHS)).rows.tolist()
            for rows, gold in zip(found, columns["passage_id"][block], strict=True):
                ranks = ranks_of(rows, {row_of[gold]})
                for depth in DEPTHS:
                    scores[f"R@{depth}"].append(recall_at(ranks, depth))
                scores["MRR@10"].append(reciprocal_rank(ranks, cutoff=10))
        return scores


Study = GeneratorStudy | RetrieverStudy
KINDS: dict[str, type[Study]] = {"generator": GeneratorStudy, "retriever": RetrieverStudy}
