"""How does search behave with millions of passages? Building, opening and searching an index: time, memory, recall.

    python -m benchmarks.speed.corpus_scale my-rag --questions dev.jsonl.gz --texts wiki.jsonl --passages 1000000

The passages of the pair's index come first, so that real questions find their gold passages. The others are made: their
texts are sentences of `--texts`, drawn at random, and their vectors are real ones, each moved by a part of the
difference of two others, so that they crowd and stretch as embeddings do. Text and vector of a made passage do not
belong together: in hybrid search it is a weaker rival than a real passage would be. Sentence vectors are left out, as
they are in large corpora (`--no_sentence_vectors`).

Hybrid search is compared with an exact one: the dense search reads all vectors, the sparse search scores 500 passages.
Each part runs in a new process. "own" memory belongs to a process alone; pages of mapped files are shared and may be
dropped by the system; PSS divides them among the processes that map them. Linux only. Left out: encoding.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from benchmarks.shared.bench import write_json
from cozyrag.cli import entry_point
from cozyrag.commands.index import bytes_of
from cozyrag.data.corpus import gold_ids
from cozyrag.data.passages import read_passages
from cozyrag.data.questions import read_questions, take
from cozyrag.data.sentences import split_sentences
from cozyrag.errors import InputError
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import read_pair
from cozyrag.retrieval import words_on_disk
from cozyrag.retrieval.faiss_index import ADDED, open_vectors, search_shards, stretches
from cozyrag.retrieval.hybrid import Searcher, Weights
from cozyrag.retrieval.passage_index import PassageIndex, write_index
from cozyrag.retrieval.vector_shards import Known, store_passages, write_vectors
from cozyrag.retrieval.words_on_disk import prepare_words, word_search

MOVED = 0.4  # distance of a made vector from a real one, in differences of two real ones
DEEP = 500  # passages that the exact sparse search scores
TIMED = 200  # questions that are asked one at a time
LINUX = sys.platform == "linux"
NAME = "0" * 16  # stands for the fingerprint of a retriever
Vectors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """What the processes need.

    vectors: of the questions, by their text. gold: the row of the gold passage of each.
    """

    folder: Path
    vectors: Vectors
    gold: np.ndarray
    stemmer: str
    weights: Weights
    threads: int
    index_memory: int

    @property
    def questions(self) -> list[str]:
        return list(self.vectors)

    def searcher(self, index: Any, words: Any) -> Searcher:
        """Hybrid search, whose time does not contain that of encoding the question."""
        return Searcher(
            index, words, encode=lambda texts: np.stack([self.vectors[text] for text in texts]), mode="hybrid",
            words=words, weights=self.weights,
        )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="output folder of a run, with its index")
    add("--questions", required=True, metavar="FILE", help="questions with gold passages, any format of train.py")
    add("--limit", type=int, default=2000, metavar="N", help="questions, at most (default: 2000)")
    add("--texts", required=True, metavar="FILE", help="passages whose sentences make up the made ones")
    add("--passages", type=int, required=True, metavar="N", help="passages of the index")
    add("--index_memory", type=bytes_of, metavar="SIZE", help="as of `cozyrag index` (default: 100 bytes a passage)")
    add("--threads", type=int, default=2, help="threads of FAISS (default: 2)")
    add("--folder", default=tempfile.gettempdir(), help="place for the index: 3 KB for each passage")
    add("--json", metavar="FILE", help="write the figures to this file")
    entry_point(lambda: measure(parser.parse_args()))


def measure(options: argparse.Namespace) -> None:
    """Make the corpus, measure each part and print the figures."""
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"  # of the processes
        folder = Path(place) / "index"
        folder.mkdir()
        task = _task(options, folder)
        _write(options, folder)
        facts: dict[str, object] = {"passages": options.passages, "questions": len(task.gold), "threads": task.threads}
        facts |= _apart(_built, task) | {"disk_MB": _megabytes(Path(place))}
        barrier = multiprocessing.Manager().Barrier(2)
        facts |= _apart(_searched, task, None)
        facts["two_processes_MB"] = [found["memory_MB"] for found in _both(task, barrier)]
        facts |= _apart(_compared, task)
    print(json.dumps(facts, indent=2))
    if options.json:
        write_json(Path(options.json), facts)


def _task(options: argparse.Namespace, folder: Path) -> Task:
    """The questions whose gold passage is in the index of the pair, with their vectors."""
    model = Path(options.model)
    own, read = read_passages(str(model / "index" / "passages.parquet"))[0], read_questions(options.questions)
    asked = take(gold_ids(read.table, read.passages, own["id"][:], own["text"][:]), None, 0)
    row_of = {key: row for row, key in enumerate(own["id"])}
    gold = {
        question: row_of[key]
        for question, key in zip(asked["question"], asked["passage_id"], strict=True)
        if key is not None
    }
    chosen = list(gold)[: options.limit]
    encoded = Retriever.load(str(model / "retriever")).encode(chosen, kind="query", batch_size=64)
    search = read_pair(model)["retrieval"]
    return Task(
        folder, dict(zip(chosen, encoded, strict=True)), np.array([gold[each] for each in chosen]), search["stemmer"],
        Weights.default(sentences=False), options.threads, options.index_memory or 100 * options.passages,
    )  # fmt: skip


def _write(options: argparse.Namespace, folder: Path) -> None:
    """Write passages.parquet and vectors.safetensors: the real ones, then the made ones."""
    real, source = _real(Path(options.model) / "index"), read_passages(options.texts)[0]
    titles, texts = source["title"][:], source["text"][:]
    sentences = [sentence for text in texts for sentence in split_sentences(text)]
    random = np.random.default_rng(0)

    def rows() -> Any:
        own = real.passages
        for row in range(min(len(own.ids), options.passages)):
            yield own.ids[row], own.titles[row], own.texts[row], ""
        for row in tqdm(range(len(own.ids), options.passages), desc="passages", unit="passage"):
            drawn = random.integers(0, len(sentences), random.integers(3, 7))
            text = " ".join(sentences[at] for at in drawn)
            yield f"made {row}", titles[int(random.integers(len(titles)))], text, ""

    store_passages(rows(), folder / "passages.parquet")
    parts, vectors = [], np.asarray(real.vectors, np.float32)
    for start in range(0, options.passages, ADDED):
        end = min(start + ADDED, options.passages)
        np.save(folder / f"{start}.npy", np.concatenate([vectors[start:end], _made(vectors, start, end, random)]))
        parts.append(np.load(folder / f"{start}.npy", mmap_mode="r"))
    keys = np.arange(options.passages, dtype=np.uint64)
    write_vectors(folder / "vectors.safetensors", keys, Known(keys, tuple(parts)))
    for part in folder.glob("*.npy"):
        part.unlink()


def _real(folder: Path) -> PassageIndex:
    return PassageIndex.load(
        folder, fingerprint=json.loads((folder / "index.json").read_text())["retriever_fingerprint"]
    )


def _made(real: np.ndarray, start: int, end: int, random: np.random.Generator) -> np.ndarray:
    """Vectors of the made passages among the rows from `start` to `end`."""
    at, to, off = random.integers(0, len(real), (3, end - max(start, len(real)) if end > len(real) else 0))
    made = real[at] + np.float32(MOVED) * (real[to] - real[off])
    return made / np.linalg.norm(made, axis=1, keepdims=True)


# ---- processes


def _apart(work: Callable[..., dict], *given: object) -> dict:
    """The result of a function in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


