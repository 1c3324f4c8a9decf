"""How good are the answers? Compares a pair with baselines; the results are reproducible.

    python -m benchmarks.quality.qa my-rag --suite quickstart --json qa.json
    python -m benchmarks.quality.qa embedded --suite squad --data FOLDER --index vectors --json squad.json
    python -m benchmarks.quality.qa user/my-rag --questions test.tsv --passages wiki.jsonl --limit 500 --json mine.json
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml -m benchmarks.quality.qa my-rag ...

Rows: this model; its untuned baseline; BM25 + generator (contexts by sparse search and the sparse filter); closed book
(no context); gold context (the gold passage, filtered to the same budget; if unknown, the best-ranked passage with an
answer). Every number has a 95 % bootstrap interval, and every two rows are compared by a paired bootstrap test.

Output files:
  OUT                   scores, tests, verdicts, leak audit; the same for any number of processes
  OUT.md                the same as tables (also printed)
  OUT.questions.jsonl   every question with the predictions, scores, and verdicts of all rows
  OUT.timings.json      seconds, questions/s, latency of single questions (p50, p95), memory of this machine
(OUT without its .json.) Vectors of passages are cached in --index and shared with retrieval.py; an interrupted run
resumes. ROUGE-L and BLEU need their packages (pip install "cozyrag[benchmarks]"); without them they are left out.
Left out: training, and search modes other than the pair's own (retrieval.py).
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict

from benchmarks.shared.bench import Bench, add_model_arguments, latencies, machine_facts, write_json
from benchmarks.shared.pairs import UNTUNED, Pair, load_base
from benchmarks.shared.qa_report import BM25, summarise, tables_of, write_questions
from benchmarks.shared.scoring import with_rouge_l
from benchmarks.shared.suites import add_task_arguments
from cozyrag.cli import entry_point
from cozyrag.models.generator import Decoding
from cozyrag.pair_evaluation import CLOSED, GOLD, MODEL, with_passages
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex


def compare(options: argparse.Namespace) -> None:
    """Load, search, answer, score, and report."""
    bench, pair = Bench.load(options)
    bench.introduce(pair, len(bench.task.questions))
    index = bench.index(pair)
    searcher = bench.searcher(pair, index, pair.mode, reranked=True)
    systems, weights = answer_all(bench, pair, index, searcher)
    latency = None
    if options.latency:
        if bench.accelerator.is_main_process:
            asked = bench.task.questions["question"][: options.latency]
            latency = latencies(single_answers(bench, pair, index, searcher), asked)
        bench.accelerator.wait_for_everyone()
    if bench.accelerator.is_main_process:
        write(bench, pair, {name: with_rouge_l(rows) for name, rows in systems.items()}, weights)
        write_times(bench, latency)


def write(bench: Bench, pair: Pair, systems: dict[str, list[dict]], weights: dict[str, dict | str]) -> None:
    """Write OUT, its tables, and all questions; print the tables."""
    out = bench.options.json
    bases = bench.base_names()
    results = summarise(bench.task, systems, model=pair.name, bases=bases, reading=bench.reading, weights=weights)
    write_json(out, results)
    tables = tables_of(results)
    out.with_suffix(".md").write_text(tables, encoding="utf-8")
    write_questions(out.with_suffix(".questions.jsonl"), bench.task, systems)
    bench.accelerator.print(f"\n{tables}")


def write_times(bench: Bench, latency: dict | None) -> None:
    """Write OUT.timings.json and print throughput and latency."""
    spent = sum(bench.clock.seconds[f"{part}: {MODEL}"] for part in ("retrieving", "answering"))
    rate = len(bench.task.questions) / spent
    facts = {
        "seconds": {part: round(seconds, 2) for part, seconds in bench.clock.seconds.items()},
        "questions_per_second": round(rate, 2),
        "one_at_a_time": latency,
        "machine": machine_facts(bench.accelerator),
    }
    write_json(bench.options.json.with_suffix(".timings.json"), facts)
    single = f"; single questions: p50 {latency['p50_ms']:.0f} ms, p95 {latency['p95_ms']:.0f} ms" if latency else ""
    bench.accelerator.print(
        f"{rate:.1f} questions/s in batches{single}. Written: {bench.options.json} and the files beside it."
    )


def answer_all(
    bench: Bench, pair: Pair, index: PassageIndex, searcher: Searcher
) -> tuple[dict[str, list[dict]], dict[str, dict | str]]:
    """The evaluated rows of every system, and their fusion weights or the reason why one is missing."""
    builder = bench.builder(pair, index)
    own = bench.contexts(searcher, builder, MODEL)
    best = [[row] if row >= 0 else [] for row in own["positive"]]
    tables = {MODEL: own, GOLD: with_passages(own, builder, searcher.encode, best)}
    tables[BM25] = bench.contexts(bench.searcher(pair, index, "bm25"), bench.sparse_builder, BM25)
    tables[CLOSED] = with_passages(own, bench.sparse_builder, None, [[] for _ in best])
    weights: dict[str, dict | str] = {MODEL: asdict(searcher.fusion_weights)}
    untuned = load_base(bench.options.model, pair, bench.base_names(), bench.accelerator.device)
    if isinstance(untuned, Pair):
        base_index = bench.index(untuned)
        base_searcher = bench.searcher(untuned, base_index, untuned.mode)
        tables[UNTUNED] = bench.contexts(base_searcher, bench.builder(untuned, base_index), UNTUNED)
        weights[UNTUNED] = asdict(base_searcher.fusion_weights)
    else:
        weights[UNTUNED] = untuned
    systems = {}
    for name in (name for name in (MODEL, UNTUNED, BM25, CLOSED, GOLD) if name in tables):
        answering = untuned if isinstance(untuned, Pair) and name == UNTUNED else pair
        threshold = None if name == CLOSED else answering.threshold
        systems[name] = bench.answer(answering.generator, tables[name], name, threshold)
    return systems, weights


def single_answers(
    bench: Bench, pair: Pair, index: PassageIndex, searcher: Searcher
) -> Callable[[list[str]], list[str]]:
    """A function that answers questions as the pair does: search, build the context, write. It needs one process."""
    builder = bench.builder(pair, index)
    limits = Decoding.of(bench.reading).limits() | {"no_answer_threshold": pair.threshold}

    def answer(questions: list[str]) -> list[str]:
        found = searcher.search(questions, bench.reading.top_k)
        contexts = builder.contexts(questions, found.rows.tolist(), found.vectors)
        return pair.generator.answer(questions, contexts, **limits)

    return answer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once (default: 64)")
    parser.add_argument(
        "--latency", type=int, default=50, metavar="N", help="time N single questions; 0: none (default: 50)"
    )
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
