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
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset
from latency import Clock, latencies, machine_facts
from pairs import Pair, Reading, base_names, load_base, load_pair, usual_weight
from scoring import check_packages, with_texts_scored
from searching import accelerator_of, stored_index
from suites import Task, add_task_arguments, load_task
from telling import BM25, CLOSED, GOLD, MODEL, UNTUNED, outcome, tables_of, write_questions

from cozyrag.cli import door
from cozyrag.contexts import CONTEXT_FEATURES, SEARCH_DEPTH, ContextMaker, attach_contexts, sentence_source
from cozyrag.evaluation import examine
from cozyrag.generator import Generator
from cozyrag.index import PassageIndex, Passages
from cozyrag.lexical import LexicalIndex
from cozyrag.metrics import contains_answer, normalize_answer
from cozyrag.search import Searcher

TOGETHER = 256  # questions searched for at once; the same for any number of processes, so that the last bits are too


@dataclass
class Bench:
    """What all rows share."""

    accelerator: Accelerator
    options: argparse.Namespace
    task: Task
    reading: Reading
    clock: Clock
    lexical: LexicalIndex
    maker: ContextMaker

    def index(self, pair: Pair) -> PassageIndex:
        """The pair's index of the task's passages: its own if these are they, else that of the vectors kept."""
        if pair.index is not None and pair.index.passages == self.maker.passages:
            return pair.index
        with self.clock.timed(f"passages of the {pair.name}" if pair.name == UNTUNED else "passages"):
            return stored_index(self.accelerator, self.options.index, self.task.passages, pair.retriever)

    def searcher(self, pair: Pair, index: PassageIndex, mode: str) -> Searcher:
        """The pair's search; where its weight was never chosen, it is now, on questions trained on, as a run does."""
        encode = lambda texts: pair.retriever.encode(texts, kind="query", batch_size=64)  # noqa: E731
        searcher = Searcher(index, self.lexical, encode=encode, mode=mode, weight=usual_weight(pair))
        if mode == "hybrid" and pair.weight is None and self.task.weigh is not None:
            columns = self.task.weigh[:]
            known = [
                (question, self.maker.row_of[gold])
                for question, gold in zip(columns["question"], columns["passage_id"], strict=True)
                if gold in self.maker.row_of
            ]
            if known:
                with self.clock.timed("weighing the searches"):
                    searcher.choose_weight(*(list(column) for column in zip(*known, strict=True)))
        searcher.weight = broadcast_object_list([searcher.weight])[0]
        return searcher

    def read_with(self, pair: Pair, index: PassageIndex, score_by: str) -> None:
        """Have the maker choose sentences this way, by this pair's vectors."""
        self.maker.score_by = score_by if pair.retriever.reads_sentences else "overlap"
        self.maker.sentence_vectors = sentence_source(index, pair.retriever)

    def contexts(self, searcher: Searcher, name: str) -> Dataset:
        """The contexts table of all questions; every process does some blocks of them and all get the whole."""
        questions, accelerator = self.task.questions, self.accelerator
        starts = range(0, len(questions), TOGETHER)[accelerator.process_index :: accelerator.num_processes]
        mine = [row for start in starts for row in range(start, min(start + TOGETHER, len(questions)))]
        with (
            tqdm(total=len(mine), desc=f"retrieving: {name}", unit="question") as bar,
            self.clock.timed(f"retrieving: {name}"),
        ):
            made = attach_contexts(
                questions.select(mine),
                search=lambda texts: searcher.search(texts, SEARCH_DEPTH),
                maker=self.maker,
                fingerprint=f"benchmark-{name.split()[0]}-{accelerator.process_index}",
                batch_size=TOGETHER,
                progress=bar.update,
            )
            parts = gather_object([(mine, made[:])])
        table: dict[str, list] = {column: [None] * len(questions) for column in CONTEXT_FEATURES}
        for rows, columns in parts:
            for column, values in columns.items():
                for row, value in zip(rows, values, strict=True):
                    table[column][row] = value
        return Dataset.from_dict(table, features=CONTEXT_FEATURES)

    def with_passages(self, contexts: Dataset, vectors_of, rows: list[list[int]]) -> Dataset:
        """The table with these passages read instead of those found."""
        columns = contexts[:]
        questions = columns["question"]
        made: list[str] = []
        for start in range(0, len(rows), TOGETHER):
            block = slice(start, start + TOGETHER)
            made += self.maker.contexts(questions[block], rows[block], vectors_of(questions[block]))
        held = [
            contains_answer(normalize_answer(text), answers)
            for text, answers in zip(made, columns["answers"], strict=True)
        ]
        return Dataset.from_dict(
            columns | {"rows": rows, "context": made, "answer_in_context": held}, features=CONTEXT_FEATURES
        )

    def answer(self, generator: Generator, contexts: Dataset, name: str, threshold: float | None) -> list[dict]:
        """Examined rows."""
        with self.clock.timed(f"answering: {name}"):
            _, rows = examine(
                self.accelerator,
                generator,
                contexts,
                top_k=self.reading.top_k,
                context_tokens=self.reading.context_tokens,
                answer_tokens=self.reading.answer_tokens,
                min_answer_tokens=self.reading.min_answer_tokens,
                no_repeat_ngram_size=self.reading.no_repeat_ngram_size,
                no_answer_threshold=threshold,
                batch_size=self.options.batch_size,
                desc=f"answering: {name}",
            )
        return rows


