"""Questions, the passages that are searched, and a cache of their vectors, for the benchmarks of retrieval.

Vectors are stored by retriever and passages, so that all benchmarks share them, and in parts, so that an interrupted
benchmark resumes. Several processes encode a share each. Left out: what is measured.
"""

import argparse
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import tqdm
from datasets import Dataset
from safetensors.numpy import load_file, save_file

from cozyrag.config import parse_settings
from cozyrag.data.matching import STEMMERS
from cozyrag.data.passages import merge_passages
from cozyrag.data.questions import read_questions, take
from cozyrag.data.sentences import RULES, SentenceVectors
from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.setup import make_accelerator

PART = 1024  # passages in one file of vectors: half a minute of work on a slow machine
BATCH = 64  # passages encoded at once


def add_arguments(parser: argparse.ArgumentParser, *, max_questions: int) -> None:
    """Add the arguments that `corpus_of`, `retriever_of` and `open_index` read."""
    parser.add_argument("--questions", required=True, help="questions with their gold passage")
    parser.add_argument("--also_passages", nargs="*", default=[], help="question files whose passages are searched too")
    parser.add_argument("--index", required=True, help="folder in which vectors are cached")
    parser.add_argument(
        "--retriever", help="SentenceTransformer folder or Hub id (default: the embedded all-MiniLM-L6-v2)"
    )
    parser.add_argument(
        "--stemmer", default="english", choices=STEMMERS, help="stemmer of sparse search (default: english)"
    )
    parser.add_argument(
        "--max_questions",
        type=int,
        default=max_questions,
        help=f"size of the sample of questions (default: {max_questions})",
    )


def corpus_of(options: argparse.Namespace) -> tuple[dict, Dataset]:
    """Columns of a sample of the questions, and the passages of all files."""
    asked = read_questions(options.questions)
    others = [read_questions(path).passages for path in options.also_passages]
    return take(asked.table, options.max_questions, 0)[:], merge_passages([asked.passages, *others])


def retriever_of(options: argparse.Namespace) -> Retriever:
    """The retriever of `--retriever`, or the embedded one."""
    return Retriever.load(options.retriever) if options.retriever else Retriever.load_embedded(max_tokens=160)


def accelerator_of(threads: int | None) -> Accelerator:
    """An Accelerator with the checks and the thread settings of a training run."""
    return make_accelerator(parse_settings(["--threads", str(threads)] if threads else []))


def fewer(passages: Dataset, limit: int | None, keep: set[str]) -> Dataset:
    """At most `limit` passages in their order: those with the ids to keep, and a random sample of the others.

    Raises InputError if there are more passages to keep than `limit`.
    """
    if limit is None or limit >= len(passages):
        return passages
    ids = passages["id"][:]
    needed = [row for row, key in enumerate(ids) if key in keep]
    if len(needed) > limit:
        raise InputError(
            f"--max_passages: expected at least {len(needed)}, the number of gold passages, found {limit}. "
            "Raise it, or use fewer questions (--limit)."
        )
    others = [row for row, key in enumerate(ids) if key not in keep]
    return passages.select(sorted([*needed, *random.Random(0).sample(others, limit - len(needed))]))


def open_index(options: argparse.Namespace, passages: Dataset, retriever: Retriever) -> PassageIndex:
    """The index of these passages, with vectors cached under `--index`; for one process."""
    return stored_index(Accelerator(cpu=True), Path(options.index), passages, retriever)


def stored_index(accelerator: Accelerator, folder: Path, passages: Dataset, retriever: Retriever) -> PassageIndex:
    """The index of these passages, with vectors from the cache in `folder`, or encoded and stored there.

    They are memory-mapped, because vectors of sentences are needed for few passages at a time.
    """
    columns, fingerprint = Passages.of(passages), retriever.fingerprint()
    home = folder / f"{fingerprint}-{_digest(columns)}-{RULES}"
    if not (home / "facts.json").exists():
        _encode_parts(accelerator, home / "parts", columns, retriever)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _join_parts(home, len(columns.ids), fingerprint)
    accelerator.wait_for_everyone()
    vectors, sentences, ends = (
        np.load(home / f"{name}.npy", mmap_mode="r") for name in ("vectors", "sentences", "ends")
    )
    known = SentenceVectors(sentences, ends) if retriever.reads_sentences else None
    return PassageIndex(passages, vectors, fingerprint=fingerprint, sentences=known)


def _digest(columns: Passages) -> str:
    digest = hashlib.sha256()
    for text in columns.to_read():
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:12]


def _order(columns: Passages) -> list[int]:
    """Rows, longest text first: little padding, and the estimate of the time left is never too low."""
    return sorted(range(len(columns.ids)), key=lambda row: -len(columns.texts[row]))


def _encode_parts(accelerator: Accelerator, folder: Path, columns: Passages, retriever: Retriever) -> None:
    """Write the missing parts of this process. Parts are the same for any number of processes."""
    folder.mkdir(parents=True, exist_ok=True)
    order = _order(columns)
    starts = range(0, len(order), PART)[accelerator.process_index :: accelerator.num_processes]
    missing = [start for start in starts if not (folder / f"{start:09d}.safetensors").exists()]
    total = sum(len(order[start : start + PART]) for start in starts)
    left = sum(len(order[start : start + PART]) for start in missing)
    with tqdm(total=total, initial=total - left, desc="encoding passages", unit="passage") as bar:
        for start in missing:
            rows = order[start : start + PART]
            tensors = _encoded(columns, rows, retriever, bar.update)
            partial = folder / f"{start:09d}.partial"
            save_file(tensors | {"rows": np.array(rows)}, partial)
            partial.rename(partial.with_suffix(".safetensors"))


def _encoded(columns: Passages, rows: list[int], retriever: Retriever, progress) -> dict[str, np.ndarray]:
    """Vectors of the passages of a part, of all their sentences, and the number of sentences of each passage."""
    vectors, sentences, counts = [], [], []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        made, own = retriever.encode_passages(columns.select(batch), columns.spans(batch), batch_size=BATCH)
        vectors.append(made)
        sentences.append(own.vectors)
        counts.append(np.diff(own.ends, prepend=0))
        progress(len(batch))
    return {
        "vectors": np.concatenate(vectors),
        "sentences": np.concatenate(sentences),
        "counts": np.concatenate(counts),
    }


def _join_parts(home: Path, passages: int, fingerprint: str) -> None:
    """Join the parts in the order of the passages, and delete them."""
    paths = sorted((home / "parts").glob("*.safetensors"))
    counts = np.zeros(passages, dtype=np.int64)
    for path in paths:
        part = load_file(path)
        counts[part["rows"]] = part["counts"]
    ends = np.cumsum(counts)
    dimensions = part["vectors"].shape[1]
    vectors = np.lib.format.open_memmap(home / "vectors.npy", "w+", np.float32, (passages, dimensions))
    sentences = np.lib.format.open_memmap(home / "sentences.npy", "w+", np.float16, (int(ends[-1]), dimensions))
    for path in paths:
        part = load_file(path)
        vectors[part["rows"]] = part["vectors"]
        own = np.split(part["sentences"], np.cumsum(part["counts"])[:-1])
        for row, made in zip(part["rows"].tolist(), own, strict=True):
            sentences[ends[row] - len(made) : ends[row]] = made
    vectors.flush()
    sentences.flush()
    np.save(home / "ends.npy", ends)
    facts = {"retriever_fingerprint": fingerprint, "passages": passages, "dimensions": dimensions}
    (home / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    shutil.rmtree(home / "parts")
