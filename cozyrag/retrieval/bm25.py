"""Sparse search: BM25 over titles and texts, and the rare words that a question shares with single sentences.

It finds the rare words and names that dense vectors blur. Left out: fusion with dense search (hybrid.py), and saving:
the index is rebuilt from the passages in seconds. Corpora for which that takes too long or too much memory have their
words on the disk (words_on_disk.py).
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import bm25s
import numpy as np
import Stemmer
from scipy.sparse import csc_matrix, csr_matrix

from cozyrag.data.matching import search_words
from cozyrag.data.sentences import places_of

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG, which shows once the root logger has a handler

K1, B = 1.5, 0.75  # saturation of repeated words, and how much the length of a text counts


def stemmed_words(stemmer: str) -> Callable[[str], list[str]]:
    """The function that splits a text into its words as `LexicalIndex` does, for one text at a time."""
    if stemmer == "none":
        return search_words
    stem = lru_cache(1 << 17)(Stemmer.Stemmer(stemmer).stemWord)
    return lambda text: [stem(word) for word in search_words(text)]


def _tokenizer(stemmer: str) -> Callable:
    """bm25s.tokenize for the words of matching.py, one-letter words too ("vitamin C"), stemmed by Snowball.

    No stop words are removed: frequent words weigh little anyway, and stop word lists exist for few languages.
    """
    stem = None if stemmer == "none" else Stemmer.Stemmer(stemmer)
    split = partial(
        bm25s.tokenize, lower=False, token_pattern=r"\S+", stopwords=None, stemmer=stem, show_progress=False
    )
    return lambda texts, **options: split([" ".join(search_words(text)) for text in texts], **options)


class LexicalIndex:
    """BM25 (Robertson & Zaragoza 2009; Lucene's variant) over texts; scores are never negative.

    Args:
        stemmer: Snowball stemmer of a language (one of STEMMERS), or "none".
    """

    def __init__(self, texts: Sequence[str], *, stemmer: str = "none"):
        self._tokenize = _tokenizer(stemmer)
        self._bm25 = bm25s.BM25(k1=K1, b=B, method="lucene")
        found = self._tokenize(list(texts))
        # bm25s needs one word: without any, all texts get "", which no question has.
        self._bm25.index(found if found.vocab else ([[0]] * len(texts), {"": 0}), show_progress=False)
        parts = self._bm25.scores
        shape = (parts["num_docs"], len(parts["indptr"]) - 1)
        self._scores = csc_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=shape).tocsr()
        self._size = len(texts)

    @property
    def nbytes(self) -> int:
        """Bytes of the scores, which are stored by word and by text."""
        kept, scores = self._bm25.scores, self._scores
        arrays = (kept["data"], kept["indices"], kept["indptr"], scores.data, scores.indices, scores.indptr)
        return sum(array.nbytes for array in arrays)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, k) float32, descending, and rows (n, k) int64 of the k best texts; ties are sorted by row."""
        asked = self._tokenize(list(questions))
        rows, scores = self._bm25.retrieve(asked, k=min(k, self._size), show_progress=False)
        order = np.lexsort((rows, -scores), axis=-1)
        return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1).astype(np.int64)

    def split(self, questions: Sequence[str]) -> list[list[str]]:
        """The words of each question, as `scores_at` and `SentenceWords.shared` take them."""
        return self._tokenize(list(questions), return_ids=False)

    def scores_at(self, words: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """BM25 scores (n_rows,) float32 of one question, given as its words, for chosen rows only."""
        vocabulary = self._bm25.vocab_dict
        asked = np.zeros(self._scores.shape[1], dtype=np.float32)
        np.add.at(asked, [vocabulary[word] for word in words if word in vocabulary], 1.0)
        return _row_products(self._scores, rows, asked)


class SentenceWords:
    """The summed rarity of the words that a question shares with each sentence of a passage.

    The rarity of a word is log(1 + passages / passages with it).

    Args:
        titles: of the passages; their words count for the rarity and belong to no sentence.
        sentences: of each passage, in the order of its sentence vectors.
        stemmer: as for LexicalIndex.
    """

    def __init__(self, titles: Sequence[str], sentences: Sequence[Sequence[str]], *, stemmer: str = "none"):
        self._tokenize = _tokenizer(stemmer)
        self._ends = np.cumsum([len(own) for own in sentences], dtype=np.int64)
        texts = [text for own in sentences for text in own]
        table = self._tokenize([*texts, *(title.replace("_", " ") for title in titles)])
        names = sorted(table.vocab)  # the same order in every process: sums of floats depend on it
        self._columns = {name: column for column, name in enumerate(names)}
        held = _occurrences(table.ids, [self._columns[name] for name in sorted(table.vocab, key=table.vocab.get)])
        holders = np.maximum(1, self._passages_with(held, len(sentences)))
        self.rarity = np.log1p(len(sentences) / holders).astype(np.float32)
        self._worth = held[: len(texts)]
        self._worth.data = self.rarity[self._worth.indices]

    def _passages_with(self, held: csr_matrix, passages: int) -> np.ndarray:
        """(n_words,) the number of passages that contain each word, in the title or the text."""
        counts = np.diff(self._ends, prepend=0)
        passage_of = np.concatenate([np.repeat(np.arange(passages), counts), np.arange(passages)])
        belongs = csr_matrix((np.ones(len(passage_of)), (passage_of, np.arange(len(passage_of)))))
        return np.diff((belongs @ held).tocsc().indptr)

    def rarity_of(self, word: str) -> float:
        """The rarity of one word; 0 if no passage has it."""
        [words] = self._tokenize([word], return_ids=False)
        return math.fsum(self.rarity[[self._columns[each] for each in words if each in self._columns]])

    def shared(self, words: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The summed rarity of these words in each sentence of some passages, and (n_rows,) the sentences of each."""
        asked = np.zeros(len(self._columns), dtype=np.float32)
        asked[[self._columns[word] for word in words if word in self._columns]] = 1.0
        places, counts = places_of(self._ends, rows)
        return _row_products(self._worth, places, asked), counts

    def overlaps(self, question: str, rows: Sequence[int]) -> list[np.ndarray]:
        """For each of these passages (n_sentences,) float32: the summed rarity of words shared with the question."""
        worth, counts = self.shared(self._tokenize([question], return_ids=False)[0], np.array(rows, dtype=np.int64))
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
    """matrix[rows] @ vector, (n_rows,) float32, ten times as fast as SciPy for so few rows.

    Terms are added in the order of the columns, without zeros, so that rows with the same terms are exactly equal.
    """
    places, counts = places_of(matrix.indptr[1:], rows)
    terms = matrix.data[places] * vector[matrix.indices[places]]
    some = np.flatnonzero(terms)
    row_of = np.repeat(np.arange(len(counts)), counts)[some]
    return np.bincount(row_of, weights=terms[some], minlength=len(counts)).astype(np.float32)
