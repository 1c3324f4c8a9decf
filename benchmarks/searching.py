"""What the benchmarks of searching share: questions, the passages they are searched for in, and an index kept on disk.

Left out: what is measured.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from cozyrag.index import PassageIndex, Passages, made_by
from cozyrag.lexical import STEMMERS
from cozyrag.passages import merge_passages
from cozyrag.questions import read_questions, take
from cozyrag.retriever import Retriever
from cozyrag.sentences import SentenceVectors


def add_arguments(parser: argparse.ArgumentParser, *, max_questions: int) -> None:
    """The arguments that `corpus_of`, `retriever_of` and `open_index` read."""
    parser.add_argument("--questions", required=True, help="questions that carry their gold passage")
    parser.add_argument("--also_passages", nargs="*", default=[], help="question files whose passages are searched too")
    parser.add_argument("--index", required=True, help="folder in which the index is kept for the next time")
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


def open_index(options: argparse.Namespace, passages: Dataset, retriever: Retriever) -> PassageIndex:
    """The index of these passages, read from `--index` if this retriever made it, else made and kept there."""
    folder = Path(options.index)
    if made_by(folder) == retriever.fingerprint():
        return PassageIndex.load(folder, fingerprint=retriever.fingerprint())
    columns = Passages.of(passages)
    order = np.argsort([-len(text) for text in columns.texts], kind="stable")
    vectors: dict[int, np.ndarray] = {}
    sentences: dict[int, np.ndarray] = {}
    for start in tqdm(range(0, len(order), 64), desc="indexing", unit="64 passages"):
        rows = order[start : start + 64].tolist()
        made, own = retriever.encode_passages(columns.select(rows), columns.spans(rows), batch_size=64)
        vectors.update(zip(rows, made, strict=True))
        sentences.update(zip(rows, own.of(range(len(rows))), strict=True))
    rows = range(len(order))
    joined = SentenceVectors.join([sentences[row] for row in rows], made.shape[1])
    index = PassageIndex(
        passages, np.stack([vectors[row] for row in rows]), fingerprint=retriever.fingerprint(), sentences=joined
    )
    index.save(folder)
    return index
