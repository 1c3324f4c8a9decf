"""Check a saved pair: generator, retriever and index belong together, and the vectors are the retriever's.

A fingerprint can be right and the vectors wrong, so some passages are encoded again and a question is answered. Left
out: whether loss terms move their models (loss_check.py), and index.faiss, which is never read.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cozyrag.errors import InputError
from cozyrag.models.int8_encoding import FLOAT32
from cozyrag.models.retriever import Retriever
from cozyrag.pipeline import CozyRAG
from cozyrag.retrieval.faiss_index import STRETCH
from cozyrag.retrieval.opening import Index

REENCODED = 32  # passages of an index that are encoded again
NEAR = 0.999  # least cosine of the two vectors of a passage; another batch size changes the 7th digit
NEAR_INT8 = 0.97  # the same with an int8 index: at least 0.99 was measured
UNIT = 1e-3  # tolerance of the length of a vector


def check_pair(folder: Path) -> Iterator[str]:
    """Check an output folder; yields a line for each check that passes. Raises InputError for the first that fails."""
    if not folder.is_dir():
        raise InputError(
            f"Expected the output folder of a run, there is none at {folder.absolute()}. Check the path; to check "
            "settings instead of a folder, begin with a setting: `cozyrag doctor --questions FILE`."
        )
    pair = CozyRAG.from_pretrained(folder)  # raises InputError for models of different pairs, and for missing rows
    index, fingerprint = pair.index, pair.retriever.fingerprint()
    yield f"the fingerprint of the index and of cozyrag.json is the retriever's: {fingerprint}"
    _check_lengths(index)
    yield f"{len(index)} passages, {len(index.vectors)} vectors of {index.vectors.shape[1]} dimensions, all of length 1"
    yield _check_vectors(index, pair.retriever)
    yield _check_answer(pair)


def _check_lengths(index: Index) -> None:
    starts = range(0, len(index), STRETCH)
    lengths = np.concatenate([np.linalg.norm(index.vectors[start : start + STRETCH], axis=1) for start in starts])
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT))  # true for NaN, too
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"Expected vectors of length 1 in the index, found {len(wrong)} of {len(lengths)} with another length; the "
            f"first has {lengths[row]:.4g} (row {row}, passage {index.passages.ids[row]!r}). Searches would rank them "
            "wrongly. Copy the index again, or train again."
        )


def _check_vectors(index: Index, retriever: Retriever) -> str:
    """Encode evenly spread passages again and compare."""
    rows = np.unique(np.linspace(0, len(index) - 1, REENCODED).round().astype(int))
    recompute = retriever.encode(index.passages.select(rows.tolist()), kind="document", batch_size=REENCODED)
    near = NEAR if index.precision == FLOAT32 else NEAR_INT8
    cosines = np.einsum("ij,ij->i", recompute, index.vectors[rows])  # all are of length 1
    worst = int(np.argmin(cosines))
    if cosines[worst] <= near:
        row = int(rows[worst])
        raise InputError(
            f"Expected the vectors of the index to be the retriever's, but passage {index.passages.ids[row]!r} (row "
            f"{row}), encoded again, has cosine {cosines[worst]:.4f} with its stored vector instead of 1. Searches "
            "would find the wrong passages. Train again, or copy the index that was saved with this retriever."
        )
    return f"{len(rows)} passages encoded again: cosine with the stored vectors at least {min(cosines[worst], 1):.6f}"


def _check_answer(pair: CozyRAG) -> str:
    passages = pair.index.passages
    question = f"What is {(passages.titles[0] or passages.ids[0]).replace('_', ' ')}?"
    answer = pair.answer(question)
    if not math.isfinite(answer.score):
        raise InputError(
            f"Expected an answer to {question!r}, but the generator's probabilities are NaN, so its weights are "
            "unusable. Resume from an earlier checkpoint, or train again with a lower --generator_learning_rate."
        )
    return f"the generator answers {question!r} with {answer.text!r} (certainty {answer.score:.2f})"
