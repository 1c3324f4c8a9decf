"""What the benchmarks of searching share: questions, the passages they are searched for in, vectors kept on disk, fusion.

Vectors are kept by retriever and passages, so that no benchmark makes them twice, in parts, so that an interrupted one goes
on where it was. Several processes encode a share each. Left out: what is measured.
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
from cozyrag.data.passages import merge_passages
from cozyrag.data.questions import read_questions, take
from cozyrag.data.sentences import RULES, SentenceVectors
from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import STEMMERS
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.setup import make_accelerator

PART = 1024  # passages whose vectors are written together: half a minute of work on a slow machine
TOGETHER = 64  # passages encoded at once
RANK_CONSTANT = 60  # Cormack et al. 2009, "Reciprocal rank fusion outperforms Condorcet"


def add_arguments(parser: argparse.ArgumentParser, *, max_questions: int) -> None:
    """The arguments that `corpus_of`, `retriever_of` and `open_index` read."""
    parser.add_argument("--questions", required=True, help="questions that carry their gold passage")
    parser.add_argument("--also_passages", nargs="*", default=[], help="question files whose passages are searched too")
    parser.add_argument("--index", required=True, help="folder in which vectors are kept for the next time")
    parser.add_argument(
        "--retriever", help="SentenceTransformer folder or Hub id (default: the embedded all-MiniLM-L6-v2)"
    )
    parser.add_argument(
        "--stemmer", default="english", choices=STEMMERS, help="word endings that BM25 cuts off (default: english)"
    )
    parser.add_argument(
        "--max_questions",
        type=int,
        default=max_questions,
        help=f"a sample of so many questions (default: {max_questions})",
    )


def corpus_of(options: argparse.Namespace) -> tuple[dict, Dataset]:
    """The columns of the questions (a sample), and the passages of all files named."""
    asked = read_questions(options.questions)
    others = [read_questions(path).passages for path in options.also_passages]
    return take(asked.table, options.max_questions, 0)[:], merge_passages([asked.passages, *others])


def retriever_of(options: argparse.Namespace) -> Retriever:
    """The retriever named, or the embedded one."""
    return Retriever.load(options.retriever) if options.retriever else Retriever.load_embedded(max_tokens=160)


def accelerator_of(threads: int | None) -> Accelerator:
    """The Accelerator of a benchmark, made as a run makes its own: the same checks, the same use of the cores."""
    return make_accelerator(parse_settings(["--threads", str(threads)] if threads else []))


def gold_ids(questions: Dataset, own: Dataset | None, passages: Dataset) -> Dataset:
    """The questions with the gold ids that these passages give their contexts: by id, else by text, else none.

    Args:
        own: the passages that the question file carried itself, if it did.
    """
    columns, pool = questions[:], passages[:]
    known, by_text = set(pool["id"]), dict(zip(pool["text"], pool["id"], strict=True))
    carried = own[:] if own is not None else {"id": [], "text": []}
    place = {key: by_text.get(text) for key, text in zip(carried["id"], carried["text"], strict=True)}
    columns["passage_id"] = [key if key in known else place.get(key) for key in columns["passage_id"]]
    return Dataset.from_dict(columns, features=questions.features)


def fewer(passages: Dataset, limit: int | None, keep: set[str]) -> Dataset:
    """At most `limit` passages, in their order: those with the ids to keep, and a random sample of the others.

    Raises InputError where those to keep are more.
    """
    if limit is None or limit >= len(passages):
        return passages
    ids = passages["id"][:]
    needed = [row for row, key in enumerate(ids) if key in keep]
    if len(needed) > limit:
        raise InputError(
            f"--max_passages: expected at least {len(needed)}, the gold passages of the questions asked, found {limit}. "
            "Raise it, or ask fewer questions (--limit)."
        )
    others = [row for row, key in enumerate(ids) if key not in keep]
    return passages.select(sorted([*needed, *random.Random(0).sample(others, limit - len(needed))]))


def open_index(options: argparse.Namespace, passages: Dataset, retriever: Retriever) -> PassageIndex:
    """The index of these passages, its vectors kept below `--index`; for benchmarks of one process."""
    return stored_index(Accelerator(cpu=True), Path(options.index), passages, retriever)


def stored_index(accelerator: Accelerator, folder: Path, passages: Dataset, retriever: Retriever) -> PassageIndex:
    """The index of these passages by this retriever, its vectors read from below `folder`, or made and kept there.

    Vectors are mapped into memory, not read: those of the sentences are looked up for few passages at a time.
    """
    columns, fingerprint = Passages.of(passages), retriever.fingerprint()
    home = folder / f"{fingerprint}-{_digest(columns)}-{RULES}"
    if not (home / "facts.json").exists():
        _encode_parts(accelerator, home / "parts", columns, retriever)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _join_parts(home, len(columns.ids), fingerprint)
    accelerator.wait_for_everyone()
    made = {name: np.load(home / f"{name}.npy", mmap_mode="r") for name in ("vectors", "sentences", "ends")}
    sentences = SentenceVectors(made["sentences"], made["ends"]) if retriever.reads_sentences else None
    return PassageIndex(passages, made["vectors"], fingerprint=fingerprint, sentences=sentences)


def _digest(columns: Passages) -> str:
    digest = hashlib.sha256()
    for text in columns.to_read():
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:12]


def _order(columns: Passages) -> list[int]:
    """Rows, longest text first: little padding, and the time left is never underrated."""
    return sorted(range(len(columns.ids)), key=lambda row: -len(columns.texts[row]))


def _encode_parts(accelerator: Accelerator, folder: Path, columns: Passages, retriever: Retriever) -> None:
    """Write the parts of this process that are not there yet. Parts are the same for any number of processes."""
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
    """Vectors of a part, of its sentences one after another, and how many sentences each passage has."""
    vectors, sentences, counts = [], [], []
    for start in range(0, len(rows), TOGETHER):
        batch = rows[start : start + TOGETHER]
        made, own = retriever.encode_passages(columns.select(batch), columns.spans(batch), batch_size=TOGETHER)
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
    """Put the parts into the order of the passages, and remove them."""
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


def reciprocal_rank_fusion(rankings: tuple[np.ndarray, ...], k: int) -> np.ndarray:
    """(n, k) rows, best first, by the sum over the rankings (n, depth) of 1 / (60 + rank); equal sums in the order of the rows."""
    fused = []
    for lists in zip(*rankings, strict=True):
        scores: dict[int, float] = {}
        for ranking in lists:
            for rank, row in enumerate(ranking.tolist(), 1):
                scores[row] = scores.get(row, 0.0) + 1 / (RANK_CONSTANT + rank)
        fused.append(sorted(scores, key=lambda row: (-scores[row], row))[:k])
    return np.array(fused)
