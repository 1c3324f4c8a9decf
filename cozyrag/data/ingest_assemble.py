"""Join part files into one file of passages without duplicates, with ids and a summary that accounts for every word.

The id of a passage depends on its text alone, so a later run, another order of inputs or a change elsewhere gives the
same ids. A passage keeps its source, url and page; of equal texts, those of the first. Left out: reading and cutting
(ingest.py).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cozyrag.data.chunking import LONGEST_WORD
from cozyrag.data.deduplication import BINS, near_repeats, repeats
from cozyrag.data.ingest_worker import KEPT, read_counts
from cozyrag.data.passages import passage_id
from cozyrag.data.readers import kind_of
from cozyrag.data.streams import PACKED
from cozyrag.errors import InputError
from cozyrag.runtime.atomic_files import replacing_file, reserve
from cozyrag.runtime.json_lines import json_line, open_for_lines

OUTPUTS = (".parquet", ".jsonl", ".jsonl.gz")
ROWS = 4096  # rows written together
SCHEMA = pa.schema([("id", pa.string()), *KEPT])


@dataclass
class Summary:
    """What a run made of its inputs. Words are runs between spaces; `dropped` counts passages and words."""

    files: int = 0
    articles: int = 0
    words_read: int = 0
    passages: int = 0
    words: int = 0
    characters: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    articles_without_text: int = 0
    bad_rows: int = 0
    bad_rows_first: list[str] = field(default_factory=list)
    unknown_files: int = 0
    unknown_files_first: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def drop(self, why: str, passages: int, words: int) -> None:
        """Record what was left out."""
        if passages or words:
            self.dropped[why] = {"passages": passages, "words": words}

    def lines(self, output: str) -> str:
        """The summary as text."""
        average = self.words / max(self.passages, 1)
        lines = [
            f"{_count(self.articles, 'article')} of {_count(self.files, 'source')}, {_count(self.words_read, 'word')}.",
            f"{_count(self.passages, 'passage')}, {_count(self.words, 'word')}, {average:.0f} words each: {output}",
        ]
        for why, each in self.dropped.items():
            words = _count(each["words"], "word")
            passages = _count(each["passages"], "passage")
            lines.append(f"left out: {passages} ({why}), {words}" if each["passages"] else f"left out: {words} ({why})")
        if self.articles_without_text:
            lines.append(f"left out: {_count(self.articles_without_text, 'article')} without text")
        if self.unknown_files:
            more = self.unknown_files - len(self.unknown_files_first)
            listed = self.unknown_files_first + ([f"... and {more:,} more"] if more else [])
            lines.append("\n  ".join([f"not read: {_count(self.unknown_files, 'file')}", *listed]))
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def check_destination(output: str, inputs: Sequence[str], endings: Sequence[str] = OUTPUTS) -> None:
    """Raise InputError for an output of unknown format, in a missing folder, or that is an input itself."""
    path = os.path.abspath(output)
    if not output.lower().endswith(tuple(endings)):
        raise InputError(f"--output {output}: expected a name that ends in {' or '.join(endings)}. Choose one of them.")
    if not os.path.isdir(os.path.dirname(path)):
        raise InputError(f"--output {output}: there is no folder {os.path.dirname(path)}. Create it first.")
    if path in map(os.path.abspath, inputs):
        raise InputError(f"--output {output} is an input as well and would be overwritten. Choose another name.")


def summary_path(output: str) -> Path:
    """The path of the summary, beside the output."""
    name = output[: -len(".gz")] if output.lower().endswith(PACKED) else output
    return Path(f"{os.path.splitext(name)[0]}.summary.json")


def assemble(parts: Sequence[Path], output: str, *, near: float | None, keep_repeats: bool, summary: Summary) -> None:
    """Write the passages of all parts, in order, without those that repeat earlier ones; completes `summary`.

    near: share of common runs of characters from which a passage counts as a repeat of an earlier one; None: 1.
    """
    hashes = [pq.read_table(part, columns=["hash"])["hash"].to_numpy() for part in parts]
    same = repeats(np.concatenate(hashes or [np.zeros(0, np.uint64)]))
    kinds = {"equal to an earlier one": same}
    if near is not None:
        kinds["nearly equal to an earlier one"] = _near(parts, len(same), near) & ~same
    left_out = np.any(list(kinds.values()), axis=0) & (not keep_repeats)
    words = _written(parts, output, left_out, Counter() if keep_repeats else None, summary)
    counts = [read_counts(part) for part in parts]
    summary.articles = sum(each.articles for each in counts)
    summary.articles_without_text = sum(each.articles_without_text for each in counts)
    summary.words_read = sum(each.words for each in counts)
    summary.drop("too short", sum(each.short_passages for each in counts), sum(each.short_words for each in counts))
    summary.drop(f"longer than {LONGEST_WORD:,} characters", 0, sum(each.long_words for each in counts))
    if not keep_repeats:
        for why, rows in kinds.items():
            summary.drop(why, int(rows.sum()), int(words[rows].sum()))


def _near(parts: Sequence[Path], count: int, least: float) -> np.ndarray:
    """Which passages nearly repeat earlier ones; the signatures are on disk meanwhile."""
    path, start, shape = parts[0].with_name("signatures.bin"), 0, (max(count, 1), BINS)
    with path.open("wb") as file:
        reserve(file, shape[0] * shape[1])
    signs = np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
    for part in parts:
        column = pq.read_table(part, columns=["signature"])["signature"].combine_chunks()
        rows = np.frombuffer(column.buffers()[1], dtype=np.uint8)[: len(column) * BINS].reshape(-1, BINS)
        signs[start : start + len(rows)] = rows
        start += len(rows)
    return near_repeats(signs[:count], least)


def _written(
    parts: Sequence[Path], output: str, left_out: np.ndarray, seen: Counter[str] | None, summary: Summary
) -> np.ndarray:
    """Write the output, renamed when complete; returns the words of every passage, kept or not.

    Raises InputError if none is left.
    """
    words, row = np.zeros(len(left_out), dtype=np.int32), 0
    with replacing_file(Path(output)) as beside, _writer(beside, output) as write:
        for batch in _batches(parts):
            texts = batch["text"].to_pylist()
            counts = [len(text.split()) for text in texts]
            words[row : row + len(texts)] = counts
            kept = [i for i in range(len(texts)) if not left_out[row + i]]
            ids = pa.array([_id(texts[i], seen) for i in kept], pa.string())
            write(pa.Table.from_arrays([ids, *batch.take(pa.array(kept, pa.int64())).columns], schema=SCHEMA))
            summary.passages += len(kept)
            summary.words += sum(counts[i] for i in kept)
            summary.characters += sum(len(texts[i]) for i in kept)
            row += len(texts)
        if not summary.passages:
            first = summary.bad_rows_first
            skipped = f" {summary.bad_rows:,} bad rows were skipped, the first: {first[0]}." if first else ""
            raise InputError(
                f"Expected texts of at least {summary.settings['min_characters']} characters in these inputs, found "
                f"none. Check them, or lower --min_characters.{skipped}"
            )
    return words


def _id(text: str, seen: Counter[str] | None) -> str:
    """The id of a text; if texts may repeat, `seen` counts them and later ones get a number."""
    name = passage_id(text)
    if seen is None:
        return name
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _batches(parts: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for part in parts:
        yield from pq.ParquetFile(part).iter_batches(batch_size=ROWS, columns=[name for name, _ in KEPT])


@contextmanager
def _writer(path: Path, output: str) -> Iterator[Callable[[pa.Table], object]]:
    """A function that writes tables in the format given by the name of the output."""
    if kind_of(output) == ".parquet":
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as parquet:
            yield parquet.write_table
        return
    with open_for_lines(path, packed=output.lower().endswith(".gz")) as file:
        yield lambda table: file.writelines(map(_line, table.to_pylist()))


def _line(row: dict[str, str | int | None]) -> str:
    return json_line({name: value for name, value in row.items() if value is not None})
