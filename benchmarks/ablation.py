#!/usr/bin/env python
"""What single settings change: the same start, the same questions, one setting changed, several seeds.

    python benchmarks/ablation.py penalties --questions squad_dev.jsonl.gz --train squad_train.jsonl.gz --index vectors
    python benchmarks/ablation.py feedback  --questions squad_dev.jsonl.gz --train squad_train.jsonl.gz --index vectors
    python benchmarks/ablation.py own --of generator --variant "twice:--generator_epochs 2" ...

A study of the generator trains one phase of it on contexts that are searched for once, and lets it answer the questions. A
study of the retriever trains one phase of it and searches the passages with what it became, once by vectors alone and once
by vectors and words. Each line is compared with the first: the difference is taken question by question, averaged over the
seeds, and bootstrapped over the questions. Left out: whole runs with rounds and gates (train.py, `cozyrag compare`).
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from accelerate.utils import tqdm
from datasets import Dataset
from pairs import load_generator
from scoring import told
from searching import accelerator_of, add_arguments, fewer, open_index, retriever_of

from cozyrag.cli import entry_point
from cozyrag.config import Settings, parse_settings
from cozyrag.config_checks import EMBEDDED
from cozyrag.data.passages import merge_passages
from cozyrag.data.questions import read_questions, take
from cozyrag.errors import InputError
from cozyrag.evaluation.evaluation import evaluate_pair
from cozyrag.evaluation.metrics import (
    bootstrap_interval,
    normalize_answer,
    paired_bootstrap,
    ranks_of,
    recall_at,
    reciprocal_rank,
)
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import SEARCH_DEPTH, ContextBuilder, attach_contexts, sentence_source
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.generator_phase import train_generator
from cozyrag.training.lm_feedback import answer_likelihoods
from cozyrag.training.retriever_phase import train_retriever
from cozyrag.training.trainer import PhaseCallback

NGRAM, FEWEST = 3, 3  # tokens: of a repeated n-gram; of an answer that is long enough
STUDIES = {
    "penalties": (
        "generator",
        {
            "no penalty": "",
            "repeats, trained": "--repeat_penalty 0.1",
            "keywords, trained": "--keyword_penalty 0.1",
            "short answers, trained": "--short_penalty 0.1",
            "all three, trained": "--repeat_penalty 0.1 --keyword_penalty 0.1 --short_penalty 0.1",
            "no 3-gram twice, decoding": "--no_repeat_ngram_size 3",
            "at least 3 tokens, decoding": "--min_answer_tokens 3",
            "both, decoding": "--no_repeat_ngram_size 3 --min_answer_tokens 3",
            "spans only, decoding": "--extractive",
            "all of training and decoding": "--repeat_penalty 0.1 --keyword_penalty 0.1 --short_penalty 0.1 "
            "--no_repeat_ngram_size 3 --min_answer_tokens 3",
        },
    ),
    "feedback": ("retriever", {"contrastive": "", "contrastive + feedback": "--feedback_weight 0.5"}),
    "own": ("", {"defaults": ""}),
}


# ---- how an answer is written


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """seq-rep-n: the share of n-grams that stood there before, 0 for fewer than n tokens (Welleck et al. 2020, eq. 11)."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parrots(prediction: str, question: str, references: Sequence[str]) -> float:
    """1 where an answer has words and all of them stand in the question, unless a reference is like that too."""
    asked = set(normalize_answer(question).split())

    def all_asked(text: str) -> bool:
        words = normalize_answer(text).split()
        return bool(words) and set(words) <= asked

    return float(all_asked(prediction) and not any(all_asked(text) for text in references))


def too_short(length: int, references: Sequence[int], fewest: int = FEWEST) -> float:
    """1 where an answer has fewer tokens than `fewest` and than every reference."""
    return float(length < min([fewest, *references]))


def habits(rows: Sequence[Mapping], tokenizer) -> dict[str, list[float]]:
    """Each question's rates of repetition, parroting and too short answers, 0 to 1."""

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


