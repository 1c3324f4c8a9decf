"""Search by words: BM25 over titles and texts, and the rare words that a question shares with single sentences.

It finds the rare words and names that vectors blur. Left out: joining it with the dense search (hybrid.py), and saving:
it is rebuilt from the passages in seconds.
"""

import logging
import math
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer
from scipy.sparse import csc_matrix, csr_matrix

from cozyrag.data.sentences import places_of

STEMMERS = ("none", *Stemmer.algorithms())
TOKENS = r"(?u)\b\w+\b"  # one-letter words too: "vitamin C", "World War I"
logging.getLogger("bm25s").setLevel(
    logging.WARNING
)  # it sets DEBUG itself, and shows it wherever others log to the root


class _Words:
    """Texts to words: lower case, endings cut off by a Snowball stemmer. No stop words are removed: frequent words weigh
    little anyway, and lists of them exist for few languages."""

    def __init__(self, stemmer: str):
        self._stemmer = None if stemmer == "none" else Stemmer.Stemmer(stemmer)

    def of(self, texts: Sequence[str], *, ids: bool = False):
        """Lists of words, or bm25s's table of their numbers."""
        return bm25s.tokenize(
            list(texts),
            token_pattern=TOKENS,
            stopwords=None,
            stemmer=self._stemmer,
            return_ids=ids,
            show_progress=False,
        )


class LexicalIndex:
    """BM25 (Robertson & Zaragoza 2009; Lucene's variant, k1 = 1.5, b = 0.75) over texts; scores are never negative.

    Args:
        stemmer: language whose endings are cut off words (Snowball, one of STEMMERS), or "none".
    """

    def __init__(self, texts: Sequence[str], *, stemmer: str = "none"):
        self._words = _Words(stemmer)
        self._bm25 = bm25s.BM25(method="lucene")
        self._bm25.index(self._words.of(texts, ids=True), show_progress=False)
        parts = self._bm25.scores
        shape = (parts["num_docs"], len(parts["indptr"]) - 1)
        self._scores = csc_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=shape).tocsr()
        self._size = len(texts)

    @property
    def nbytes(self) -> int:
        """Bytes of its scores, which are kept by word and by text."""
        kept = self._bm25.scores
        arrays = [
            kept["data"],
            kept["indices"],
            kept["indptr"],
            self._scores.data,
            self._scores.indices,
            self._scores.indptr,
        ]
        return sum(array.nbytes for array in arrays)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, k) float32, descending, and rows (n, k) int64 of the k best texts; equal scores in the order of
        the rows."""
        k = min(k, self._size)
        rows, scores = self._bm25.retrieve(self._words.of(questions, ids=True), k=k, show_progress=False)
        order = np.lexsort((rows, -scores), axis=-1)
        return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1).astype(np.int64)

    def split(self, questions: Sequence[str]) -> list[list[str]]:
        """The words of each question, as `scores_at` and `SentenceWords.shared` take them."""
        return self._words.of(questions)

    def scores_at(self, words: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """BM25 scores (n_rows,) float32 of one question, given as its words, for chosen rows only."""
        vocabulary = self._bm25.vocab_dict
        asked = np.zeros(self._scores.shape[1], dtype=np.float32)
        np.add.at(asked, [vocabulary[word] for word in words if word in vocabulary], 1.0)
        return _row_products(self._scores, rows, asked)


class SentenceWords:
    """What the words are worth that a question shares with each sentence of a passage.

    A word is worth its rarity, log(1 + passages / passages with it); a sentence the sum over the words shared.

    Args:
        titles: of the passages; their words count where rarity is counted and belong to no sentence.
        sentences: of each passage, as its sentence vectors have them.
        stemmer: as for LexicalIndex.
    """

    def __init__(self, titles: Sequence[str], sentences: Sequence[Sequence[str]], *, stemmer: str = "none"):
        self._words = _Words(stemmer)
        self._ends = np.cumsum([len(own) for own in sentences], dtype=np.int64)
        read = [text for own in sentences for text in own]
        table = self._words.of([*read, *(title.replace("_", " ") for title in titles)], ids=True)
        names = sorted(table.vocab)  # an order that no process sees differently: sums of floats depend on it
        self._columns = {name: column for column, name in enumerate(names)}
        held = _occurrences(table.ids, [self._columns[name] for name in sorted(table.vocab, key=table.vocab.get)])
        self.rarity = np.log1p(len(sentences) / np.maximum(1, self._passages_with(held, len(sentences)))).astype(
            np.float32
        )
        self._worth = held[: len(read)]
        self._worth.data = self.rarity[self._worth.indices]

    def _passages_with(self, held: csr_matrix, passages: int) -> np.ndarray:
        """(n_words,) in how many passages, title included, each word stands."""
        counts = np.diff(self._ends, prepend=0)
        passage_of = np.concatenate([np.repeat(np.arange(passages), counts), np.arange(passages)])
        belongs = csr_matrix((np.ones(len(passage_of)), (passage_of, np.arange(len(passage_of)))))
        return np.diff((belongs @ held).tocsc().indptr)

    def rarity_of(self, word: str) -> float:
        """What one word is worth; 0 for one that no passage has."""
        columns = [self._columns[each] for each in self._words.of([word])[0] if each in self._columns]
        return math.fsum(self.rarity[columns])

    def shared(self, words: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these words are worth in each sentence of some passages, one passage after another, and (n_rows,) how
        many each has."""
        asked = np.zeros(len(self._columns), dtype=np.float32)
        asked[[self._columns[word] for word in words if word in self._columns]] = 1.0
        places, counts = places_of(self._ends, rows)
        return _row_products(self._worth, places, asked), counts

    def overlaps(self, question: str, rows: Sequence[int]) -> list[np.ndarray]:
        """For each of these passages (n_sentences,) float32: what the words are worth that each sentence shares with
        the question."""
        worth, counts = self.shared(self._words.of([question])[0], np.array(rows, dtype=np.int64))
        return np.split(worth, np.cumsum(counts)[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of its table of words by sentences."""
        return self._worth.data.nbytes + self._worth.indices.nbytes + self._worth.indptr.nbytes


def _occurrences(ids: Sequence[Sequence[int]], columns: Sequence[int]) -> csr_matrix:
    """(n_texts, n_words) with a 1 where a text has a word; `columns` gives the column of each id."""
    indptr = np.cumsum([0, *map(len, ids)])
    indices = np.array(columns, dtype=np.int32)[np.concatenate([*map(np.asarray, ids), []]).astype(np.int64)]
    held = csr_matrix((np.ones(len(indices), dtype=np.float32), indices, indptr), shape=(len(ids), len(columns)))
    held.sum_duplicates()
    held.data[:] = 1.0
    return held


def _row_products(matrix: csr_matrix, rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """matrix[rows] @ vector, (n_rows,) float32: what SciPy does in milliseconds takes a tenth of one for so few rows.

    Terms are added in the order of the columns and zeros not at all, so that rows with the same terms are exactly equal.
    """
    places, counts = places_of(matrix.indptr[1:], rows)
    terms = matrix.data[places] * vector[matrix.indices[places]]
    some = np.flatnonzero(terms)
    row_of = np.repeat(np.arange(len(counts)), counts)[some]
    return np.bincount(row_of, weights=terms[some], minlength=len(counts)).astype(np.float32)