def _both(task: Task, barrier: Any) -> list[dict]:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.starmap(_searched, [(task, barrier)] * 2, chunksize=1)


def _built(task: Task) -> dict:
    """Build the index and make the words, as `cozyrag index` does."""
    faiss.omp_set_num_threads(task.threads)
    with _Peak() as peak:
        started = time.perf_counter()
        vectors = open_vectors(task.folder / "vectors.safetensors")
        factory, share = write_index(task.folder, NAME, vectors, task.index_memory)
        between = time.perf_counter()
        if factory == "Flat":
            raise InputError("--index_memory: expected too little for a Flat index, which is not measured here.")
        prepare_words(task.folder, task.stemmer)
    facts = {"index": factory, "recall_when_tuned": share, "build_index_s": between - started}
    return facts | {"build_words_s": time.perf_counter() - between, "build_own_MB": peak.megabytes}


def _searched(task: Task, barrier: Any) -> dict:
    """Open the index and search, in a process that does nothing else; with a barrier, only for its memory."""
    faiss.omp_set_num_threads(task.threads)
    if barrier is None:
        _forget(task.folder.parent)
    before, started = _memory(), time.perf_counter()
    index = PassageIndex.load(task.folder, fingerprint=NAME)
    lexical, words = word_search(index, mode="hybrid", stemmer=task.stemmer)
    opened, search = time.perf_counter() - started, task.searcher(index, words)
    asked = task.questions[:TIMED]
    first, again = (_milliseconds(search, asked) for _ in range(2))
    parts = _parts(search, lexical, asked)
    if barrier is not None:
        barrier.wait()
    after = _memory()
    if barrier is not None:
        barrier.wait()
    memory = {name: after[name] - before[name] for name in after}
    return {"open_cold_s": opened, "cold_ms": first, "warm_ms": again, "warm_parts_ms": parts, "memory_MB": memory}