@dataclass
class Ground:
    """Questions to learn from and to be examined with, the passages, and what searches them before any training."""

    options: argparse.Namespace
    train: Dataset
    asked: Dataset
    table: Dataset
    index: PassageIndex
    passages: Passages = field(init=False)

    def __post_init__(self):
        self.accelerator = accelerator_of(self.options.threads)
        self.passages = self.index.passages
        self.lexical = LexicalIndex(self.passages.to_read(), stemmer=self.options.stemmer)
        self.words = SentenceWords(self.passages.titles, self.passages.sentences(), stemmer=self.options.stemmer)
        self.generator = load_generator(self.options.generator, self.accelerator.device)
        self.retriever = retriever_of(self.options)
        self._contexts: dict[tuple, Dataset] = {}

    def builder(self, settings: Settings, index: PassageIndex, retriever: Retriever) -> ContextBuilder:
        """What makes contexts as the settings say."""
        chosen = settings.contexts
        builder = ContextBuilder(
            self.passages, self.generator.count_tokens, top_k=chosen.top_k, budget=chosen.context_tokens,
            hard_negatives=settings.training.hard_negatives, score_by=chosen.context_filter, words=self.words,
        )  # fmt: skip
        builder.sentence_vectors = sentence_source(index, retriever)
        return builder

    def searcher(self, index: PassageIndex, retriever: Retriever, mode: str) -> Searcher:
        """The search with the weights that come with the package: none of them fitted, so that all variants have the same."""
        encode = lambda texts: retriever.encode(texts, kind="query", batch_size=64)  # noqa: E731
        return Searcher(index, self.lexical if mode != "dense" else None, encode=encode, mode=mode, words=self.words)

    def contexts(self, which: str, settings: Settings) -> Dataset:
        """The contexts of the questions to learn from ("train") or to be examined with, made once for equal settings."""
        chosen, noise = settings.contexts, settings.training.context_noise if which == "train" else 0.0
        negatives = settings.training.hard_negatives
        key = (which, chosen.retrieval, chosen.top_k, chosen.context_tokens, chosen.context_filter, noise, negatives)
        if key not in self._contexts:
            table = self.train if which == "train" else self.asked
            searcher = self.searcher(self.index, self.retriever, chosen.retrieval)
            with tqdm(total=len(table), desc=f"searching ({which})", unit="question") as bar:
                self._contexts[key] = attach_contexts(
                    table,
                    search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
                    builder=self.builder(settings, self.index, self.retriever),
                    fingerprint=f"ablation-{len(self._contexts)}",
                    noise=noise,
                    batch_size=256,
                    progress=bar.update,
                )
        return self._contexts[key]


def open_ground(options: argparse.Namespace) -> Ground:
    """Read questions, passages and vectors. Raises InputError for what cannot be used."""
    asked, train = read_questions(options.questions), read_questions(options.train)
    others = [read_questions(path).passages for path in options.also_passages]
    passages = merge_passages([asked.passages, train.passages, *others])
    questions = take(asked.table, options.max_questions, 0)
    lessons = take(train.table, options.train_questions, 0)
    needed = {*questions["passage_id"][:], *lessons["passage_id"][:]}
    passages = fewer(passages, options.max_passages, needed)
    return Ground(options, lessons, questions, passages, open_index(options, passages, retriever_of(options)))


# ---- the two kinds of study


class GeneratorStudy:
    """One generator phase for each variant and seed, then answers to the questions."""

    names = ("EM", "F1", f"seq-rep-{NGRAM}", "parroting", "too short")

    def __init__(self, ground: Ground):
        self.ground = ground
        self.trained = lru_cache(maxsize=1)(self._trained)

    def _trained(self, flags: str, seed: int) -> Generator:
        """The generator after a phase; flags that only decoding heeds have been taken out, so that it serves several lines."""
        settings = settings_of(flags, seed)
        generator = load_generator(self.ground.options.generator, self.ground.accelerator.device)
        train_generator(
            self.ground.accelerator,
            generator,
            self.ground.contexts("train", settings),
            settings=settings.training,
            context_tokens=settings.contexts.context_tokens,
            round_number=1,
            callback=PhaseCallback(),
        )
        return generator

    def scores(self, flags: str, seed: int) -> dict[str, list[float]]:
        """Of each question, 0 to 1."""
        settings, ground = settings_of(flags, seed), self.ground
        generator = self.trained(without_decoding(flags), seed)
        _, rows = evaluate_pair(
            ground.accelerator,
            generator,
            ground.contexts("asked", settings),
            top_k=settings.contexts.top_k,
            decoding=Decoding.of(settings.contexts),
            batch_size=settings.contexts.answer_batch_size,
            desc="answering",
        )
        return {"EM": [row["em"] for row in rows], "F1": [row["f1"] for row in rows]} | habits(
            rows, generator.tokenizer
        )


