"""SQuAD's questions over Wikipedia articles: split articles into passages and find the gold passages.

Left out: which files these are (suites.py).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from accelerate.utils import tqdm
from datasets import Dataset

from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.passages import features
from cozyrag.data.questions import Questions, take
from cozyrag.data.readers import read_rows
from cozyrag.data.rows import BadRows
from cozyrag.data.sentences import split_sentences
from cozyrag.evaluation.metrics import normalize_answer

COVERAGE = 0.5  # share of a paragraph's runs of words that the article must contain
RUN = 8  # words
CHUNK_WORDS = 100


def cut(text: str, words: int = CHUNK_WORDS) -> list[str]:
    """Passages of whole sentences with about `words` words each. A rest below a third joins the last one."""
    passages: list[list[str]] = []
    size = words
    for sentence in split_sentences(text):
        if size >= words:
            passages.append([])
            size = 0
        passages[-1].append(sentence)
        size += len(sentence.split())
    if len(passages) > 1 and size < words / 3:
        rest = passages.pop()
        passages[-1] += rest
    return [" ".join(sentences) for sentences in passages]


def _rows(path: str, columns: tuple[str, ...]) -> Iterator[dict]:
    return (row.values for row in read_rows(path, split="train", known=columns, bad=BadRows()))


def _passages_of(path: str) -> Dataset:
    """The passages of all articles of a file, with ids ARTICLE-NUMBER."""
    table: dict[str, list[str]] = {"id": [], "title": [], "text": []}
    for article in tqdm(_rows(path, ("id", "title", "text")), desc="splitting articles", unit="article"):
        for number, text in enumerate(cut(article["text"])):
            table["id"].append(f"{article['id']}-{number}")
            table["title"].append(article["title"])
            table["text"].append(text)
    return Dataset.from_dict(table, features=features())


def _runs(text: str) -> set[str]:
    words = normalize_answer(text).split()
    return {" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


@dataclass(frozen=True)
class Articles:
    """Passages of articles. `rows_of`: by SHA-1 of a SQuAD paragraph, the rows of the article that contains it."""

    passages: Dataset
    texts: list[str]
    rows_of: dict[str, list[int]]

    @classmethod
    def read(cls, articles: str, places: str) -> "Articles":
        """Read the articles from one file, and from the other which paragraphs each of them contains."""
        passages = _passages_of(articles)
        rows_of: dict[str, list[int]] = {}
        for row, key in enumerate(passages["id"][:]):
            rows_of.setdefault(key.rpartition("-")[0], []).append(row)
        held = {
            row["context_sha1"]: rows_of[row["corpus_id"]]
            for row in _rows(places, ("context_sha1", "corpus_id", "coverage"))
            if row["coverage"] >= COVERAGE and row["corpus_id"] in rows_of
        }
        return cls(passages, passages["text"][:], held)

    def find(self, questions: Questions, limit: int | None) -> tuple[Dataset, int]:
        """A sample of the questions whose paragraph is in an article, with gold passages; and how many there are."""
        assert questions.passages is not None  # SQuAD contains its paragraphs
        carried = questions.passages[:]
        paragraphs = dict(zip(carried["id"], carried["text"], strict=True))
        sha1 = {key: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for key, text in paragraphs.items()}
        there = [row for row, key in enumerate(questions.table["passage_id"][:]) if sha1[key] in self.rows_of]
        chosen = take(questions.table.select(there), limit, 0)[:]
        asked = list(zip(chosen["passage_id"], chosen["answers"], strict=True))
        gold = [
            self.gold(paragraphs[key], answers, self.rows_of[sha1[key]])
            for key, answers in tqdm(asked, desc="finding gold passages", unit="question")
        ]
        return Dataset.from_dict(chosen | {"passage_id": gold}, features=questions.table.features), len(there)

    def gold(self, paragraph: str, answers: list[str], rows: list[int]) -> str | None:
        """The passage that contains an answer and shares most runs with the paragraph; None if there is none."""
        runs = _runs(paragraph)
        shared = {
            row: len(runs & _runs(self.texts[row]))
            for row in rows
            if contains_answer(matching_form(self.texts[row]), answers)
        }
        best = max(shared, key=lambda row: (shared[row], -row), default=None)
        return self.passages[best]["id"] if best is not None and shared[best] else None
