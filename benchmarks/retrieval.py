"""How well passages are found: by words, by vectors, by both as ranks and by both added up, before and after training.

    python benchmarks/retrieval.py my-rag --suite quickstart --json retrieval.json
    python benchmarks/retrieval.py embedded --suite squad --data FOLDER --index vectors --json squad.json
    python benchmarks/retrieval.py my-rag --questions test.tsv --passages wiki.jsonl --json mine.json

MODEL is a run's output folder, user/name on the Hub, or `embedded`. Prints recall@1/5/20, MRR@10, nDCG@10 and the hit rate among
the first 10 in percent with 95 % bootstrap intervals, over the questions whose gold passage is known. Only one passage is
gold for a question, so the hit rate is recall@10. The weights of the sum are those the run fitted; where none were, they are fitted on
training questions, as a run does; "of passages" leaves out what is known of their sentences. OUT is the same for the same models and questions, however many processes (accelerate
launch); OUT.timings.json is not. Vectors are kept in --index, shared with qa.py. Left out: answers (qa.py).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from bench import TOGETHER, Bench, add_model_arguments, open_bench
from latency import machine_facts
from pairs import Pair, load_base
from scoring import FOUND, paired_tests, score_table, scores_of, test_table
from searching import reciprocal_rank_fusion
from suites import add_task_arguments

from cozyrag.cli import entry_point
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import hit_at, ndcg_at, ranks_of, recall_at, reciprocal_rank
from cozyrag.retrieval.hybrid import CANDIDATES, Searcher

DEPTH = 20
TESTED = ("recall@1", "recall@5")
BEFORE, AFTER = "before", "after"


def found_row(rows: np.ndarray, gold: int) -> dict[str, float]:
    """The metrics of FOUND, 0 to 1, of one question: rows found, best first, and the row of its gold passage."""
    ranks = ranks_of(rows.tolist(), {gold})
    return {
        **{f"recall@{k}": recall_at(ranks, k) for k in (1, 5, 20)},
        "mrr@10": reciprocal_rank(ranks, 10),
        "ndcg@10": ndcg_at(ranks, 10),
        "hit@10": hit_at(ranks, 10),
    }


def search_all(
    accelerator: Accelerator, questions: list[str], search: Callable[[list[str]], dict[str, np.ndarray]], desc: str
) -> dict[str, np.ndarray]:
    """Rows found for all questions, (n, at most DEPTH) by name; every process searches for some blocks of them."""
    starts = range(0, len(questions), TOGETHER)
    made = []
    for start in tqdm(starts[accelerator.process_index :: accelerator.num_processes], desc=desc, unit="block"):
        made.append((start, search(questions[start : start + TOGETHER])))
    blocks = [found for _, found in sorted(gather_object(made), key=lambda each: each[0])]
    return {name: np.concatenate([found[name] for found in blocks]) for name in blocks[0]}


def ways(bench: Bench, pair: Pair, when: str, weights: dict) -> Callable[[list[str]], dict[str, np.ndarray]]:
    """Questions to the rows found by vectors, by the weighted sum and by ranks, from one search."""
    index = bench.index(pair)
    searcher: Searcher = bench.searcher(pair, index, "hybrid")
    whole = bench.searcher(pair, index, "hybrid", whole=True)
    weights |= {when: asdict(searcher.weights), f"of passages, {when}": asdict(whole.weights)}

    def search(questions: list[str]) -> dict[str, np.ndarray]:
        found = searcher.search(questions, CANDIDATES)
        return {
            f"vectors, {when}": searcher.index.search(found.vectors, DEPTH)[1],
            f"both as ranks, {when}": reciprocal_rank_fusion(found.rankings, DEPTH),
            f"both, of passages, {when}": whole.search(questions, DEPTH).rows,
            f"both, {when}": found.rows[:, :DEPTH],
        }

    return search


def compare(options: argparse.Namespace) -> None:
    """The story: load, search in every way, score, tell."""
    bench, pair = open_bench(options)
    questions, gold = asked(bench)
    bench.accelerator.print(
        f"{len(gold)} questions of {bench.task.name}, {len(bench.task.passages)} passages, model {pair.name}."
    )
    found, weights = find(bench, pair, questions)
    systems = {
        name: [found_row(rows, row) for rows, row in zip(every, gold, strict=True)] for name, every in found.items()
    }
    told = {
        "benchmark": "retrieval",
        "model": pair.name,
        "task": bench.task.name,
        "questions": len(gold),
        "without_gold": len(bench.task.questions) - len(gold),
        "passages": len(bench.task.passages),
        "weights": weights,
        "scores": {name: scores_of(rows, FOUND) for name, rows in systems.items()},
        "tests": paired_tests(dict(reversed(systems.items())), TESTED),
        "notes": bench.task.notes,
    }
    if bench.accelerator.is_main_process:
        write(options.json, told, {"seconds": bench.clock.seconds, "machine": machine_facts(bench.accelerator)})


def asked(bench: Bench) -> tuple[list[str], list[int]]:
    """The questions whose gold passage is known, and the rows of these. Raises InputError where there are none."""
    columns = bench.task.questions[:]
    known = [
        (question, bench.builder.row_of[gold])
        for question, gold in zip(columns["question"], columns["passage_id"], strict=True)
        if gold in bench.builder.row_of
    ]
    if not known:
        raise InputError(
            f"Expected questions whose gold passage is known, found none among {len(columns['id'])} of {bench.task.name}: give "
            "questions with a context or a passage_id column."
        )
    return [question for question, _ in known], [row for _, row in known]


def find(bench: Bench, pair: Pair, questions: list[str]) -> tuple[dict[str, np.ndarray], dict[str, dict | str]]:
    """The rows found in every way, and the weights of the sums, or why there is no before."""
    options = bench.options
    untuned = load_base(options.model, pair, bench.base_names(), bench.accelerator.device)
    weights: dict[str, dict | str] = {}
    sides = [(AFTER, pair)]
    if options.model == "embedded":
        sides = [(BEFORE, pair)]
    elif isinstance(untuned, str):
        weights["no before"] = untuned
    else:
        sides = [(BEFORE, untuned), (AFTER, pair)]
    words = lambda texts: {"words (BM25)": bench.lexical.search(texts, DEPTH)[1]}  # noqa: E731
    found = search_all(bench.accelerator, questions, words, "searching by words")
    for when, side in sides:
        search = ways(bench, side, when, weights)
        with bench.clock.timed(f"searching, {when}"):
            found |= search_all(bench.accelerator, questions, search, f"searching by vectors, {when}")
    return found, weights


def tables_of(told: dict) -> str:
    """The tables in Markdown."""
    best = told["tests"][0]["first"]  # the sum, after training if there is an after
    lines = [
        f"# Passages found for {told['task']} by {told['model']}",
        f"{told['questions']} questions with a known gold passage, {told['passages']} passages. Percent, with 95 % bootstrap intervals.",
        score_table(told["scores"], FOUND),
        "What a cosine of 1 and a point of shared rarity are worth in BM25 points: "
        + "; ".join(
            f"{when} {weight['vectors']:g} and {weight['sentence_words']:g}"
            for when, weight in told["weights"].items()
            if not isinstance(weight, str)
        )
        + ".",
        "Difference in points, its 95 % interval, and the share p of the resamples in which it is not better (paired bootstrap):",
        test_table(told["tests"], best),
        test_table(told["tests"], f"vectors, {AFTER}"),
        f"There is no before: {told['weights']['no before']}." if "no before" in told["weights"] else "",
    ]
    return "\n\n".join(line for line in [*lines, *told["notes"]] if line) + "\n"


def write(out: Path, told: dict, times: dict) -> None:
    """OUT, its tables on the screen and beside it, and the times."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    out.with_suffix(".timings.json").write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")
    tables = tables_of(told)
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
