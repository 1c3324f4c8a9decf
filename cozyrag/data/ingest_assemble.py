"""From parts to one file of passages: repeats left out, ids given, and a summary of what became of every word.

A text's id is made from the text itself, so that a later run, another order of inputs or a change elsewhere gives the same
ids. Left out: reading and cutting (ingest.py), and what is done with passages later.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cozyrag.data.deduplication import BINS, near_repeats, repeats
from cozyrag.data.ingest_worker import read_counts
from cozyrag.data.passages import passage_id
from cozyrag.data.readers import kind_of
from cozyrag.data.streams import PACKED
from cozyrag.errors import InputError

OUTPUTS = (".parquet", ".jsonl", ".jsonl.gz")
ROWS = 4096  # rows written together
SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


@dataclass
class Summary:
    """What a run made of its inputs. Words are runs of characters between spaces; `dropped` has passages and their words."""

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
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def drop(self, why: str, passages: int, words: int) -> None:
        """Note passages that were left out."""
        if passages:
            self.dropped[why] = {"passages": passages, "words": words}

    def lines(self, output: str) -> str:
        """The summary for people."""
        told = [
            f"{self.articles:,} articles of {self.files:,} sources, {self.words_read:,} words.",
            f"{self.passages:,} passages, {self.words:,} words, {self.words / max(self.passages, 1):.0f} words each: {output}",
        ]
        told += [f"left out: {each['passages']:,} passages ({why}), {each['words']:,} words" for why, each in self.dropped.items()]  # fmt: skip
        if self.articles_without_text:
            told.append(f"left out: {self.articles_without_text:,} articles without text")
        if self.unknown_files:
            told.append(
                f"not read: {self.unknown_files:,} files of unknown format, such as {self.unknown_files_first[0]}"
            )
        return "\n".join(told)


def check_output(output: str, inputs: Sequence[str]) -> None:
    """Raises InputError for an output of unknown format, without folder, or that is an input itself."""
    if not output.lower().endswith(OUTPUTS):
        raise InputError(f"--output {output}: expected a name that ends in {', '.join(OUTPUTS)}. Choose one of them.")
    if not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise InputError(f"--output {output}: there is no folder {os.path.dirname(os.path.abspath(output))}. Make it first.")  # fmt: skip
    if any(os.path.abspath(output) == os.path.abspath(each) for each in inputs):
        raise InputError(f"--output {output} is an input as well and would be overwritten. Choose another name.")


def summary_path(output: str) -> Path:
    """Where the summary lies: beside the output."""
    name = output[: -len(".gz")] if output.lower().endswith(PACKED) else output
    return Path(f"{os.path.splitext(name)[0]}.summary.json")


def assemble(parts: Sequence[Path], output: str, *, near: float | None, keep_repeats: bool, summary: Summary) -> None:
    """Write the passages of all parts, in their order, without those that repeat earlier ones; completes `summary`.

    Args:
        near: share of common runs of characters from which a passage counts as the repeat of an earlier one; None: never.
    """
    hashes = np.concatenate([_column(part, "hash") for part in parts] or [np.zeros(0, np.uint64)])
    same = repeats(hashes)
    kinds = {"too short": None, "equal to an earlier one": same}
    if near is not None:
        kinds["nearly equal to an earlier one"] = _near(parts, len(same), near) & ~same
    left_out = np.zeros(len(same), dtype=bool)
    for kind in list(kinds.values())[1:]:
        left_out |= kind
    left_out &= not keep_repeats
    words = _written(parts, output, left_out, Counter() if keep_repeats else None, summary)
    _count_parts(parts, summary)
    if not keep_repeats:
        for why, rows in list(kinds.items())[1:]:
            summary.drop(why, int(rows.sum()), int(words[rows].sum()))


def _column(part: Path, name: str) -> np.ndarray:
    return pq.read_table(part, columns=[name])[name].to_numpy()


def _near(parts: Sequence[Path], count: int, least: float) -> np.ndarray:
    """Which passages nearly repeat earlier ones; the signatures lie on the disk meanwhile."""
    path, start = parts[0].with_name("signatures.bin"), 0
    signs = np.memmap(path, dtype=np.uint8, mode="w+", shape=(max(count, 1), BINS))
    for part in parts:
        column = pq.read_table(part, columns=["signature"])["signature"].combine_chunks()
        rows = np.frombuffer(column.buffers()[1], dtype=np.uint8)[: len(column) * BINS].reshape(-1, BINS)
        signs[start : start + len(rows)] = rows
        start += len(rows)
    return near_repeats(signs[:count], least)


def _written(
    parts: Sequence[Path], output: str, left_out: np.ndarray, seen: Counter | None, summary: Summary
) -> np.ndarray:
    """Write the output, by renaming it when it is whole; returns the words of every passage, kept or not."""
    words, row = np.zeros(len(left_out), dtype=np.int32), 0
    beside = f"{output}.{os.getpid()}"
    with _writer(beside, output) as write:
        for titles, texts in _batches(parts):
            counts = [len(text.split()) for text in texts]
            words[row : row + len(texts)] = counts
            kept = [i for i in range(len(texts)) if not left_out[row + i]]
            ids = [_id(texts[i], seen) for i in kept]
            write(ids, [titles[i] for i in kept], [texts[i] for i in kept])
            summary.passages += len(kept)
            summary.words += sum(counts[i] for i in kept)
            summary.characters += sum(len(texts[i]) for i in kept)
            row += len(texts)
    os.replace(beside, output)
    return words


def _id(text: str, seen: Counter | None) -> str:
    """The id of a text; where texts may repeat, `seen` counts them and later ones get a number."""
    name = passage_id(text)
    if seen is None:
        return name
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _batches(parts: Sequence[Path]) -> Iterator[tuple[list[str], list[str]]]:
    for part in parts:
        for batch in pq.ParquetFile(part).iter_batches(batch_size=ROWS, columns=["title", "text"]):
            yield batch["title"].to_pylist(), batch["text"].to_pylist()


def _count_parts(parts: Sequence[Path], summary: Summary) -> None:
    short = [0, 0]
    for counts in map(read_counts, parts):
        summary.articles += counts.articles
        summary.articles_without_text += counts.articles_without_text
        summary.words_read += counts.words
        short = [short[0] + counts.short_passages, short[1] + counts.short_words]
    summary.drop("too short", *short)


@contextmanager
def _writer(path: str, output: str) -> Iterator:
    """A function that writes columns (ids, titles, texts) in the format that the name of the output tells."""
    if kind_of(output) == ".parquet":
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as file:
            yield lambda *columns: file.write_table(pa.table([pa.array(each, pa.string()) for each in columns], SCHEMA))
        return
    packed = output.lower().endswith(".gz")
    with gzip.open(path, "wt", 6, "utf-8") if packed else open(path, "w", encoding="utf-8", newline="\n") as file:

        def write(*columns: Sequence[str]) -> None:
            rows = (dict(zip(SCHEMA.names, row, strict=True)) for row in zip(*columns, strict=True))
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

        yield write
