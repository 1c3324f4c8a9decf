"""What the tests of an index in LanceDB share: few passages, their index in memory, and the same in a database."""

import json

import numpy as np
from datasets import Dataset

from cozyrag import cli
from cozyrag.data.metadata import with_metadata
from cozyrag.data.sentences import RULES, SentenceVectors, split_sentences
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.lance_index import LanceIndex
from cozyrag.retrieval.lance_writing import LanceWriter
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.retrieval.words_on_disk import word_search

DIMENSIONS, COUNT = 16, 60  # so few passages that hybrid search takes all of them for candidates
WORDS = "river fox founded hill Wien sea blue red hen sleeps running runs 1,250 3.5 vitamin C of the it's 東京".split()
QUESTIONS = ["Which river runs to the sea?", "the red fox the red hen", "it's 1250 hills", "zebra", "", "Wien n7x"]


def unit(count, seed):
    made = np.random.default_rng(seed).normal(size=(count, DIMENSIONS)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def drawn(count=COUNT):
    """Passages of one to four sentences with titles and pages."""
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS, rng.integers(2, 9))).capitalize() + "."

    texts = [f"{' '.join(sentence() for _ in range(rng.integers(1, 5)))} Number n{n}x." for n in range(count)]
    pages = [json.dumps({"page": n}) if n % 2 else "" for n in range(count)]
    return Passages([f"p{n}" for n in range(count)], [f"It's_{n % 7}" for n in range(count)], texts, pages)


def local():
    """The index of `drawn` in memory."""
    passages = drawn()
    table = Dataset.from_dict({"id": passages.ids, "title": passages.titles, "text": passages.texts})
    counts = [len(split_sentences(text)) for text in passages.texts]
    sentences = SentenceVectors(unit(sum(counts), 1).astype(np.float16), np.cumsum(counts))
    table = with_metadata(table, list(passages.metadata))
    return PassageIndex(table, unit(COUNT, 2), fingerprint="f", sentences=sentences)


def writer(uri, **how):
    facts = {"retriever_fingerprint": "f", "precision": "float32", "sentence_rules": RULES, "stemmer": "english"}
    return LanceWriter(str(uri), **facts | {"dimensions": DIMENSIONS} | how)


def write(one, index, rows, hashes=None):
    """Write these rows of a local index."""
    rows = np.asarray(rows)
    passages = Passages(*([column[row] for row in rows] for column in vars(index.passages).values()))
    hashes = rows.astype(np.uint64) + 2**63 if hashes is None else hashes
    one.write(rows, passages, hashes, hashes, index.vectors[rows], index.sentences.of(rows))


def fill(uri):
    """Write the local index into a database; returns its address."""
    one, index = writer(uri), local()
    one.create()
    for start in range(0, COUNT, 50):
        write(one, index, range(start, min(COUNT, start + 50)))
    one.finish(COUNT, lambda count: None)
    return str(uri)


def opened(uri):
    return LanceIndex.open(uri, fingerprint="f")


def searcher(index, mode):
    lexical, words = word_search(index, mode=mode, stemmer="english")
    asked = dict(zip(QUESTIONS, unit(len(QUESTIONS), 3), strict=True))
    return Searcher(
        index, lexical, encode=lambda texts: np.stack([asked[text] for text in texts]), mode=mode, words=words
    )


def rows(count):
    return [
        {"id": f"p{n}", "title": f"Hill {n}", "text": f"The hill {n} is red. It is {n} m high.", "page": n}
        for n in range(count)
    ]


def index_into(place, passages, retriever, *more):
    cli.run("index", [str(passages), "--retriever", str(retriever), "--output", str(place), "--threads", "1", *more])


def settings(**values):
    return [f"--{name}={value}" for name, value in values.items()]
