"""How well passages are found: by words, by vectors, by both added up and by both as ranks, before and after training.

    python benchmarks/retrieval.py my-rag --suite quickstart --json retrieval.json
    python benchmarks/retrieval.py embedded --suite squad --data FOLDER --index vectors --json squad.json
    python benchmarks/retrieval.py my-rag --questions test.tsv --passages wiki.jsonl --json mine.json

MODEL is a run's output folder, user/name on the Hub, or `embedded`. Prints recall@1/5/20, MRR@10, nDCG@10 and the hit rate among
the first 10 in percent with 95 % bootstrap intervals, over the questions whose gold passage is known. Only one passage is
gold for a question, so the hit rate is recall@10. The weight of the sum is the one the run chose; where none was, it is chosen on
training questions, as a run does. OUT is the same for the same models and questions, however many processes (accelerate
launch); OUT.timings.json is not. Vectors are kept in --index, shared with qa.py. Left out: answers (qa.py).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from latency import Clock, machine_facts
from pairs import Pair, base_names, load_base, load_pair
from qa import TOGETHER, Bench, add_model_arguments
from scoring import FOUND, paired_tests, score_table, scores_of, test_table
from searching import accelerator_of, reciprocal_rank_fusion
from suites import add_task_arguments, load_task

from cozyrag.cli import door
from cozyrag.contexts import ContextMaker
from cozyrag.errors import InputError
from cozyrag.index import Passages
from cozyrag.lexical import LexicalIndex
from cozyrag.metrics import hit_at, ndcg_at, ranks_of, recall_at, reciprocal_rank
from cozyrag.search import CANDIDATES, Searcher

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
    searcher: Searcher = bench.searcher(pair, bench.index(pair), "hybrid")
    weights[when] = searcher.weight

    def search(questions: list[str]) -> dict[str, np.ndarray]:
        found = searcher.search(questions, CANDIDATES)
        return {
            f"vectors, {when}": searcher.index.search(found.vectors, DEPTH)[1],
            f"both as ranks, {when}": reciprocal_rank_fusion(found.rankings, DEPTH),
            f"both, {when}": found.rows[:, :DEPTH],
        }

    return search


def compare(options: argparse.Namespace) -> None:
    """The story: load, search in every way, score, tell."""
    accelerator, clock = accelerator_of(options.threads), Clock()
    pair, reading = load_pair(options.model, accelerator.device)
    task = load_task(options, pair.index)
    passages = Passages.of(task.passages)
    maker = ContextMaker(passages, pair.generator.count_tokens, top_k=reading.top_k, budget=reading.context_tokens)
    lexical = LexicalIndex(passages.to_read())
    bench = Bench(accelerator, options, task, reading, clock, lexical, maker)
    columns = task.questions[:]
    known = [row for row, gold in enumerate(columns["passage_id"]) if gold in maker.row_of]
    if not known:
        raise InputError(
            f"Expected questions whose gold passage is known, found none among {len(columns['id'])} of {task.name}: give questions with "
            "a context or a passage_id column."
        )
    questions = [columns["question"][row] for row in known]
    gold = [maker.row_of[columns["passage_id"][row]] for row in known]
    accelerator.print(f"{len(known)} questions of {task.name}, {len(passages.ids)} passages, model {pair.name}.")
    names = base_names(options.model, options.base_retriever, options.base_generator)
    untuned = load_base(options.model, pair, names, accelerator.device)
    weights: dict[str, float | str] = {}
    found = search_all(accelerator, questions, lambda texts: {"words (BM25)": lexical.search(texts, DEPTH)[1]}, "words")
    sides = [(AFTER, pair)] if isinstance(untuned, str) else [(BEFORE, untuned), (AFTER, pair)]
    sides = [(BEFORE, pair)] if options.model == "embedded" else sides
    for when, side in sides:
        with clock.timed(f"searching, {when}"):
            found |= search_all(accelerator, questions, ways(bench, side, when, weights), f"vectors and both, {when}")
    systems = {
        name: [found_row(rows, row) for rows, row in zip(every, gold, strict=True)] for name, every in found.items()
    }
    told = {
        "benchmark": "retrieval",
        "model": pair.name,
        "task": task.name,
        "questions": len(known),
        "without_gold": len(columns["id"]) - len(known),
        "passages": len(passages.ids),
        "weights": weights | ({"untuned": untuned} if isinstance(untuned, str) else {}),
        "scores": {name: scores_of(rows, FOUND) for name, rows in systems.items()},
        "tests": paired_tests(dict(reversed(systems.items())), TESTED),
        "notes": task.notes,
    }
    if accelerator.is_main_process:
        write(options.json, told, {"seconds": clock.seconds, "machine": machine_facts(accelerator)})


def tables_of(told: dict) -> str:
    """The tables in Markdown."""
    best = told["tests"][0]["first"]  # the sum, after training if there is an after
    lines = [
        f"# Passages found for {told['task']} by {told['model']}",
        f"{told['questions']} questions with a known gold passage, {told['passages']} passages. Percent, with 95 % bootstrap intervals.",
        score_table(told["scores"], FOUND),
        "Weight of a cosine of 1 in BM25 points: "
        + ", ".join(f"{when} {weight:g}" for when, weight in told["weights"].items() if not isinstance(weight, str))
        + ".",
        "Difference in points, its 95 % interval, and the share p of the resamples in which it is not better (paired bootstrap):",
        test_table(told["tests"], best),
    ]
    return "\n\n".join([*lines, *told["notes"]]) + "\n"


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
    options.index = options.index or options.json.parent / "vectors"
    door(lambda: compare(options))


if __name__ == "__main__":
    main()
