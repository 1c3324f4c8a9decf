"""How much memory and time does sparse search need? The unit costs of docs/scaling.md, per passage.

    python -m benchmarks.speed.memory passages.jsonl --max_passages 20000

Each part is built and kept. "arrays" are the bytes of its tables in memory, "files" those on the disk. "peak" is the
peak resident memory of the process beyond its start, with the parts before, and lists that are needed only while a part
is built. Left out: vectors, whose size is known.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from cozyrag.cli import entry_point
from cozyrag.data.passages import read_passages
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.passage_index import Passages
from cozyrag.retrieval.words_on_disk import WordsOnDisk
from cozyrag.runtime.atomic_files import folder_bytes

Part = TypeVar("Part", Passages, LexicalIndex, SentenceWords, WordsOnDisk)


def measure(options: argparse.Namespace) -> None:
    """Build each part and print its row."""
    table = read_passages(options.passages)[0]
    table = table.select(range(min(options.max_passages, len(table))))
    count = len(table)
    print(f"{count} passages, {sum(map(len, table['text'])) / count:.0f} characters each")
    print("| part | arrays, bytes per passage | files | peak | microseconds per passage |")
    print("|---|---:|---:|---:|---:|")
    start = psutil.Process().memory_info().rss
    kept: list[object] = []  # so that every peak includes the parts before

    def add(name: str, build: Callable[[], Part], files: Path | None = None) -> Part:
        clock = time.process_time()
        part = build()
        spent = time.process_time() - clock
        kept.append(part)
        arrays = 0 if isinstance(part, Passages) else part.nbytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
        on_disk = folder_bytes(files) if files else 0
        figures = (arrays / count, on_disk / count, peak / count, 1e6 * spent / count)
        print(f"| {name} | {' | '.join(f'{figure:,.0f}' for figure in figures)} |", flush=True)
        return part

    texts = add("texts", lambda: Passages.of(table))
    with tempfile.TemporaryDirectory() as place:
        files = Path(place)
        add("words on the disk", lambda: WordsOnDisk.opened(files / "words", texts, stemmer="english"), files)
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
