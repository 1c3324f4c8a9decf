"""The task of one worker: a batch of articles becomes one complete part file of passages.

A separate module, so that a worker process imports little. The name of a part depends on its sources and settings, so a
stopped run finds its finished parts again. Left out: which passages repeat others, which only the whole corpus shows;
each passage carries a hash for that, and a signature if wanted.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cozyrag.data.chunking import LONGEST_WORD, cut_spans, join_sections, latin_length, without_long_words
from cozyrag.data.deduplication import BINS, signatures, text_hash
from cozyrag.data.documents import InputSource, read_document
from cozyrag.data.outline import Article
from cozyrag.data.rows import COLUMNS, BadRows, Columns
from cozyrag.data.sentences import Span
from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import replacing_file
from cozyrag.runtime.machine_faults import is_environment

TOGETHER = 2000  # passages held before they are written
TEXTS = ("title", "text", "source", "url")
KEPT = [*((name, pa.string()) for name in TEXTS), ("page", pa.int64())]  # as in the output
FIELDS = [*KEPT, ("hash", pa.uint64())]
SIGNATURE = ("signature", pa.binary(BINS))
Passage = tuple[str, str, str, str | None, int | None]  # as KEPT


@dataclass(frozen=True, slots=True)
class Cutting:
    """How to read containers (see `read_container`) and cut articles (see `cut`)."""

    words: int = 100
    overlap: int = 0
    min_characters: int = 30  # shorter passages are left out
    signed: bool = False  # add signatures, which find near duplicates
    split: str = "train"
    columns: Columns = COLUMNS
    delimiter: str | None = None


@dataclass(frozen=True, slots=True)
class WorkBatch:
    """Work for one worker: articles already read, or files of one article each; `size` is the bytes read for it."""

    path: str
    cutting: Cutting
    articles: Sequence[Article] = ()
    files: Sequence[InputSource] = ()
    size: int = 0


@dataclass
class Counts:
    """The input of a part. `words` are runs between spaces; `short` passages and `long_words` are left out."""

    articles: int = 0
    articles_without_text: int = 0
    words: int = 0
    short_passages: int = 0
    short_words: int = 0
    long_words: int = 0
    bad: int = 0
    bad_first: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_part(batch: WorkBatch) -> int:
    """Cut a batch and write its part file, renamed when complete; returns the size of the batch.

    It is not flushed to disk: its pages have checksums, and a damaged one is made again (see `is_intact`).
    """
    counts, bad = Counts(), BadRows()
    schema = pa.schema([*FIELDS, SIGNATURE] if batch.cutting.signed else FIELDS)
    how = {"compression": "zstd", "write_page_checksum": True}
    path = Path(batch.path)
    with replacing_file(path, flushed=False) as beside, pq.ParquetWriter(beside, schema, **how) as writer:
        held = list[Passage]()
        for article in _articles(batch, bad):
            held += _passages(article, batch.cutting, counts)
            if len(held) >= TOGETHER:
                writer.write_table(_table(held, schema))
                held = []
        writer.write_table(_table(held, schema))
        counts.bad, counts.bad_first, counts.notes = bad.count, bad.first, bad.notes
        writer.add_key_value_metadata({"counts": json.dumps(vars(counts))})
    return batch.size


def is_intact(path: Path) -> bool:
    """Whether a part file is what was written: after a power cut it may be cut or zeroed."""
    try:
        read_counts(path)
        pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if is_environment(error):
            raise
        return False
    return True


def read_counts(path: str | Path) -> Counts:
    """The counts of a part file."""
    return Counts(**json.loads(pq.read_metadata(path).metadata[b"counts"]))


@contextmanager
def one_bad_row(source: InputSource, bad: BadRows) -> Iterator[None]:
    """Record whatever the reader of a file raises as a bad row, so that the other files are read."""
    try:
        yield
    except InputError as error:
        bad.add(source.name, str(error).removeprefix(f"{source.name}: ").removeprefix(source.name).lstrip(", "))
    except MemoryError:
        raise
    except Exception as error:  # parsers raise anything for bytes that they do not expect
        bad.add(source.name, f"the reader failed ({type(error).__name__}: {error}), so it is read no further")


def _articles(batch: WorkBatch, bad: BadRows) -> Iterator[Article]:
    yield from batch.articles
    for source in batch.files:
        with one_bad_row(source, bad):
            yield read_document(source, bad.note)


def _passages(article: Article, cutting: Cutting, counts: Counts) -> list[Passage]:
    """The passages of an article; adds to `counts`."""
    made = list[Passage]()
    counts.articles += 1
    counts.articles_without_text += not any(text.strip() for _, text in article.sections)
    for path, text in join_sections(article.sections, least=cutting.words / 2, most=cutting.words):
        words = text.split()
        counts.words += len(words)
        pages = article.pages
        if max(map(len, words), default=0) > LONGEST_WORD:
            text, long_words = without_long_words(text)
            counts.long_words += long_words
            pages = () if long_words else pages  # unknown: the text behind them has moved
        title = " > ".join((article.title, *path) if article.title else path)
        spans = cut_spans(text, words=cutting.words, overlap=cutting.overlap)
        for (start, end), page in zip(spans, _pages(text, spans, pages), strict=True):
            passage = text[start:end].strip()
            if cutting.min_characters <= len(passage) or cutting.min_characters <= latin_length(passage):
                made.append((title, passage, article.source, article.url or None, page))
            else:
                counts.short_passages += 1
                counts.short_words += len(passage.split())
    return made


def _pages(text: str, spans: Sequence[Span], pages: Sequence[int]) -> list[int | None]:
    """The page on which each span begins (see `Article`), None without pages; an overlap may step back."""
    if not pages:
        return [None] * len(spans)
    at, before, found = 0, 0, list[int | None]()
    for start, _ in spans:
        before += len("".join(text[at:start].split())) - len("".join(text[start:at].split()))
        at = start
        found.append(bisect_right(pages, before))
    return found


def _table(passages: Sequence[Passage], schema: pa.Schema) -> pa.Table:
    texts = [each[1] for each in passages]
    columns = [pa.array([each[at] for each in passages], kind) for at, (_, kind) in enumerate(KEPT)]
    columns.append(pa.array([text_hash(text) for text in texts], pa.uint64()))
    if "signature" in schema.names:
        signs = pa.py_buffer(signatures(texts).tobytes())
        columns.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(BINS), len(texts), [None, signs]))
    return pa.table(columns, schema=schema)
