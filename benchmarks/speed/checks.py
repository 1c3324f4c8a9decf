"""What do the checks of contents cost? Loading a pair, and finishing an index, with and without them.

    python -m benchmarks.speed.checks cozyrag-output --repeats 7

Without: no hash of a file is taken or compared, and no vector is tested for NaN, infinity and its length. An index is
finished by `cozyrag index` when all shards are encoded: it reads the passages, finds their vectors in the shards, and
writes the index. The sides alternate in one process on one thread; seconds are those of the processor, medians. Left
out: hashing a shard after it is encoded, which is nothing beside encoding it.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from statistics import median
from unittest.mock import patch

import faiss
import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar as hide_bars_of_datasets
from safetensors import safe_open
from transformers.utils import logging

from cozyrag import cli
from cozyrag.data.sentences import SentenceVectors
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval import index_file, passage_index, vector_shards
from cozyrag.retrieval.index_file import FILES, precision_of
from cozyrag.retrieval.passage_index import PassageIndex, Passages

SHARD = 1024  # passages


def nothing(*arguments: object, **options: object) -> dict:
    """Replaces a check, or the making of hashes."""
    return {}


def known(path: Path) -> dict[str, str]:
    """The metadata of a shard, of which no hash is compared."""
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


@contextmanager
def unchecked() -> Iterator[None]:
    """Everything as it is, but without the checks of contents."""
    with ExitStack() as stack:
        for place in ("cozyrag.pair_file.check_contents", "cozyrag.retrieval.index_file.check_contents"):
            stack.enter_context(patch(place, nothing))
        stack.enter_context(patch.object(index_file, "contents_of", nothing))
        stack.enter_context(patch.object(passage_index, "_check_tensors", nothing))
        stack.enter_context(patch.object(vector_shards, "_intact", known))
        yield


def shards_of(index: PassageIndex, passages: Path, folder: Path, precision: str) -> None:
    """Write the passages of an index, and the shards from which `cozyrag index` would finish it."""
    place = folder / "work" / "shards"
    place.mkdir(parents=True)
    held = index.passages
    others = [""] * len(held.ids) if held.metadata is None else held.metadata
    rows = zip(held.ids, held.titles, held.texts, others, strict=True)
    hashes, done = vector_shards.store_passages(rows, passages)[1], 0

    def encode(some: Passages) -> tuple[np.ndarray, SentenceVectors | None]:
        nonlocal done
        rows, done = np.arange(done, done + len(some.texts)), done + len(some.texts)
        own = index.sentences and SentenceVectors.join(index.sentences.of(rows), index.vectors.shape[1])
        return index.vectors[rows], own

    vector_shards.encode_shards(
        passages, np.arange(len(hashes)), hashes, encode, place,
        size=SHARD, share=(0, 1), fingerprint=index.fingerprint, precision=precision, done=nothing,
    )  # fmt: skip


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the processor."""
    started = time.process_time()
    with open(os.devnull, "w") as void, redirect_stdout(void):
        work()
    return time.process_time() - started


def measure(work: Callable[[], object], prepare: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds without and with the checks, in turn; a first pair of runs warms up and is not counted."""
    without, checked = [], []
    for _ in range(repeats + 1):
        prepare()
        with unchecked():
            without.append(seconds_of(work))
        prepare()
        checked.append(seconds_of(work))
    return without[1:], checked[1:]


def finishing(pair: CozyRAG, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """The work of finishing the index of a pair again, and what comes before it, which is not measured."""
    assert pair.saved is not None
    held, retriever = pair.saved.pieces["index"], pair.saved.pieces["retriever"]
    passages, out, shards = folder / "passages.parquet", folder / "out", folder / "shards"
    shards_of(pair.index, passages, shards, precision_of(held))
    words = [str(passages), "--retriever", str(retriever), "--output", str(out), "--threads", "1", "--use_cpu"]
    words += [] if pair.index.sentences else ["--no_sentence_vectors"]

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(shards, out)

    def work() -> None:
        with patch("cozyrag.models.retriever.Retriever.encode_passages", None):  # all must be known
            cli.run("index", words)
        assert all((out / name).exists() for name in FILES)

    return work, prepare


def table(options: argparse.Namespace) -> None:
    """Print one line for each work."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    logging.disable_progress_bar()
    hide_bars_of_datasets()
    pair = CozyRAG.from_pretrained(options.pair)
    assert pair.saved is not None
    size = sum(path.stat().st_size for piece in pair.saved.pieces.values() for path in piece.rglob("*"))
    print(f"{size / 1e6:,.0f} MB, {len(pair.index):,} passages, median of {options.repeats}\n")
    lines = ["| | without the checks, CPU s | with them, CPU s | more |", "|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as temporary:
        works = {
            "loading the pair": (lambda: CozyRAG.from_pretrained(options.pair), lambda: None),
            "finishing the index": finishing(pair, Path(temporary)),
        }
        for name, (work, prepare) in works.items():
            without, checked = (median(each) for each in measure(work, prepare, options.repeats))
            lines.append(f"| {name} | {without:.2f} | {checked:.2f} | {100 * (checked / without - 1):+.1f} % |")
    print("\n".join(lines))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", help="output folder of a run")
    parser.add_argument("--repeats", type=int, default=7, help="times that each side runs (default: 7)")
    options = parser.parse_args()
    cli.entry_point(lambda: table(options))


if __name__ == "__main__":
    main()
