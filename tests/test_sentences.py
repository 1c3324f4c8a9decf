"""The sentence rules do not change unnoticed: stored vectors pair up with sentences by number alone."""

import hashlib

import numpy as np
import pytest
import tiny
from datasets import Dataset

from cozyrag.data.sentences import RULES, SentenceVectors, split_sentences
from cozyrag.retrieval.passage_index import PassageIndex

TEXTS = (
    "One. Two! Is it three? Yes.",
    'He said "No." Then he left. (It was late.) Nobody knew.',
    "Dr. Smith met J. R. R. Tolkien at 5 p.m. on Jan. 3. They spoke.",
    "A line\nanother line\n\n  a third  \n",
    "これは文です。これも文です。「はい。」と言った。",
    "यह एक वाक्य है। यह दूसरा है।",
    "No end",
    "  \n ",
    "Er sagte „nein.“ «Et puis ?» Он ушёл… Потом. First one. ¿Qué? ¡Sí! «Да», — сказал.",
    "It cost $3.50. 1999 was a year... and so on. i began low.",
)


def test_changed_rules_need_a_new_number():
    """With every change of the rules, increase RULES and update the digest here."""
    digest = hashlib.sha256(repr([split_sentences(text) for text in TEXTS]).encode()).hexdigest()[:16]
    assert (RULES, digest) == (2, "4c5b4a7bf99f1adf"), "increase cozyrag.data.sentences.RULES"


def kept(folder, monkeypatch, *, rules):
    """The sentence vectors of an index that a version with these rules wrote, as this version reads them."""
    passages, _ = tiny.corpus(3)
    table = Dataset.from_list(passages).select_columns(["id", "title", "text"])
    sentences = SentenceVectors(np.ones((9, 4), np.float16), np.array([3, 6, 9]))
    monkeypatch.setattr("cozyrag.retrieval.index_file.RULES", rules)
    PassageIndex(table, np.eye(3, 4, dtype=np.float32), fingerprint="f", sentences=sentences).save(folder)
    monkeypatch.setattr("cozyrag.retrieval.index_file.RULES", RULES)
    return PassageIndex.load(folder, fingerprint="f").sentences


def test_vectors_of_other_rules_are_not_used_with_a_warning(tmp_path, monkeypatch):
    assert kept(tmp_path / "same", monkeypatch, rules=RULES).ends.tolist() == [3, 6, 9]
    with pytest.warns(UserWarning, match="split sentences differently.*Make the index again"):
        assert kept(tmp_path / "other", monkeypatch, rules=RULES + 1) is None