def _milliseconds(search: Searcher, questions: Sequence[str]) -> dict[str, float]:
    """Median and 90th percentile of the ten best passages of one question."""
    spent = []
    for question in questions:
        started = time.perf_counter()
        search.search([question], 10)
        spent.append((time.perf_counter() - started) * 1e3)
    return {"p50": float(np.median(spent)), "p90": float(np.quantile(spent, 0.9))}


def _parts(search: Searcher, lexical: Any, questions: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of the two searches alone."""
    spent: dict[str, list[float]] = {"dense": [], "sparse": []}
    for question in questions:
        vector, started = search.encode([question]), time.perf_counter()
        search.index.search(vector, 60)
        between = time.perf_counter()
        lexical.search([question], 60)
        spent["dense"].append((between - started) * 1e3)
        spent["sparse"].append((time.perf_counter() - between) * 1e3)
    return {name: float(np.median(each)) for name, each in spent.items()}


def _compared(task: Task) -> dict:
    """Recall of hybrid search and of an exact one over the same passages."""
    faiss.omp_set_num_threads(task.threads)
    index = PassageIndex.load(task.folder, fingerprint=NAME)
    words = word_search(index, mode="hybrid", stemmer=task.stemmer)[1]

    def dense(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return search_shards(stretches(index.vectors), vectors, k)

    def sparse(questions: Sequence[str], k: int) -> tuple[np.ndarray, ...]:
        return tuple(each[:, :k] for each in words.search(questions, DEEP))

    every = SimpleNamespace(search=dense, vectors=index.vectors, sentences=None)
    deep = SimpleNamespace(search=sparse, split=words.split, scores_at=words.scores_at)
    recall = {"hybrid": _recall(task, task.searcher(index, words))}
    words_on_disk.MANY = len(index) + 1  # all words of a question propose passages, the frequent ones too
    return {"recall": recall | {"exact": _recall(task, task.searcher(every, deep))}}


def _recall(task: Task, search: Searcher) -> dict[str, float]:
    """Share of the questions whose gold passage is among the first."""
    rows = search.search(task.questions, 20).rows
    return {f"@{k}": float((rows[:, :k] == task.gold[:, None]).any(axis=1).mean()) for k in (1, 5, 20)}


def _forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache of the system."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _megabytes(folder: Path) -> float:
    """Of the disk, files with several names once."""
    return (
        sum({(stat := path.stat()).st_ino: stat.st_size for path in folder.rglob("*") if path.is_file()}.values()) / 1e6
    )


def _memory() -> dict[str, float]:
    """MB of this process: its own, and its share of everything (PSS)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").split("\n")
    held = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.endswith(" kB")}
    return {"own": held["Anonymous"], "RSS": held["Rss"], "PSS": held["Pss"]}


class _Peak:
    """Peak of the own memory of this process inside a `with`, sampled ten times a second."""

    def __enter__(self) -> "_Peak":
        self.megabytes, self._over = 0.0, threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.1):
            self.megabytes = max(self.megabytes, _memory()["own"])

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        self._sampler.join()


if __name__ == "__main__":
    main()
