"""Bytes of memory and seconds that searching by words costs a passage: the unit costs of docs/scaling.md.

    python benchmarks/memory.py passages.jsonl --max_passages 20000

Each part is made anew and stays. "arrays" are the bytes of its tables, "highest so far" is the peak of the process's resident
memory over what it was at the start, lists that are needed only while a part is made included. Left out: vectors, whose size is
known without measuring.
"""

import argparse
import resource
import time
from collections.abc import Callable

import psutil

from cozyrag.data.passages import read_passages
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.passage_index import Passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("passages", metavar="FILE", help="file of passages, as --passages of train.py takes it")
    parser.add_argument("--max_passages", type=int, default=20_000, help="the first so many (default: %(default)s)")
    options = parser.parse_args()
    table = read_passages(options.passages)[0]
    table = table.select(range(min(options.max_passages, len(table))))
    held: dict = {}
    print(f"{len(table)} passages, {sum(map(len, table['text'])) / len(table):.0f} characters each")
    print(
        "| part | arrays, bytes a passage | highest so far, bytes a passage | microseconds a passage |\n|---|---:|---:|---:|"
    )
    start = psutil.Process().memory_info().rss
    step(held, "texts", lambda: Passages.of(table), len(table), start)
    step(held, "BM25", lambda: LexicalIndex(held["texts"].to_read(), stemmer="english"), len(table), start)
    step(
        held,
        "words of sentences",
        lambda: SentenceWords(held["texts"].titles, held["texts"].sentences(), stemmer="english"),
        len(table),
        start,
    )


def step(held: dict, name: str, make: Callable[[], object], count: int, start: int) -> None:
    """Make a part, keep it, and print a line."""
    clock = time.process_time()
    held[name] = make()
    spent = time.process_time() - clock
    arrays = 0 if name == "texts" else held[name].nbytes
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    print(f"| {name} | {arrays / count:,.0f} | {highest / count:,.0f} | {1e6 * spent / count:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
