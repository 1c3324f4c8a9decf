"""What is a reranker worth? The ranking with and without it, the answers that stay in the context, and its time.

    python -m benchmarks.quality.reranker my-rag --questions squad_dev.jsonl.gz --limit 500 --json reranker.json

The pair must have a reranker. First table: the search by itself, with the reranker's fitted weight, and the reranker
alone over the same passages. Second table: the share of the questions whose context holds an answer, for several
budgets, with the order of the search, with the new order, and with `--sentences` if the reranker scores the sentences
too (its z-scores are added to those of the pair's filter). A longer context is the other way to keep more answers:
compare the columns. Left out: training, and the answers themselves, which `cozyrag evaluate` measures.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from cozyrag.cli import entry_point
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import bootstrap_interval, paired_bootstrap
from cozyrag.models.reranker import Pair
from cozyrag.pair_evaluation import questions_for
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.contexts import ContextBuilder
from cozyrag.retrieval.hybrid import Found
from cozyrag.retrieval.reranking import Reranking
from cozyrag.runtime.atomic_files import write_json

DEPTHS = (1, 4, 5, 20)
ALONE = 1e9  # a weight beside which the score of the search is nothing


Score = Callable[[Sequence[Pair]], np.ndarray]


class Remembered:
    """Scores that are computed once: every row and column of the tables needs the same.

    Args:
        seconds: spent on computing them so far.
    """

    def __init__(self, score: Score):
        self.score, self.seconds, self.known = score, 0.0, dict[Pair, float]()

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        began = time.perf_counter()
        self.known |= zip(new, self.score(new).tolist(), strict=True) if new else ()
        self.seconds += time.perf_counter() - began
        return np.array([self.known[pair] for pair in pairs], dtype=np.float32)


@dataclass(frozen=True)
class SentenceReranking(ContextBuilder):
    """A builder whose sentences are scored by a reranker too."""

    score: Score | None = None

    @classmethod
    def of(cls, builder: ContextBuilder, score: Score) -> "SentenceReranking":
        """The same builder, which asks this reranker."""
        return cls(**{each.name: getattr(builder, each.name) for each in fields(builder)}, score=score)

    def _scores(
        self, question: str, rows: Sequence[int], sentences: Sequence[list[str]], cosines: Sequence[np.ndarray]
    ) -> np.ndarray:
        assert self.score is not None  # see `of`
        titles = [self.passages.titles[row].replace("_", " ") for row in rows]
        found = self.score(
            [(question, f"{title}\n{text}") for title, own in zip(titles, sentences, strict=True) for text in own]
        )
        return super()._scores(question, rows, sentences, cosines) + (found - found.mean()) / (found.std() or 1.0)


def ranks(found: Found, relevant: Sequence[int]) -> np.ndarray:
    """(n_questions,) rank of the relevant row, from 1; infinite if it was not found."""
    hits = found.rows == np.array(relevant)[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)


def ranking_table(found: dict[str, np.ndarray]) -> str:
    """Recall and MRR@10 of each way by its ranks, and the differences from the first way with 95 % intervals."""
    heads = [*(f"recall@{depth}" for depth in DEPTHS), "MRR@10"]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    scores = {
        name: [*(each <= depth for depth in DEPTHS), np.where(each <= 10, 1 / each, 0)] for name, each in found.items()
    }
    first = next(iter(scores.values()))
    for name, columns in scores.items():
        cells = [f"{100 * np.mean(column):.1f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, columns in list(scores.items())[1:]:
        pairs = [paired_bootstrap(before, after) for before, after in zip(first, columns, strict=True)]
        cells = [f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for mean, low, high, _ in pairs]
        lines.append(f"| {name}, change | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept(builder: ContextBuilder, questions: dict, found: Found) -> np.ndarray:
    """(n_questions,) 1 where the context holds an answer, else 0."""
    contexts = builder.contexts(questions["question"], found.rows.tolist(), found.vectors)
    pairs = zip(contexts, questions["answers"], strict=True)
    return np.array([contains_answer(matching_form(context), answers) for context, answers in pairs], dtype=float)


def compare(options: argparse.Namespace) -> None:
    """Search, choose contexts, and print the tables. Raises InputError for a pair without a reranker."""
    pair = CozyRAG.from_pretrained(options.model)
    builder, reranking = pair.evaluated().builder, pair.searcher.reranking
    if pair.reranker is None or reranking is None:
        raise InputError(
            f"Expected a pair with a reranker in {options.model}, found one without. Train with --reranker."
        )
    table = questions_for(options.questions, builder, limit=None)
    row_of = builder.passages.rows_of(table["passage_id"][:])
    known = [at for at, name in enumerate(table["passage_id"]) if name in row_of]
    questions = table.select(np.random.default_rng(options.seed).permutation(known)[: options.limit])[:]
    relevant = [row_of[name] for name in questions["passage_id"]]
    print(f"{len(relevant)} questions, {len(builder.passages.ids)} passages, the first {reranking.depth} reranked.\n")
    reading = Remembered(pair.reranker.score)
    found = searched(pair, replace(reranking, score=reading), questions["question"])
    measured = {name: ranks(each, relevant) for name, each in found.items()}
    spent = {"reranking": 1000 * reading.seconds / len(relevant)}
    print(f"{ranking_table(measured)}\n\nReranking takes {spent['reranking']:.0f} ms a question.")
    search, reranked, _ = found.values()
    ways = {"search": (builder, search), "reranked": (builder, reranked)}
    sentences = Remembered(pair.reranker.score)
    if options.sentences:
        ways["reranked, sentences too"] = SentenceReranking.of(builder, sentences), reranked
    shares = context_table(ways, questions, options.budgets)
    if options.sentences:
        spent["sentences"] = 1000 * sentences.seconds / len(relevant)
        print(f"\nScoring sentences takes {spent['sentences']:.0f} ms a question.")
    if options.json:
        ranked = {name: [float(each) if np.isfinite(each) else None for each in own] for name, own in measured.items()}
        write_json(options.json, {"ranks": ranked, "ms": spent, "answer_in_context": shares})


def searched(pair: CozyRAG, reranking: Reranking, questions: Sequence[str]) -> dict[str, Found]:
    """What the pair finds without its reranker, with it, and by the reranker alone."""
    weights = {"search": 0.0, "with the reranker": reranking.weight, "reranker alone": ALONE}
    searchers = {
        name: replace(pair.searcher, reranking=replace(reranking, weight=weight)) for name, weight in weights.items()
    }
    depth = max(reranking.depth, *DEPTHS)
    return {name: searcher.search(questions, depth) for name, searcher in searchers.items()}


def context_table(
    ways: Mapping[str, tuple[ContextBuilder, Found]], questions: dict, budgets: Sequence[int]
) -> dict[str, dict[int, float]]:
    """Print the share of contexts with an answer for each way and budget; returns it in percent."""
    print("\n| answer in context | " + " | ".join(f"{budget} tokens" for budget in budgets) + " |")
    print("|---|" + "---:|" * len(budgets))
    shares: dict[str, dict[int, float]] = {}
    for name, (builder, found) in ways.items():
        cells = []
        for budget in budgets:
            own = kept(replace(builder, budget=budget), questions, found)
            low, high = bootstrap_interval(own)
            cells.append(f"{100 * own.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})")
            shares.setdefault(name, {})[budget] = 100 * float(own.mean())
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return shares


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="output folder of a run with --reranker, or its name on the Hub")
    parser.add_argument("--questions", nargs="+", required=True, help="questions whose passages are in the index")
    parser.add_argument("--limit", type=int, default=500, help="questions, drawn with --seed (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 96, 128, 192], help="tokens of a context")
    parser.add_argument("--sentences", action="store_true", help="score the sentences of the first passages too")
    parser.add_argument("--json", type=Path, help="file for the ranks and shares")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
