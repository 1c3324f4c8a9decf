"""What does an index in LanceDB cost beside the same index in files: recall, milliseconds a question, disk?

    python -m benchmarks.speed.database my-rag --questions squad_dev.jsonl.gz --limit 1000 --database /tmp/db

The vectors and texts of the pair's index are written into a new database, then the same questions are searched in both,
one at a time, as `cozyrag ask` does. The vectors of the questions are made once and not timed. The sides take turns
every `--turn` questions, so that a slow minute slows both. "CPU" is of all threads of the process. `--lists` puts the
vectors into lists, which otherwise begins at 100,000 passages. Left out: a server, and encoding.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cozyrag.cli import entry_point
from cozyrag.data.sentences import RULES
from cozyrag.errors import InputError
from cozyrag.pair_evaluation import questions_for
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval import lance_writing
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.index_file import precision_of
from cozyrag.retrieval.lance_database import PREFIX
from cozyrag.retrieval.lance_index import LanceIndex
from cozyrag.retrieval.opening import open_index
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.retrieval.words_on_disk import word_search
from cozyrag.runtime.atomic_files import folder_bytes, write_json

DEPTHS = (1, 5, 20)
SIZE = 4096  # passages written at once


def written(index: PassageIndex, uri: str, *, stemmer: str, precision: str) -> float:
    """Write a local index with sentence vectors into a new database; returns the seconds."""
    began = time.perf_counter()
    if index.sentences is None:
        raise InputError("Expected an index with sentence vectors, found one without.")
    how = {"retriever_fingerprint": index.fingerprint, "precision": precision, "sentence_rules": RULES}
    writer = lance_writing.LanceWriter(uri, **how, stemmer=stemmer, dimensions=index.vectors.shape[1])
    writer.create()
    columns = [each for each in vars(index.passages).values() if each is not None]
    for start in range(0, len(index), SIZE):
        rows = np.arange(start, min(start + SIZE, len(index)))
        passages = Passages(*([column[row] for row in rows] for column in columns))
        hashes = rows.astype(np.uint64)
        writer.write(rows, passages, hashes, hashes, index.vectors[rows], index.sentences.of(rows.tolist()))
    writer.finish(len(index), lambda count: None)
    return time.perf_counter() - began


def searched(
    sides: dict[str, Searcher], questions: Sequence[str], turn: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """The rows that each side finds, (n_questions, 20), and its milliseconds a question."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    spent = {name: {"wall": 0.0, "CPU": 0.0} for name in sides}
    for searcher in sides.values():
        searcher.search(questions[:1], max(DEPTHS))  # opens files
    for start in range(0, len(questions), turn):
        for name, searcher in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            some = questions[start : start + turn]
            found[name] += [searcher.search([question], max(DEPTHS)).rows[0] for question in some]
            spent[name]["wall"] += 1000 * (time.perf_counter() - wall) / len(questions)
            spent[name]["CPU"] += 1000 * (time.process_time() - cpu) / len(questions)
    return {name: np.stack(rows) for name, rows in found.items()}, spent


def compare(options: argparse.Namespace) -> None:
    """Write the database, search in both and print the table."""
    if options.lists:
        lance_writing.MANY = 0
    pair = CozyRAG.from_pretrained(options.model)
    if not isinstance(pair.index, PassageIndex) or pair.saved is None:
        raise InputError(f"Expected a pair with its index in files, found another in {options.model}.")
    stemmer, folder = pair.saved.facts["retrieval"]["stemmer"], pair.saved.pieces["index"]
    seconds = written(pair.index, options.database, stemmer=stemmer, precision=precision_of(folder))
    index = open_index(f"{PREFIX}{options.database}", fingerprint=pair.index.fingerprint)
    assert isinstance(index, LanceIndex)
    builder = pair.evaluated().builder
    table = questions_for(options.questions, builder, limit=None)
    known = [at for at, name in enumerate(table["passage_id"]) if name in builder.row_of]
    asked = table.select(np.random.default_rng(options.seed).permutation(known)[: options.limit])[:]
    relevant = np.array([builder.row_of[name] for name in asked["passage_id"]])
    questions = asked["question"]
    vectors = dict(zip(questions, pair.searcher.encode(questions), strict=True))

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.stack([vectors[text] for text in texts])

    mode = pair.searcher.mode
    lexical, words = word_search(index, mode=mode, stemmer=stemmer)
    local = replace(pair.searcher, encode=encode)
    sides = {"files": local, "LanceDB": replace(local, index=index, lexical=lexical, words=words)}
    found, spent = searched(sides, questions, options.turn)
    disk = {"files": folder_bytes(folder) / 1e6, "LanceDB": folder_bytes(Path(options.database)) / 1e6}
    print(f"{len(questions)} questions, {len(index)} passages, mode {mode}; written in {seconds:.0f} s.\n")
    print("| index | recall@1 | recall@5 | recall@20 | ms a question, wall | ms a question, CPU | disk, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    results = {}
    for name, rows in found.items():
        recalls = [100 * float((rows[:, :depth] == relevant[:, None]).any(axis=1).mean()) for depth in DEPTHS]
        cells = [f"{recall:.1f}" for recall in recalls]
        cells += [f"{spent[name]['wall']:.1f}", f"{spent[name]['CPU']:.1f}", f"{disk[name]:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")
        results[name] = {"recall": dict(zip(DEPTHS, recalls, strict=True)), "ms": spent[name], "MB": disk[name]}
    print(f"\nThe same first passage for {100 * np.mean(found['files'][:, 0] == found['LanceDB'][:, 0]):.1f} %.")
    if options.json:
        write_json(options.json, results)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="output folder of a run, with sentence vectors in its index")
    parser.add_argument("--questions", nargs="+", required=True, help="questions whose passages are in the index")
    parser.add_argument("--database", required=True, metavar="DIR", help="new folder for the database")
    parser.add_argument("--limit", type=int, default=1000, help="questions, drawn with --seed (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument("--turn", type=int, default=50, help="questions before the other side's turn (default: 50)")
    parser.add_argument("--lists", action="store_true", help="put the vectors into lists, however few they are")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
