"""How good is each way to filter contexts? The share of the answers that stays, its cost, and the answers.

    python -m benchmarks.quality.filter --questions squad_dev.jsonl.gz --also_passages squad_train.jsonl.gz \\
        --index vectors --generator cozyrag/assets/generator

Hybrid search finds passages for each question among all passages of the question files. Of the answers that are in the
top-k passages, the tables show the share that is still in the context, for several budgets. The ways to choose
sentences: vectors of sentences encoded one by one, vectors from one pass over the passage (late chunking), shared
words, late chunking and words together, and plain truncation. The retriever is untuned unless --retriever names
another. Left out: training.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.shared.corpus import add_arguments, corpus_of, open_index, retriever_of
from cozyrag.cli import entry_point
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.sentences import split_sentences
from cozyrag.evaluation.metrics import bootstrap_interval, exact_match, f1
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import ContextBuilder, SentenceSource, sentence_source
from cozyrag.retrieval.hybrid import Found, Searcher
from cozyrag.retrieval.passage_index import Passages

TRUNCATION, ONE_BY_ONE, SPARSE, HYBRID = (
    "truncation",
    "one encode per sentence",
    "word overlap",
    "late chunking + overlap",
)
WAYS = (TRUNCATION, ONE_BY_ONE, "late chunking", SPARSE, HYBRID)


def one_by_one(passages: Passages, retriever: Retriever) -> SentenceSource:
    """Vectors of sentences encoded without their passage, cached because every budget needs the same."""
    known: dict[int, np.ndarray] = {}

    def encode(rows: Sequence[int]) -> list[np.ndarray]:
        new = [row for row in rows if row not in known]
        sentences = [split_sentences(passages.texts[row]) for row in new]
        flat = [sentence for each in sentences for sentence in each]
        if flat:
            vectors = retriever.encode(flat, kind="document", batch_size=64)
            known.update(zip(new, np.split(vectors, np.cumsum([len(each) for each in sentences])[:-1]), strict=True))
        return [known[row] for row in rows]

    return encode


@dataclass(frozen=True)
class Comparison:
    """The questions with the passages found for them, and what builds their contexts."""

    questions: dict
    found: Found
    generator: Generator
    builder: ContextBuilder
    sources: dict[str, SentenceSource]

    def contexts(self, way: str, budget: int) -> tuple[list[str], float]:
        """The contexts of all questions in one of WAYS, and the seconds it took."""
        began = time.perf_counter()
        rows = self.found.rows.tolist()
        if way == TRUNCATION:
            made = [self._truncated(each, budget) for each in rows]
        else:
            builder = replace(
                self.builder,
                budget=budget,
                score_by={SPARSE: "sparse", HYBRID: "hybrid"}.get(way, "dense"),
                sentence_vectors=self.sources["one by one" if way == ONE_BY_ONE else "late"],
            )
            made = builder.contexts(self.questions["question"], rows, self.found.vectors)
        return made, time.perf_counter() - began

    def _truncated(self, rows: Sequence[int], budget: int) -> str:
        """The passages one after another, cut off at the budget."""
        tokenizer = self.generator.tokenizer
        text = "\n".join(self.builder.passages.select(rows[: self.builder.top_k]))
        return tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][:budget])

    def kept(self, contexts: Sequence[str]) -> np.ndarray:
        """(n_questions,) 1 if the context contains an answer, else 0."""
        pairs = zip(contexts, self.questions["answers"], strict=True)
        return np.array([contains_answer(matching_form(text), answers) for text, answers in pairs], dtype=float)


def load(options: argparse.Namespace) -> Comparison:
    """Read the tables, encode, and search. Raises InputError for unusable input."""
    questions, passages = corpus_of(options)
    retriever = retriever_of(options)
    generator = Generator.load(options.generator)
    index = open_index(options, passages, retriever)
    words = SentenceWords(index.passages.titles, index.passages.sentences(), stemmer=options.stemmer)
    searcher = Searcher(
        index,
        LexicalIndex(index.passages.to_read(), stemmer=options.stemmer),
        encode=lambda texts: retriever.encode(texts, kind="query", batch_size=64),
        mode="hybrid",
        words=words,
    )
    found = searcher.search(questions["question"], options.top_k)
    builder = ContextBuilder(index.passages, generator.count_tokens, top_k=options.top_k, budget=1, words=words)
    sources = {"late": sentence_source(index, retriever), "one by one": one_by_one(index.passages, retriever)}
    return Comparison(questions, found, generator, builder, sources)


def compare(options: argparse.Namespace) -> None:
    """Print the tables."""
    comparison = load(options)
    builder, found = comparison.builder, comparison.found.rows
    present = np.array(
        [
            any(builder.holds_answer(row, answers) for row in rows)
            for rows, answers in zip(found, comparison.questions["answers"], strict=True)
        ]
    )
    print(
        f"{len(present)} questions, {len(builder.passages.ids)} passages; an answer is in the top {options.top_k} of "
        f"{present.mean():.1%}.\n"
    )
    print("| way | " + " | ".join(f"{budget} tokens" for budget in options.budgets) + " | ms per question |")
    print("|---|" + "---:|" * (len(options.budgets) + 1))
    answered = {}
    for way in options.ways:
        cells, spent = [], 0.0
        for budget in options.budgets:
            contexts, seconds = comparison.contexts(way, budget)
            spent = spent or seconds  # of the first budget, which includes encoding the sentences
            kept = comparison.kept(contexts)[present]
            low, high = bootstrap_interval(kept)
            cells.append(f"{kept.mean():.3f} ({low:.3f} to {high:.3f})")
            if budget == options.answer_at:
                answered[way] = contexts
        print(f"| {way} | " + " | ".join(cells) + f" | {1000 * spent / len(present):.1f} |", flush=True)
    if answered:
        print_answers(comparison, answered, options.answer_at)


def print_answers(comparison: Comparison, answered: dict[str, list[str]], budget: int) -> None:
    """EM and F1 of the generator with the contexts of each way."""
    print(f"\n| way, {budget} tokens | EM | F1 |\n|---|---:|---:|")
    questions = comparison.questions
    for way, contexts in answered.items():
        texts = comparison.generator.answer(
            questions["question"], contexts, context_tokens=budget, max_new_tokens=24, batch_size=64
        )
        cells = [score_cell(metric, texts, questions["answers"]) for metric in (exact_match, f1)]
        print(f"| {way} | {cells[0]} | {cells[1]} |", flush=True)


def score_cell(metric: Callable[[str, list[str]], float], texts: list[str], answers: list[list[str]]) -> str:
    """The mean of a metric in percent with its 95 % bootstrap interval."""
    values = np.array([metric(text, each) for text, each in zip(texts, answers, strict=True)])
    low, high = bootstrap_interval(values)
    return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, max_questions=1500)
    parser.add_argument("--generator", required=True, help="generator whose tokens the budgets count: folder or Hub id")
    parser.add_argument("--top_k", type=int, default=4, help="passages whose sentences compete (default: 4)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96, 128, 192], help="tokens of a context")
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help="only these ways (default: all)"
    )
    parser.add_argument("--answer_at", type=int, help="one of the budgets, at which the generator answers too")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
