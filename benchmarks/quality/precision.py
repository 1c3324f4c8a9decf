"""Does a pair answer as well in bf16 as in float32? The same weights search and answer the same questions in both.

    python -m benchmarks.quality.precision my-rag --suite squad --data FOLDER --limit 1000 --json precision.json

Passages and questions are encoded, contexts chosen and answers written in each precision. The table shows the scores,
their paired differences with 95 % bootstrap intervals, and how many answers are the same. bf16 works on any machine, on
a CPU without it slowly. Left out: speed (speed/precision.py), training.
"""

import argparse

from benchmarks.shared.bench import Bench, add_model_arguments, write_json
from benchmarks.shared.corpus import stored_index
from benchmarks.shared.pairs import Pair, load_pair
from benchmarks.shared.scoring import paired_tests, test_table
from benchmarks.shared.suites import add_task_arguments
from cozyrag.cli import entry_point
from cozyrag.evaluation.scoring import score_table, scores_of
from cozyrag.models.int8_encoding import BF16, FLOAT32

METRICS = ("em", "f1", "recall@1", "recall@5", "answer_in_context")


def evaluate(bench: Bench, pair: Pair, precision: str) -> list[dict]:
    """The evaluated rows of the pair, which infers in that precision."""
    pair.retriever.precision = precision
    folder = bench.options.index / precision
    index = stored_index(bench.accelerator, folder, bench.task.passages, pair.retriever)
    searcher = bench.searcher(pair, index, pair.mode, reranked=True)
    contexts = bench.contexts(searcher, bench.builder(pair, index), precision)
    return bench.answer(pair.generator, contexts, precision, pair.threshold)


def compare(options: argparse.Namespace) -> None:
    """Answer in both precisions, write the scores, and print the tables."""
    bench, pair = Bench.load(options, FLOAT32)
    bench.introduce(pair, len(bench.task.questions))
    systems = {FLOAT32: evaluate(bench, pair, FLOAT32)}
    systems[BF16] = evaluate(bench, load_pair(options.model, bench.accelerator.device, BF16)[0], BF16)
    if not bench.accelerator.is_main_process:
        return
    names = [name for name in METRICS if all(name in row for rows in systems.values() for row in rows)]
    scores = {name: scores_of(rows, names) for name, rows in systems.items()}
    tests = paired_tests({name: systems[name] for name in (BF16, FLOAT32)}, names)
    same = sum(one["prediction"] == other["prediction"] for one, other in zip(*systems.values(), strict=True))
    write_json(options.json, {"scores": scores, "tests": tests, "same_answers": same, "questions": len(systems[BF16])})
    print(f"\n{score_table(scores, names)}\n\n{test_table(tests, BF16)}\n")
    print(f"{same} of {len(systems[BF16])} answers are the same.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_task_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered at once (default: 64)")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
