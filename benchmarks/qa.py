"""How well a pair answers, beside what it should be compared with, in numbers that come out the same every time.

    python benchmarks/qa.py my-rag --suite quickstart --json qa.json
    python benchmarks/qa.py embedded --suite squad --data FOLDER --index vectors --json squad.json
    python benchmarks/qa.py user/my-rag --questions test.tsv --passages wiki.jsonl --limit 500 --json mine.json
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml benchmarks/qa.py my-rag --suite quickstart --json qa.json

Rows: this model; the untuned pair it was trained from; BM25 with this model's generator (contexts by words alone); closed
book (no context); gold context (the gold passage alone, filtered to the same budget; where none is known, the best-ranked
passage found that holds an answer). Every number has a 95 % bootstrap interval, every two rows a paired test.

What it writes:
  OUT                   scores, tests, verdicts, leak audit: the same for the same models and questions, however many processes
  OUT.md                the same as tables (printed too)
  OUT.questions.jsonl   every question with all predictions, scores and verdicts
  OUT.timings.json      seconds, questions/s, latency of one question at a time (p50, p95), memory: those of this machine
(OUT without its .json.) Vectors of passages are kept in --index by retriever, shared with retrieval.py; an interrupted run goes on
where it was. Left out: training, and searching in more ways than the pair does (retrieval.py).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from bench import Bench, add_model_arguments, open_bench
from latency import latencies, machine_facts
from pairs import Pair, load_base
from scoring import check_packages, with_texts_scored
from suites import add_task_arguments
from telling import BM25, CLOSED, GOLD, MODEL, UNTUNED, outcome, tables_of, write_questions

from cozyrag.cli import entry_point
from cozyrag.models.generator import Decoding
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex


def compare(options: argparse.Namespace) -> None:
    """The story: load, search, answer, score, tell."""
    check_packages()
    bench, pair = open_bench(options)
    bench.accelerator.print(
        f"{len(bench.task.questions)} questions of {bench.task.name}, {len(bench.task.passages)} passages, model {pair.name}."
    )
    index = bench.index(pair)
    searcher = bench.searcher(pair, index, pair.mode)
    systems, weights = answer_all(bench, pair, index, searcher)
    if options.latency:
        asked = bench.task.questions["question"][: options.latency]
        answer = one_by_one(bench, pair, index, searcher)
        alone = latencies(answer, asked) if bench.accelerator.is_main_process else None
        bench.accelerator.wait_for_everyone()
    if bench.accelerator.is_main_process:
        write(bench, pair, {name: with_texts_scored(rows) for name, rows in systems.items()}, weights)
        write_times(bench, alone if options.latency else None)


def write(bench: Bench, pair: Pair, systems: dict[str, list[dict]], weights: dict) -> None:
    """OUT, its tables on the screen and beside it, and every question."""
    out = bench.options.json
    out.parent.mkdir(parents=True, exist_ok=True)
    told = outcome(
        bench.task, systems, model=pair.name, bases=bench.base_names(), reading=bench.reading, weights=weights
    )
    out.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tables = tables_of(told)
    out.with_suffix(".md").write_text(tables, encoding="utf-8")
    write_questions(out.with_suffix(".questions.jsonl"), bench.task, systems)
    bench.accelerator.print(f"\n{tables}")


def write_times(bench: Bench, alone: dict | None) -> None:
    """Seconds and speeds into OUT.timings.json; the two that matter on the screen."""
    spent = sum(bench.clock.seconds[f"{part}: {MODEL}"] for part in ("retrieving", "answering"))
    rate = len(bench.task.questions) / spent
    facts = {
        "seconds": {part: round(seconds, 2) for part, seconds in bench.clock.seconds.items()},
        "questions_per_second": round(rate, 2),
        "one_at_a_time": alone,
        "machine": machine_facts(bench.accelerator),
    }
    out = bench.options.json.with_suffix(".timings.json")
    out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    one = f"; alone p50 {alone['p50_ms']:.0f} ms, p95 {alone['p95_ms']:.0f} ms a question" if alone else ""
    bench.accelerator.print(
        f"{rate:.1f} questions/s together{one}. Written: {bench.options.json} and the files beside it."
    )


def answer_all(
    bench: Bench, pair: Pair, index: PassageIndex, searcher: Searcher
) -> tuple[dict[str, list[dict]], dict[str, float | str]]:
    """The examined rows of every system, and the weights of the searches, or why a system is not there."""
    bench.read_with(pair, index, bench.reading.context_filter)
    own = bench.contexts(searcher, MODEL)
    columns = own[:]
    best = [[row] if row >= 0 else [] for row in columns["positive"]]
    tables = {MODEL: own, GOLD: bench.with_passages(own, searcher.encode, best)}
    bench.read_with(pair, index, "sparse")
    tables[BM25] = bench.contexts(bench.searcher(pair, index, "bm25"), BM25)
    tables[CLOSED] = bench.with_passages(own, lambda texts: None, [[] for _ in best])
    weights: dict[str, dict | str] = {MODEL: asdict(searcher.weights)}
    untuned = load_base(bench.options.model, pair, bench.base_names(), bench.accelerator.device)
    if isinstance(untuned, Pair):
        index = bench.index(untuned)
        searcher = bench.searcher(untuned, index, untuned.mode)
        bench.read_with(untuned, index, bench.reading.context_filter)
        tables[UNTUNED] = bench.contexts(searcher, UNTUNED)
        weights[UNTUNED] = asdict(searcher.weights)
    else:
        weights[UNTUNED] = untuned
    order = [name for name in (MODEL, UNTUNED, BM25, CLOSED, GOLD) if name in tables]
    systems = {}
    for name in order:
        generator = untuned.generator if name == UNTUNED else pair.generator
        threshold = None if name in (UNTUNED, CLOSED) else pair.threshold
        systems[name] = bench.answer(generator, tables[name], name, threshold)
    return systems, weights


def one_by_one(bench: Bench, pair: Pair, index: PassageIndex, searcher: Searcher) -> Callable[[list[str]], list[str]]:
    """What answers questions as a user would have them answered: search, choose sentences, write. One process can do it alone."""
    bench.read_with(pair, index, bench.reading.context_filter)
    limits = Decoding.of(bench.reading).limits() | {"no_answer_threshold": pair.threshold}

    def answer(questions: list[str]) -> list[str]:
        found = searcher.search(questions, bench.reading.top_k)
        contexts = bench.builder.contexts(questions, found.rows.tolist(), found.vectors)
        return pair.generator.answer(questions, contexts, **limits)

    return answer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once (default: 64)")
    parser.add_argument(
        "--latency",
        type=int,
        default=50,
        metavar="N",
        help="time N questions asked one at a time, 0: none (default: 50)",
    )
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
