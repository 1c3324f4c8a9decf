"""Bytes of memory and seconds that searching by words costs a passage: the unit costs of docs/scaling.md.

    python benchmarks/memory.py passages.jsonl --max_passages 20000

Each part is made anew and stays; resident memory is looked at in between, so the figures hold what the process keeps, peaks too
where they are larger. Left out: vectors, whose size is known without measuring.
"""

import argparse
import gc
import resource
import time
from collections.abc import Callable

import psutil

from cozyrag.index import Passages
from cozyrag.lexical import LexicalIndex, SentenceWords
from cozyrag.passages import read_passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("passages", metavar="FILE", help="file of passages, as --passages of train.py takes it")
    parser.add_argument("--max_passages", type=int, default=20_000, help="the first so many (default: %(default)s)")
    options = parser.parse_args()
    table = read_passages(options.passages)[0]
    table = table.select(range(min(options.max_passages, len(table))))
    held: dict[str, object] = {}
    print(f"{len(table)} passages, {sum(map(len, table['text'])) / len(table):.0f} characters each")
    print("| part | kept, bytes a passage | highest so far, bytes a passage | microseconds a passage |\n|---|---:|---:|---:|")
    start = psutil.Process().memory_info().rss
    step(held, "texts", lambda: Passages(table).to_read(), len(table), start)
    step(held, "BM25", lambda: LexicalIndex(held["texts"], stemmer="english"), len(table), start)
    sentences = [text.split(". ") for text in table["text"]]
    step(held, "words of sentences", lambda: SentenceWords(table["title"], sentences, stemmer="english"), len(table), start)


def step(held: dict[str, object], name: str, make: Callable[[], object], count: int, start: int) -> None:
    """Make a part, keep it, and print a line."""
    before, clock = psutil.Process().memory_info().rss, time.process_time()
    held[name] = make()
    spent = time.process_time() - clock
    gc.collect()
    kept = psutil.Process().memory_info().rss - before
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    print(f"| {name} | {kept / count:,.0f} | {highest / count:,.0f} | {1e6 * spent / count:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