def compare(options: argparse.Namespace) -> None:
    """The story: load, search, answer, score, tell."""
    check_packages()
    accelerator, clock = accelerator_of(options.threads), Clock()
    pair, reading = load_pair(options.model, accelerator.device)
    task = load_task(options, pair.index)
    passages = Passages.of(task.passages)
    lexical = LexicalIndex(passages.to_read())
    maker = ContextMaker(
        passages, pair.generator.count_tokens, top_k=reading.top_k, budget=reading.context_tokens, score_by="overlap"
    )
    bench = Bench(accelerator, options, task, reading, clock, lexical, maker)
    bench.accelerator.print(
        f"{len(task.questions)} questions of {task.name}, {len(task.passages)} passages, model {pair.name}."
    )
    systems, weights = answer_all(bench, pair)
    if options.latency:
        asked = task.questions["question"][: options.latency]
        alone = latencies(one_by_one(bench, pair), asked) if accelerator.is_main_process else None
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write(bench, pair, {name: with_texts_scored(rows) for name, rows in systems.items()}, weights)
        write_times(bench, alone if options.latency else None)


def write(bench: Bench, pair: Pair, systems: dict[str, list[dict]], weights: dict) -> None:
    """OUT, its tables on the screen and beside it, and every question."""
    out = bench.options.json
    out.parent.mkdir(parents=True, exist_ok=True)
    bases = base_names(bench.options.model, bench.options.base_retriever, bench.options.base_generator)
    bases = ("embedded", "embedded") if bench.options.model == "embedded" else bases
    told = outcome(bench.task, systems, model=pair.name, bases=bases, reading=bench.reading, weights=weights)
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


def answer_all(bench: Bench, pair: Pair) -> tuple[dict[str, list[dict]], dict[str, float | str]]:
    """The examined rows of every system, and the weights of the searches, or why a system is not there."""
    index = bench.index(pair)
    searcher = bench.searcher(pair, index, pair.mode)
    bench.read_with(pair, index, bench.reading.context_filter)
    own = bench.contexts(searcher, MODEL)
    columns = own[:]
    best = [[row] if row >= 0 else [] for row in columns["positive"]]
    tables = {MODEL: own, GOLD: bench.with_passages(own, searcher.encode, best)}
    bench.read_with(pair, index, "overlap")
    tables[BM25] = bench.contexts(bench.searcher(pair, index, "bm25"), BM25)
    tables[CLOSED] = bench.with_passages(own, searcher.encode, [[] for _ in best])
    weights: dict[str, float | str] = {MODEL: searcher.weight}
    untuned = load_base(bench.options.model, pair, base_names(bench.options.model, bench.options.base_retriever, bench.options.base_generator), bench.accelerator.device)  # fmt: skip
    if isinstance(untuned, Pair):
        index = bench.index(untuned)
        searcher = bench.searcher(untuned, index, untuned.mode)
        bench.read_with(untuned, index, bench.reading.context_filter)
        tables[UNTUNED] = bench.contexts(searcher, UNTUNED)
        weights[UNTUNED] = searcher.weight
    else:
        weights[UNTUNED] = untuned
    order = [name for name in (MODEL, UNTUNED, BM25, CLOSED, GOLD) if name in tables]
    systems = {}
    for name in order:
        generator = untuned.generator if name == UNTUNED else pair.generator
        threshold = None if name in (UNTUNED, CLOSED) else pair.threshold
        systems[name] = bench.answer(generator, tables[name], name, threshold)
    return systems, weights


def one_by_one(bench: Bench, pair: Pair):
    """What answers questions as a user would have them answered: search, choose sentences, write."""
    index = bench.index(pair)
    searcher = bench.searcher(pair, index, pair.mode)
    bench.read_with(pair, index, bench.reading.context_filter)
    limits = {
        "context_tokens": bench.reading.context_tokens,
        "max_new_tokens": bench.reading.answer_tokens,
        "min_new_tokens": bench.reading.min_answer_tokens,
        "no_repeat_ngram_size": bench.reading.no_repeat_ngram_size,
        "no_answer_threshold": pair.threshold,
    }

    def answer(questions: list[str]) -> list[str]:
        found = searcher.search(questions, bench.reading.top_k)
        contexts = bench.maker.contexts(questions, found.rows.tolist(), found.vectors)
        return pair.generator.answer(questions, contexts, **limits)

    return answer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that this benchmark and retrieval.py share."""
    parser.add_argument("model", metavar="MODEL", help="output folder of a run, user/name on the Hub, or `embedded`")
    parser.add_argument("--json", metavar="OUT", type=Path, required=True, help="where the numbers go: OUT.json")
    parser.add_argument(
        "--index", metavar="FOLDER", type=Path, help="where vectors are kept (default: `vectors` beside OUT)"
    )
    parser.add_argument(
        "--base_retriever", metavar="NAME", help="what MODEL's retriever was (default: as its run noted)"
    )
    parser.add_argument(
        "--base_generator", metavar="NAME", help="what MODEL's generator was (default: as its run noted)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each process (default: its share of the cores)")


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
    options.index = options.index or options.json.parent / "vectors"
    door(lambda: compare(options))


if __name__ == "__main__":
    main()