class RetrieverStudy:
    """One retriever phase for each variant and seed, then the passages searched with what it became."""

    names = tuple(f"{how} {what}" for how in ("vectors", "both") for what in ("R@1", "R@5", "R@20", "MRR@10"))

    def __init__(self, ground: Ground):
        self.ground = ground

    def scores(self, flags: str, seed: int) -> dict[str, list[float]]:
        """Of each question, 0 to 1."""
        settings, ground = settings_of(flags, seed), self.ground
        retriever, contexts = retriever_of(ground.options), ground.contexts("train", settings)
        train_retriever(
            ground.accelerator,
            retriever,
            contexts,
            ground.passages,
            settings=settings.training,
            round_number=1,
            callback=PhaseCallback(),
            likelihoods=self._likelihoods(settings, contexts) if settings.training.feedback_weight else None,
        )
        with tempfile.TemporaryDirectory() as folder:
            index = open_index(argparse.Namespace(index=folder), self.ground.table, retriever)
            return self._found(ground.searcher(index, retriever, "dense"), "vectors") | self._found(
                ground.searcher(index, retriever, "hybrid"), "both"
            )

    def _likelihoods(self, settings: Settings, contexts: Dataset) -> np.ndarray:
        ground, folder = self.ground, Path(self.ground.options.index) / "feedback"
        with tqdm(desc="generator feedback", unit="passage") as bar:
            return answer_likelihoods(
                ground.accelerator,
                ground.generator,
                contexts,
                ground.builder(settings, ground.index, ground.retriever),
                lambda texts: ground.retriever.encode(texts, kind="query", batch_size=64),
                passages=settings.training.feedback_passages,
                context_tokens=settings.contexts.context_tokens,
                batch_size=settings.contexts.answer_batch_size,
                folder=folder,
                progress=bar.update,
            )

    def _found(self, searcher: Searcher, how: str) -> dict[str, list[float]]:
        columns = self.ground.asked[:]
        rows_of = {key: row for row, key in enumerate(self.ground.passages.ids)}
        scores: dict[str, list[float]] = {f"{how} {what}": [] for what in ("R@1", "R@5", "R@20", "MRR@10")}
        for start in range(0, len(columns["question"]), 256):
            found = searcher.search(columns["question"][start : start + 256], 20).rows.tolist()
            for rows, gold in zip(found, columns["passage_id"][start : start + 256], strict=True):
                ranks = ranks_of(rows, {rows_of[gold]})
                for depth in (1, 5, 20):
                    scores[f"{how} R@{depth}"].append(recall_at(ranks, depth))
                scores[f"{how} MRR@10"].append(reciprocal_rank(ranks, cutoff=10))
        return scores


KINDS = {"generator": GeneratorStudy, "retriever": RetrieverStudy}
DECODED = {"--min_answer_tokens": 1, "--no_repeat_ngram_size": 1, "--extractive": 0}  # and how many values each has


def without_decoding(flags: str) -> str:
    """The flags without those that training does not heed."""
    kept, words = [], iter(shlex.split(flags))
    for word in words:
        if word in DECODED:
            for _ in range(DECODED[word]):
                next(words)
        else:
            kept.append(word)
    return shlex.join(kept)


def settings_of(flags: str, seed: int) -> Settings:
    """The defaults that own questions get, with these flags; the quickstart set has others."""
    return parse_settings(["--questions", "own", *shlex.split(flags), "--seed", str(seed)])


# ---- the table


