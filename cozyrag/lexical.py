"""Lexical search: BM25 over titles and texts, which finds the rare words and names that vectors blur.

Left out: joining it with the dense search (search.py), and saving: it is rebuilt from the passages in seconds.
"""

import logging
from collections.abc import Sequence

import bm25s
import numpy as np
from scipy.sparse import csc_matrix

TOKENS = r"(?u)\b\w+\b"  # one-letter words too: "vitamin C", "World War I"
logging.getLogger("bm25s").setLevel(
    logging.WARNING
)  # it sets DEBUG itself, and shows it wherever others log to the root


class LexicalIndex:
    """BM25 (Robertson & Zaragoza 2009; Lucene's variant, k1 = 1.5, b = 0.75) over texts; scores are never negative.

    No stop words are removed, so that it suits any language whose words are separated: frequent words weigh little anyway.
    """

    def __init__(self, texts: Sequence[str]):
        self._bm25 = bm25s.BM25(method="lucene")
        self._bm25.index(self._tokenize(texts), show_progress=False)
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
        """Scores (n, k) float32, descending, and rows (n, k) int64 of the k best texts; equal scores in the order of the rows."""
        k = min(k, self._size)
        rows, scores = self._bm25.retrieve(self._tokenize(questions), k=k, show_progress=False)
        order = np.lexsort((rows, -scores), axis=-1)
        return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1).astype(np.int64)

    def scores_at(self, question: str, rows: np.ndarray) -> np.ndarray:
        """BM25 scores (n_rows,) of one question for chosen rows only."""
        words = bm25s.tokenize([question], token_pattern=TOKENS, stopwords=None, return_ids=False, show_progress=False)[
            0
        ]
        known = [self._bm25.vocab_dict[word] for word in words if word in self._bm25.vocab_dict]
        asked = (
            np.bincount(known, minlength=self._scores.shape[1]).astype(np.float32)
            if known
            else np.zeros(self._scores.shape[1], dtype=np.float32)
        )
        return self._scores[rows] @ asked

    def _tokenize(self, texts: Sequence[str]):
        return bm25s.tokenize(list(texts), token_pattern=TOKENS, stopwords=None, show_progress=False)
