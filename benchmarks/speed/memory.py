"""How much memory and time does sparse search need? The unit costs of docs/scaling.md, per passage.

    python -m benchmarks.speed.memory passages.jsonl --max_passages 20000

Each part is built and kept. "arrays" are the bytes of its tables. "peak" is the peak resident memory of the process
beyond its start, with lists that are needed only while a part is built. Left out: vectors, whose size is known.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

from cozyrag.cli import entry_point
from cozyrag.data.passages import read_passages
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.passage_index import Passages

Part = TypeVar("Part", Passages, LexicalIndex, SentenceWords)


def measure(options: argparse.Namespace) -> None:
    """Build each part and print its row."""
    table = read_passages(options.passages)[0]
    table = table.select(range(min(options.max_passages, len(table))))
    count = len(table)
    print(f"{count} passages, {sum(map(len, table['text'])) / count:.0f} characters each")
    print("| part | arrays, bytes per passage | peak, bytes per passage | microseconds per passage |")
    print("|---|---:|---:|---:|")
    start = psutil.Process().memory_info().rss
    kept: list[object] = []  # so that every peak includes the parts before

    def add(name: str, build: Callable[[], Part]) -> Part:
        clock = time.process_time()
        part = build()
        spent = time.process_time() - clock
        kept.append(part)
        arrays = 0 if isinstance(part, Passages) else part.nbytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
        print(f"| {name} | {arrays / count:,.0f} | {peak / count:,.0f} | {1e6 * spent / count:,.0f} |", flush=True)
        return part

    texts = add("texts", lambda: Passages.of(table))
    add("BM25", lambda: LexicalIndex(texts.to_read(), stemmer="english"))
    add("words of sentences", lambda: SentenceWords(texts.titles, texts.sentences(), stemmer="english"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passages", metavar="FILE", help="passages, in any format of train.py")
    parser.add_argument("--max_passages", type=int, default=20_000, help="the first passages (default: 20,000)")
    options = parser.parse_args()
    entry_point(lambda: measure(options))


if __name__ == "__main__":
    main()