def run(study, variants: Mapping[str, str], seeds: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
    """Scores (n_seeds, n_questions) of each variant by metric; seeds are the outer loop, so that lines can share training."""
    found: dict[str, list[dict]] = {name: [] for name in variants}
    # variants that train alike stand together, so that one training serves them
    order = sorted(variants, key=lambda name: without_decoding(variants[name]))
    with tqdm(total=len(variants) * len(seeds), desc="ablation", unit="variant") as bar:
        for seed in seeds:
            for name in order:
                bar.set_postfix_str(f"{name}, seed {seed}")
                found[name].append(study.scores(variants[name], seed))
                bar.update()
                means = ", ".join(f"{metric} {100 * np.mean(values):.1f}" for metric, values in found[name][-1].items())
                bar.write(f"{name}, seed {seed}: {means}")  # a study takes hours, and may be ended before its table
    return {
        name: {metric: np.array([each[metric] for each in runs]) for metric in study.names}
        for name, runs in found.items()
    }


def line(scores: Mapping[str, np.ndarray]) -> list[str]:
    """The first line's cells: percent with 95 % intervals over the questions."""
    cells = []
    for values in scores.values():
        mean = values.mean(axis=0)
        low, high = bootstrap_interval(mean)
        cells.append(f"{100 * mean.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})")
    return cells


def difference(scores: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]) -> list[str]:
    """Another line's cells: percent, and in points how it differs from the first line."""
    cells = []
    for metric, values in scores.items():
        gain, low, high, _ = paired_bootstrap(first[metric].mean(axis=0), values.mean(axis=0))
        cells.append(f"{100 * values.mean():.1f}, {100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    return cells


def table(found: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Percent; the first line with intervals, the others with their difference to it and its interval."""
    (first_name, first), *others = found.items()
    lines = ["| | " + " | ".join(first) + " |", "|---|" + "---:|" * len(first)]
    lines.append(f"| {first_name} | " + " | ".join(line(first)) + " |")
    lines += [f"| {name} | " + " | ".join(difference(scores, first)) + " |" for name, scores in others]
    return "\n".join(lines)


def spread_of_seeds(found: Mapping[str, Mapping[str, np.ndarray]], metric: str) -> str:
    """What the seeds alone change in the lines."""
    each = [scores[metric].mean(axis=1) for scores in found.values()]
    widest = max(float(values.max() - values.min()) for values in each)
    p = [
        paired_bootstrap(next(iter(found.values()))[metric].mean(axis=0), scores[metric].mean(axis=0))[3]
        for scores in list(found.values())[1:]
    ]
    lines = ", ".join(f"{name} {told(value)}" for name, value in zip(list(found)[1:], p, strict=True))
    return f"Seeds alone move a line's {metric} by up to {100 * widest:.1f} points. Not better than the first line: {lines}."


def variants_of(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The kind of study and its lines. Raises InputError for a variant without a name."""
    kind, variants = STUDIES[options.study]
    given = {}
    for text in options.variant:
        name, colon, flags = text.partition(":")
        if not colon:
            raise InputError(
                f'--variant: expected "NAME:--setting value", found {text!r}. Put a name and a colon first.'
            )
        given[name.strip()] = flags.strip()
    both = variants | given
    chosen = {name: f"{options.base} {flags}".strip() for name, flags in both.items()}
    for flags in chosen.values():
        settings_of(flags, 0)  # a wrong one is told before anything is trained
    return options.of or kind or "generator", chosen


def compare(options: argparse.Namespace) -> None:
    """Train, examine, tell."""
    kind, variants = variants_of(options)
    ground = open_ground(options)
    print(
        f"{len(ground.train)} questions to learn from, {len(ground.asked)} asked, {len(ground.passages.ids)} passages, seeds "
        f"{', '.join(map(str, options.seeds))}.\n"
    )
    study = KINDS[kind](ground)
    found = run(study, variants, options.seeds)
    print(table(found))
    print(f"\n{spread_of_seeds(found, 'F1' if kind == 'generator' else 'vectors R@5')}")
    if options.json:
        plain = {name: {m: v.mean(axis=1).tolist() for m, v in scores.items()} for name, scores in found.items()}
        Path(options.json).write_text(json.dumps({"variants": variants, "means": plain}, indent=2) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES, help="which settings are compared; own: those of --variant")
    add_arguments(parser, max_questions=1000)
    parser.add_argument("--train", required=True, help="questions to learn from; they carry their gold passage")
    parser.add_argument("--train_questions", type=int, default=1500, help="a sample of so many (default: 1500)")
    parser.add_argument("--max_passages", type=int, help="search this many: the gold ones and a sample (default: all)")
    parser.add_argument("--generator", default=EMBEDDED, help="embedded, a folder or a Hub id (default: embedded)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--of", choices=KINDS, help="what `own` trains (default: generator)")
    parser.add_argument("--base", default="", help='settings of all lines, as one text: "--generator_epochs 2"')
    parser.add_argument("--variant", action="append", default=[], help='another line: "NAME:--setting value ..."')
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--json", help="file for the means of each seed")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen_options = parse()
    entry_point(lambda: compare(chosen_options))
