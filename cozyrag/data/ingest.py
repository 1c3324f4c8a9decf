"""`cozyrag passages`: any corpus in, one file of passages out.

It reads what holds many articles itself, gives batches of articles and of files to worker processes (ingest_worker.py), and puts
their parts together (ingest_assemble.py). Memory stays the same however large the corpus: a few batches, and some tens of bytes for
each passage while repeats are looked for. Left out: downloading anything but Hub datasets.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from cozyrag.data.documents import FORMATS, HUB, Source, find_sources, read_container
from cozyrag.data.ingest_assemble import Summary, assemble, check_output, summary_path
from cozyrag.data.ingest_worker import Batch, Cutting, make_part, read_counts
from cozyrag.data.rows import SHOWN, BadRows
from cozyrag.errors import InputError

CHARACTERS = 2_000_000  # of text in one batch
FILES = 2_000  # in one batch at most
VERSION = 1  # of what a part holds: parts of another version are not gone on from

DESCRIPTION = """\
Cut texts into passages that can be searched: whole sentences, about 100 words each, with the title of their article.

IN is a file, a folder or a Hub dataset, and there may be several:
  WikiExtractor output (<doc ...> or --json)       .txt .md .html .pdf files, and folders of them
  .jsonl .csv .tsv .json .parquet with the columns title and text (--title_column, --text_column); also .gz, .bz2
  user/name or user/name:config on the Hub, read as it arrives

Texts that repeat an earlier one are left out. A passage's id is made from its text: a second run gives the same ids. A run
that was stopped goes on where it was when it is started again with the same words. What was read, made and left out, and
why, is printed and written beside the output (NAME.summary.json).
"""
EXAMPLES = """\
examples:
  cozyrag passages notes/ --output passages.jsonl
  cozyrag passages extracted/ --output wiki.parquet --near_duplicates
  cozyrag passages wikimedia/wikipedia:20231101.de --output wiki-de.parquet --workers 8
