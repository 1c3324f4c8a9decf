"""Cut any corpus into part files of passages, the first half of `cozyrag passages`.

Containers of many articles are read here; batches of articles and of files go to worker processes (ingest_worker.py),
and ingest_assemble.py joins their parts. Memory does not grow with the corpus: a few batches. Left out: downloads other
than Hub datasets.
"""

import hashlib
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cozyrag.data.documents import HUB, InputSource, read_container
from cozyrag.data.ingest_worker import Cutting, WorkBatch, is_intact, make_part, one_bad_row
from cozyrag.data.outline import Article
from cozyrag.data.rows import BadRows
from cozyrag.errors import InputError
from cozyrag.runtime.terminal import say_above_bars

CHARACTERS = 2_000_000  # of text in one batch
FILES = 2_000  # in one batch at most
VERSION = 7  # of the content of a part: parts of another version are not reused


def gather(sources: Sequence[InputSource], folder: Path, cutting: Cutting, *, workers: int, bad: BadRows) -> list[Path]:
    """Cut all sources into part files in `folder`, returned in the order of the sources; existing parts are kept."""
    folder.mkdir(exist_ok=True)
    existing, parts = {path.name for path in folder.glob("*.parquet") if is_intact(path)}, list[Path]()
    size = None if any(source.format == HUB for source in sources) else sum(source.size for source in sources)
    with tqdm(total=size, desc="reading and cutting", unit="B", unit_scale=True) as bar:
        if existing:
            say_above_bars(f"Resuming: {len(existing)} parts exist already.", file=sys.stderr)

        def missing() -> Iterator[WorkBatch]:
            for batch in _batches(sources, cutting, bad):
                parts.append(folder / f"{batch.path}.parquet")
                if parts[-1].name in existing:
                    bar.update(batch.size)
                else:
                    yield replace(batch, path=str(parts[-1]))

        _make_parts(missing(), workers, bar)
    return parts


def _make_parts(batches: Iterable[WorkBatch], workers: int, bar: tqdm) -> None:
    """Make the parts in this process, or in several; at most two batches more than workers are in the queue."""
    if workers == 1:
        for batch in batches:
            bar.update(make_part(batch))
        return
    # A fresh interpreter for each: forking a process that has threads (Arrow's) can hang.
    pool, waiting = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")), set[Future]()
    try:
        for batch in batches:
            while len(waiting) >= workers + 2:
                waiting = _collect(waiting, FIRST_COMPLETED, bar)
            waiting.add(pool.submit(make_part, batch))
        _collect(waiting, ALL_COMPLETED, bar)
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process was killed, most likely because memory ran out. Run the same command again, if necessary "
            "with fewer --workers: it resumes from the finished parts."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(futures: set[Future], until: str, bar: tqdm) -> set[Future]:
    """Wait, show what is done, and return the rest."""
    done, rest = wait(futures, return_when=until)
    for future in done:
        bar.update(future.result())
    return rest


def _batches(sources: Sequence[InputSource], cutting: Cutting, bad: BadRows) -> Iterator[WorkBatch]:
    """Batches of similar size; the path of each is a name made of everything its content depends on."""
    documents: list[InputSource] = []
    for source in sources:
        if source.is_document:
            documents.append(source)
        else:
            yield from _of_container(source, cutting, bad)
        if len(documents) == FILES or sum(each.size for each in documents) >= CHARACTERS:
            yield _of_files(documents, cutting)
            documents = []
    if documents:
        yield _of_files(documents, cutting)


def _of_files(files: list[InputSource], cutting: Cutting) -> WorkBatch:
    return WorkBatch(_name(cutting, files), cutting, files=tuple(files), size=sum(file.size for file in files))


def _of_container(source: InputSource, cutting: Cutting, bad: BadRows) -> Iterator[WorkBatch]:
    read: list[int] = []  # bytes since the last batch; they count as done when its part is
    articles = read_container(
        source,
        split=cutting.split,
        columns=cutting.columns,
        delimiter=cutting.delimiter,
        bad=bad,
        progress=read.append,
    )
    if source.format != HUB:  # a connection that breaks is no bad row: the command ends and can be resumed
        articles = _to_its_fault(source, articles, bad)
    for number, held in enumerate(_grouped(articles)):
        size = sum(read)
        read.clear()
        yield WorkBatch(_name(cutting, [source, number]), cutting, articles=held, size=size)


def _to_its_fault(source: InputSource, articles: Iterator[Article], bad: BadRows) -> Iterator[Article]:
    with one_bad_row(source, bad):
        yield from articles


def _grouped(articles: Iterable[Article]) -> Iterator[list[Article]]:
    held, size = list[Article](), 0
    for article in articles:
        held.append(article)
        size += sum(len(text) for _, text in article.sections)
        if size >= CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _name(cutting: Cutting, facts: Sequence) -> str:
    return hashlib.sha1(
        repr((VERSION, cutting, facts)).encode(errors="surrogateescape"), usedforsecurity=False
    ).hexdigest()[:20]
