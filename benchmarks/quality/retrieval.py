"""How good is retrieval? Compares sparse, dense, and hybrid search, before and after training.

    python -m benchmarks.quality.retrieval my-rag --suite quickstart --json retrieval.json
    python -m benchmarks.quality.retrieval embedded --suite squad --data FOLDER --index vectors --json squad.json
    python -m benchmarks.quality.retrieval my-rag --questions test.tsv --passages wiki.jsonl --json mine.json

Prints recall@1/5/20, MRR@10, nDCG@10, and hit rate@10 in percent with 95 % bootstrap intervals, over the questions
whose gold passage is known. There is one gold passage for each question, so the hit rate equals recall@10.

Rows: sparse (BM25); dense; hybrid, which adds scores of the best sentences with the fusion weights of the run (fitted
on training questions if the run has none); hybrid, of passages, which scores whole passages; hybrid as ranks, which is
reciprocal rank fusion. OUT and OUT.md are the same for any number of processes; OUT.timings.json is not. Vectors are
cached in --index and shared with qa.py. Left out: answers (qa.py).
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm

from benchmarks.shared.bench import Bench, add_model_arguments, machine_facts, write_json
from benchmarks.shared.pairs import Pair, load_base
from benchmarks.shared.scoring import paired_tests, test_table
from benchmarks.shared.suites import add_task_arguments
from cozyrag.cli import entry_point
from cozyrag.config_checks import EMBEDDED
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import hit_at, ndcg_at, ranks_of, recall_at, reciprocal_rank
from cozyrag.evaluation.scoring import FOUND, score_table, scores_of
from cozyrag.pair_evaluation import BLOCK
from cozyrag.retrieval.hybrid import CANDIDATES

DEPTH = 20
RANK_CONSTANT = 60  # Cormack et al. 2009, "Reciprocal rank fusion outperforms Condorcet"
TESTED = ("recall@1", "recall@5")
BEFORE, AFTER = "before", "after"
NO_BASELINE = "no before"  # its place among the weights holds the reason

Search = Callable[[list[str]], dict[str, np.ndarray]]  # questions to the rows found, (n, at most DEPTH), by name


def reciprocal_rank_fusion(rankings: tuple[np.ndarray, ...], k: int) -> np.ndarray:
    """(n, k) rows, best first, by the sum of 1 / (60 + rank) over (n, depth) rankings. Ties keep the row order."""
    fused = []
    for lists in zip(*rankings, strict=True):
        scores: dict[int, float] = {}
        for ranking in lists:
            for rank, row in enumerate(ranking.tolist(), 1):
                scores[row] = scores.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
        fused.append(sorted(scores, key=lambda row: (-scores[row], row))[:k])
    return np.array(fused)


def found_row(rows: np.ndarray, gold: int) -> dict[str, float]:
    """The metrics of FOUND, 0 to 1, of one question: rows found, best first, and the row of its gold passage."""
    ranks = ranks_of(rows.tolist(), {gold})
    return {
        **{f"recall@{k}": recall_at(ranks, k) for k in (1, 5, 20)},
        "mrr@10": reciprocal_rank(ranks, 10),
        "ndcg@10": ndcg_at(ranks, 10),
        "hit@10": hit_at(ranks, 10),
    }


def search_all(accelerator: Accelerator, questions: list[str], search: Search, desc: str) -> dict[str, np.ndarray]:
    """Rows found for all questions, (n, at most DEPTH), by name. Every process searches for some blocks."""
    starts = range(0, len(questions), BLOCK)[accelerator.process_index :: accelerator.num_processes]
    made = [(start, search(questions[start : start + BLOCK])) for start in tqdm(starts, desc=desc, unit="block")]
    blocks = [found for _, found in sorted(gather_object(made), key=lambda each: each[0])]
    return {name: np.concatenate([found[name] for found in blocks]) for name in blocks[0]}


def search_modes(bench: Bench, pair: Pair, when: str, weights: dict[str, dict | str]) -> Search:
    """Dense search and the kinds of hybrid search of a pair. Adds their fusion weights to `weights`."""
    index = bench.index(pair)
    searcher = bench.searcher(pair, index, "hybrid")
    whole = bench.searcher(pair, index, "hybrid", whole=True)
    weights |= {when: asdict(searcher.fusion_weights), f"of passages, {when}": asdict(whole.fusion_weights)}

    def search(questions: list[str]) -> dict[str, np.ndarray]:
        found = searcher.search(questions, CANDIDATES)
        return {
            f"dense, {when}": searcher.index.search(found.vectors, DEPTH)[1],
            f"hybrid as ranks, {when}": reciprocal_rank_fusion(found.rankings, DEPTH),
            f"hybrid, of passages, {when}": whole.search(questions, DEPTH).rows,
            f"hybrid, {when}": found.rows[:, :DEPTH],
        }

    return search


def compare(options: argparse.Namespace) -> None:
    """Load, search in every mode, score, and report."""
    bench, pair = Bench.load(options)
    known = bench.known_golds(bench.task.questions)
    if not known:
        raise InputError(
            f"Expected questions with a known gold passage, found none among {len(bench.task.questions)} of "
            f"{bench.task.name}. Give questions with a context or a passage_id column."
        )
    bench.introduce(pair, len(known))
    found, weights = find(bench, pair, [question for question, _ in known])
    systems = {
        name: [found_row(rows, gold) for rows, (_, gold) in zip(every, known, strict=True)]
        for name, every in found.items()
    }
    results = {
        "benchmark": "retrieval",
        "model": pair.name,
        "task": bench.task.name,
        "questions": len(known),
        "without_gold": len(bench.task.questions) - len(known),
        "passages": len(bench.task.passages),
        "weights": weights,
        "scores": {name: scores_of(rows, FOUND) for name, rows in systems.items()},
        "tests": paired_tests(dict(reversed(systems.items())), TESTED),
        "notes": bench.task.notes,
    }
    if bench.accelerator.is_main_process:
        write(options.json, results, {"seconds": bench.clock.seconds, "machine": machine_facts(bench.accelerator)})


def find(bench: Bench, pair: Pair, questions: list[str]) -> tuple[dict[str, np.ndarray], dict[str, dict | str]]:
    """The rows found in every mode, and the fusion weights or the reason why there is no untuned baseline."""
    untuned = load_base(bench.options.model, pair, bench.base_names(), bench.accelerator.device)
    weights: dict[str, dict | str] = {}
    sides = [(BEFORE if bench.options.model == EMBEDDED else AFTER, pair)]
    if isinstance(untuned, Pair):
        sides.insert(0, (BEFORE, untuned))
    elif bench.options.model != EMBEDDED:
        weights[NO_BASELINE] = untuned
    sparse: Search = lambda texts: {"sparse (BM25)": bench.lexical.search(texts, DEPTH)[1]}  # noqa: E731
    found = search_all(bench.accelerator, questions, sparse, "sparse search")
    for when, side in sides:
        search = search_modes(bench, side, when, weights)
        with bench.clock.timed(f"searching, {when}"):
            found |= search_all(bench.accelerator, questions, search, f"dense and hybrid search, {when}")
    return found, weights


def tables_of(results: dict) -> str:
    """The results as Markdown tables."""
    best = results["tests"][0]["first"]  # hybrid search, after training if the model was trained
    worth = "; ".join(
        f"{when} {weight['vectors']:g} and {weight['sentence_words']:g}"
        for when, weight in results["weights"].items()
        if not isinstance(weight, str)
    )
    lines = [
        f"# Retrieval on {results['task']} by {results['model']}",
        f"{results['questions']} questions with a known gold passage, {results['passages']} passages. Percent, with "
        "95 % bootstrap intervals.",
        score_table(results["scores"], FOUND),
        f"Fusion weights of a cosine of 1 and of a point of shared rarity, in BM25 points: {worth}.",
        "Difference in points, its 95 % interval, and the share p of the resamples in which it is not better (paired "
        "bootstrap):",
        test_table(results["tests"], best),
        test_table(results["tests"], f"dense, {AFTER}"),
        f"There is no row `{BEFORE}`: {results['weights'][NO_BASELINE]}." if NO_BASELINE in results["weights"] else "",
    ]
    return "\n\n".join(line for line in [*lines, *results["notes"]] if line) + "\n"


def write(out: Path, results: dict, times: dict) -> None:
    """Write OUT, its tables, and the times; print the tables."""
    write_json(out, results)
    write_json(out.with_suffix(".timings.json"), times)
    tables = tables_of(results)
    out.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(f"\n{tables}\nWritten: {out} and the files beside it.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_task_arguments(parser)
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