"""


@dataclass(frozen=True)
class _Reading:
    """How containers are read, see `read_container`."""

    split: str
    title_column: str
    text_column: str


def passages(arguments: Sequence[str]) -> None:
    """The command. Raises InputError for what the user can put right; what has been made until then is kept for a later run."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    check_output(options.output, options.inputs)
    folder = Path(f"{options.output}.parts")
    ignored = [options.output, str(summary_path(options.output)), *_below(folder)]
    sources, unknown = find_sources(options.inputs, format=options.format, ignore=ignored)
    cutting = Cutting(options.words, options.overlap, options.min_characters, options.near_duplicates is not None)
    bad = BadRows()
    reading = _Reading(options.split, options.title_column, options.text_column)
    parts = gather(sources, folder, cutting, reading, workers=options.workers, bad=bad)
    for part in parts:
        _add_bad(bad, part)
    report = bad.finish("These inputs", options.skip_bad_rows)
    summary = Summary(files=len(sources), unknown_files=len(unknown), unknown_files_first=unknown[:SHOWN], settings=vars(options))  # fmt: skip
    summary.bad_rows, summary.bad_rows_first = bad.count, bad.first
    assemble(parts, options.output, near=options.near_duplicates, keep_repeats=options.keep_duplicates, summary=summary)
    if not summary.passages:
        os.remove(options.output)
        raise InputError(f"Expected texts of at least {cutting.min_characters} characters in these inputs, found none. Check them, or lower --min_characters.")  # fmt: skip
    summary.seconds, summary.cpu_seconds = round(time.perf_counter() - started, 2), _cpu_seconds()
    summary_path(options.output).write_text(json.dumps(vars(summary), indent=2, ensure_ascii=False) + "\n", "utf-8")
    shutil.rmtree(folder)
    print(summary.lines(options.output) + (f"\n{report}" if report else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cozyrag passages",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN", help="file, folder or Hub dataset")
    add("--output", required=True, metavar="FILE", help=".parquet, .jsonl or .jsonl.gz; an older one is replaced")
    add("--format", choices=FORMATS, help="what all inputs are, where names and first bytes do not tell")
    add("--words", type=_at_least(10), default=100, help="wanted words of a passage (default: 100)")
    add("--overlap", type=_at_least(0), default=0, metavar="SENTENCES", help="sentences that a passage repeats from the one before it in its section (default: 0)")  # fmt: skip
    add("--min_characters", type=_at_least(1), default=30, help="shorter passages are left out (default: 30)")
    add("--near_duplicates", type=_share, nargs="?", const=0.8, metavar="SHARE", help="leave out passages that share this much of their runs of 8 characters with an earlier one (default without it: only equal ones; with it: 0.8)")  # fmt: skip
    add("--keep_duplicates", action="store_true", help="leave nothing out that repeats; later ones get numbered ids")
    add("--split", default="train", help="split of Hub datasets (default: train)")
    add("--title_column", default="title", help="default: title")
    add("--text_column", default="text", help="default: text")
    add("--skip_bad_rows", action="store_true", help="count, list and skip what cannot be read instead of stopping")
    add(
        "--workers", type=_at_least(1), default=_cores(), help="processes that cut (default: the cores of this machine)"
    )
    return parser


def _at_least(least: int):
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
        return int(text)

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, found {text!r}")
    return value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _below(folder: Path) -> list[str]:
    return [str(path) for path in folder.glob("*")]


def _cpu_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return round(sum(os.times()[:4]), 2)


def _add_bad(bad: BadRows, part: Path) -> None:
    counts = read_counts(part)
    bad.first += (counts.bad_first or [])[: SHOWN - len(bad.first)]
    bad.count += counts.bad


# ------------------------------------------------------------------------------------------------- giving out the work


def gather(
    sources: Sequence[Source], folder: Path, cutting: Cutting, reading: _Reading, *, workers: int, bad: BadRows
) -> list[Path]:
    """Cut everything into part files in `folder`; returns them in the order of the sources. Parts already there are kept."""
    folder.mkdir(exist_ok=True)
    there, parts = {path.name for path in folder.glob("*.parquet")}, []
    size = None if any(source.format == HUB for source in sources) else sum(source.size for source in sources)
    with tqdm(total=size, desc="reading and cutting", unit="B", unit_scale=True) as bar, _Workers(workers, bar) as pool:
        if there:
            bar.write(f"Going on: {len(there)} parts are there already.", file=sys.stderr)
        for batch in _batches(sources, cutting, reading, bad):
            batch = replace(batch, path=str(folder / f"{batch.path}.parquet"))
            parts.append(Path(batch.path))
            if parts[-1].name in there:
                bar.update(batch.size)
            else:
                pool.submit(batch)
    return parts


class _Workers:
    """Processes that make parts, or this process itself where one is enough; at most two batches wait for each."""

    def __init__(self, count: int, bar: tqdm):
        self.count, self.bar, self.waiting = count, bar, set[Future]()
        # A fresh interpreter for each: forking a process that has threads (Arrow's) can hang.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(count, mp_context=context) if count > 1 else None

    def submit(self, batch: Batch) -> None:
        if self.pool is None:
            self.bar.update(make_part(batch))
            return
        while len(self.waiting) >= self.count + 2:
            self._collect(FIRST_COMPLETED)
        self.waiting.add(self.pool.submit(make_part, batch))

    def _collect(self, until: str) -> None:
        done, self.waiting = wait(self.waiting, return_when=until)
        for future in done:
            try:
                self.bar.update(future.result())
            except BrokenProcessPool as problem:
                raise InputError(
                    "A worker process was ended from outside, most likely for want of memory. Run the same command again, "
                    "perhaps with fewer --workers: it goes on where it was."
                ) from problem

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and self.waiting:
                self._collect("ALL_COMPLETED")
        finally:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)


def _batches(sources: Sequence[Source], cutting: Cutting, reading: _Reading, bad: BadRows) -> Iterator[Batch]:
    """The work in pieces of like size; the path of each is its name, made of what it depends on."""
    documents: list[Source] = []
    for source in sources:
        if source.is_document:
            documents.append(source)
            if len(documents) == FILES or sum(each.size for each in documents) >= CHARACTERS:
                yield _of_files(documents, cutting)
                documents = []
        else:
            yield from _of_container(source, cutting, reading, bad)
    if documents:
        yield _of_files(documents, cutting)


def _of_files(files: list[Source], cutting: Cutting) -> Batch:
    return Batch(_name(cutting, files), cutting, files=tuple(files), size=sum(file.size for file in files))


def _of_container(source: Source, cutting: Cutting, reading: _Reading, bad: BadRows) -> Iterator[Batch]:
    read = [0]  # bytes since the last batch: they count as done when its part is

    def told(count: int) -> None:
        read[0] += count

    articles = read_container(source, **vars(reading), bad=bad, told=told)
    for number, held in enumerate(_grouped(articles)):
        size, read[0] = read[0], 0
        yield Batch(_name(cutting, [source, reading, number]), cutting, articles=held, size=size)


def _grouped(articles: Iterable) -> Iterator[list]:
    held, size = [], 0
    for article in articles:
        held.append(article)
        size += sum(len(text) for _, text in article.sections)
        if size >= CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _name(cutting: Cutting, facts: Sequence) -> str:
    return hashlib.sha1(repr((VERSION, cutting, facts)).encode(), usedforsecurity=False).hexdigest()[:20]
