"""How fast is an index of a million vectors? Time to build it, memory, recall, and search time.

    python -m benchmarks.speed.index_scale --memory 400MB --source vectors.npy --questions questions.npy

Vectors are generated: each is a real one (`--source`) moved by a part of the difference of two other real ones, so that
they crowd and stretch as embeddings do. Without `--source` they come from a mixture of Gaussians. Questions are
generated in the same way, near and far, and read from `--questions`. The index is written as `cozyrag index` writes it,
and searched in a new process, whose memory is read from /proc (Linux). Left out: encoding texts.
"""

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from safetensors.numpy import load_file
from tqdm import tqdm

from cozyrag.commands.index import bytes_of
from cozyrag.retrieval.faiss_index import ADDED, memory_of, search_shards, stretches
from cozyrag.retrieval.passage_index import PassageIndex, write_index
from cozyrag.retrieval.vector_shards import Known, store_passages, write_vectors

# Distances of generated passages and questions from real vectors, in differences of two real vectors.
MOVED, ASKED = 0.4, (0.4, 0.7)
NAME = "0" * 16

Draw = Callable[[int, float, np.random.Generator], np.ndarray]


def main() -> None:
    """The command line."""
    options = _arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place, draw = Path(folder), _drawing(options.source, options.dimensions)
        vectors = _write(place, draw, options.vectors)
        questions = {f"moved {moved}": draw(options.asked, moved, np.random.default_rng(2)) for moved in ASKED}
        if options.questions:
            questions["given"] = np.load(options.questions)[: options.asked].astype(np.float32)
        faiss.omp_set_num_threads(options.threads)
        started = time.perf_counter()
        factory, share = write_index(place, NAME, vectors, options.memory)
        facts = {
            "vectors": len(vectors),
            "dimensions": vectors.shape[1],
            "index": factory,
            "build_seconds": time.perf_counter() - started,
            "planned_MB": memory_of(factory, *vectors.shape) / 1e6,
            "recall_when_tuned": share,
            "threads": options.threads,
        }
        facts["search"] = json.loads((place / "index.json").read_text(encoding="utf-8")).get("search")
        everything = search_shards(stretches(vectors), np.concatenate(list(questions.values())), 10)[1]
        exact = np.split(everything, np.cumsum([len(each) for each in questions.values()])[:-1])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            facts |= pool.apply(_searched, (place, questions, exact, options.threads))
    print(json.dumps(facts, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--vectors", type=int, default=1_000_000, help="number of vectors (default: 1,000,000)")
    add("--dimensions", type=int, default=384, help="dimensions without --source (default: 384)")
    add("--memory", type=bytes_of, help="as --index_memory of `cozyrag index`, such as 400MB (default: no limit)")
    add("--source", help="real vectors, .npy or .safetensors (n, dim), such as those of an index")
    add("--questions", help="vectors of real questions, .npy (n, dim)")
    add("--asked", type=int, default=200, help="questions of each kind, at most (default: 200)")
    add("--threads", type=int, default=2, help="threads of FAISS (default: 2)")
    add("--folder", default=tempfile.gettempdir(), help="folder for the index: 2 GB for a million of 384 dimensions")
    return parser.parse_args()


def _drawing(source: str | None, dimensions: int) -> Draw:
    """A function that generates `count` unit vectors, (count, dim) float32, `moved` from real or drawn ones."""
    draws = np.random.default_rng(0)
    if source is None:
        spread = (1 + np.arange(dimensions)) ** -0.5  # embeddings use their dimensions unequally
        real = (draws.standard_normal((20_000, dimensions)) * spread).astype(np.float32)
    else:
        real = np.load(source) if source.endswith(".npy") else load_file(source)["vectors"]
    real = real.astype(np.float32) / np.linalg.norm(real, axis=1, keepdims=True)

    def draw(count: int, moved: float, random: np.random.Generator) -> np.ndarray:
        at, to, off = random.integers(0, len(real), (3, count))
        made = real[at] + np.float32(moved) * (real[to] - real[off])
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    return draw


def _write(place: Path, draw: Draw, count: int) -> np.ndarray:
    """Write passages of about 600 characters and their vectors. Returns the vectors, memory-mapped."""
    text = "A passage as long as passages are. " * 17
    rows = tqdm(range(count), desc="passages")
    passages = ((f"p{row}", f"Title {row // 10}", f"{row} {text}") for row in rows)
    store_passages(passages, place / "passages.parquet")
    random = np.random.default_rng(1)
    parts = []
    for start in range(0, count, ADDED):
        np.save(place / f"{start}.npy", draw(min(ADDED, count - start), MOVED, random))
        parts.append(np.load(place / f"{start}.npy", mmap_mode="r"))
    keys = np.arange(count, dtype=np.uint64)
    vectors = write_vectors(place / "vectors.safetensors", keys, Known(keys, tuple(parts)))
    for part in place.glob("*.npy"):
        part.unlink()
    return vectors


def _memory() -> dict[str, float]:
    """MB of this process: its own, and pages of mapped files, which the system may drop."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {name: int(kilobytes) / 1e3 for name, kilobytes in re.findall(r"(RssAnon|RssFile):\s+(\d+)", status)}


def _searched(folder: Path, questions: dict[str, np.ndarray], exact: list[np.ndarray], threads: int) -> dict:
    """Load the index and search, in a process that does nothing else."""
    faiss.omp_set_num_threads(threads)
    before, started = _memory(), time.perf_counter()
    index = PassageIndex.load(folder, fingerprint=NAME)
    recall: dict[str, float] = {}
    facts: dict[str, object] = {"load_seconds": time.perf_counter() - started, "recall": recall}
    last = next(reversed(questions.values()))
    facts["ms_first_time"] = float(np.median([_milliseconds(index, question[None]) for question in last]))
    for (name, asked), expected in zip(questions.items(), exact, strict=True):
        found = np.concatenate([index.search(question[None], 10)[1] for question in asked])
        recall[name] = float(np.mean([np.isin(a, b).mean() for a, b in zip(expected, found, strict=True)]))
    alone = [_milliseconds(index, question[None]) for question in last]
    together = [_milliseconds(index, last) / len(last) for _ in range(5)]
    after = _memory()
    facts |= {"ms_alone": float(np.median(alone)), "ms_alone_90th": float(np.quantile(alone, 0.9))}
    facts |= {"ms_in_a_batch": float(np.median(together)), "batch": len(last), "load": os.getloadavg()[0]}
    return facts | {f"{name}_MB": after[name] - before[name] for name in after}


def _milliseconds(index: PassageIndex, questions: np.ndarray) -> float:
    started = time.perf_counter()
    index.search(questions, 10)
    return (time.perf_counter() - started) * 1e3


if __name__ == "__main__":
    main()
