"""`cozyrag passages`: any corpus in, one file of passages out.

It reads what holds many articles itself, gives batches of articles and of files to worker processes (ingest_worker.py), and puts
their parts together (ingest_assemble.py). Memory stays the same however large the corpus: a few batches, and some tens of bytes for
each passage while repeats are looked for. Left out: downloading anything but Hub datasets.
"""

import hashlib
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from cozyrag.data.documents import HUB, Source, read_container
from cozyrag.data.ingest_worker import Batch, Cutting, make_part
from cozyrag.data.rows import BadRows
from cozyrag.errors import InputError

CHARACTERS = 2_000_000  # of text in one batch
FILES = 2_000  # in one batch at most
VERSION = 1  # of what a part holds: parts of another version are not gone on from


@dataclass(frozen=True)
class Reading:
    """How containers are read, see `read_container`."""

    split: str
    title_column: str
    text_column: str


def gather(
    sources: Sequence[Source], folder: Path, cutting: Cutting, reading: Reading, *, workers: int, bad: BadRows
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


def _batches(sources: Sequence[Source], cutting: Cutting, reading: Reading, bad: BadRows) -> Iterator[Batch]:
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


def _of_container(source: Source, cutting: Cutting, reading: Reading, bad: BadRows) -> Iterator[Batch]:
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
