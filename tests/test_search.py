"""BM25 equals its formula; the three ways to search; the weighted sum and how its weight is chosen."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from cozyrag.index import PassageIndex
from cozyrag.lexical import LexicalIndex
from cozyrag.search import CANDIDATES, DEFAULT_WEIGHT, WEIGHTS, Searcher

TEXTS = [
    "The red fox runs over the hill.",
    "A blue river runs to the sea, and the sea is blue.",
    "Vitamin C is found in oranges.",
    "The fox sleeps. The fox eats. The red hen hides.",
    "Nothing of note.",
]


def bm25(question, texts, *, k1=1.5, b=0.75):
    """Lucene's BM25, written out: sum over question words of idf * tf / (tf + k1 (1 - b + b length / mean length))."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = np.zeros(len(texts))
    for term in re.findall(r"\w+", question.lower()):
        holders = sum(term in each for each in words)
        idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
        for row, each in enumerate(words):
            tf = Counter(each)[term]
            scores[row] += idf * tf / (tf + k1 * (1 - b + b * len(each) / mean))
    return scores


@pytest.mark.parametrize("question", ["red fox", "Which vitamin is C?", "the sea the sea", "zebra", ""])
def test_bm25_is_the_formula_and_agrees_with_itself_at_chosen_rows(question):
    index = LexicalIndex(TEXTS)
    expected = bm25(question, TEXTS)
    np.testing.assert_allclose(index.scores_at(question, np.arange(5)), expected, atol=1e-5)
    scores, rows = index.search([question], 5)
    np.testing.assert_allclose(scores[0], expected[rows[0]], atol=1e-5)
    assert rows[0].tolist() == sorted(range(5), key=lambda row: (-round(float(expected[row]), 6), row))


def test_more_passages_asked_for_than_there_are_gives_all():
    scores, rows = LexicalIndex(TEXTS).search(["fox", "sea"], 50)
    assert scores.shape == rows.shape == (2, 5)
    assert sorted(rows[1].tolist()) == [0, 1, 2, 3, 4]


ANGLES = np.deg2rad([0, 20, 40, 60, 80])
VECTORS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


def searcher(mode, *, weight=DEFAULT_WEIGHT, aimed_at=0.0):
    """A search whose question vectors all point at an angle."""
    table = Dataset.from_dict({"id": list("abcde"), "title": [""] * 5, "text": TEXTS})
    aim = np.array([np.cos(np.deg2rad(aimed_at)), np.sin(np.deg2rad(aimed_at))], dtype=np.float32)
    index = PassageIndex(table, VECTORS, fingerprint="f")
    return Searcher(
        index, LexicalIndex(TEXTS), encode=lambda texts: np.tile(aim, (len(texts), 1)), mode=mode, weight=weight
    )


def test_each_mode_ranks_by_its_own_scores():
    question, cosines = "red fox", VECTORS @ np.array([1, 0], dtype=np.float32)
    words = bm25(question, TEXTS)
    for mode, expected in (("dense", cosines), ("bm25", words), ("hybrid", 3 * cosines + words)):
        found = searcher(mode, weight=3).search([question, question], 5)
        assert found.rows[1].tolist() == np.lexsort((np.arange(5), -expected)).tolist()
        np.testing.assert_allclose(found.scores[1], np.sort(expected)[::-1], atol=1e-5)
        assert found.scores.dtype == np.float32


def test_hybrid_gives_both_rankings_to_mine_from():
    found = searcher("hybrid").search(["Vitamin C"], 3)
    assert [ranking.tolist()[0] for ranking in found.rankings] == [[0, 1, 2], [2, 0, 1]]


def test_the_weight_is_the_one_with_the_best_recall_nearest_to_the_usual():
    # vectors all say row 0, words say row 2: only a small weight finds row 2 first, only a large one row 0
    by_words = searcher("hybrid", aimed_at=0)
    recall = by_words.choose_weight(["Vitamin C", "Vitamin C"], [2, 2], k=1)
    assert recall[0.0] == 1.0 and recall[100.0] == 0.0 and set(recall) == set(WEIGHTS)
    best = [weight for weight in WEIGHTS if recall[weight] == 1.0]
    assert by_words.weight == min(best, key=lambda weight: abs(weight - DEFAULT_WEIGHT))
    by_vectors = searcher("hybrid", aimed_at=0)
    recall = by_vectors.choose_weight(["Vitamin C"], [0], k=1)
    assert recall[100.0] == 1.0 and recall[0.0] == 0.0
    assert recall[by_vectors.weight] == 1.0


def test_the_sum_over_candidates_equals_the_sum_over_everything_when_all_are_candidates():
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(random.choice(words, size=12)) for _ in range(CANDIDATES)]
    vectors = random.normal(size=(CANDIDATES, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:7]
    table = Dataset.from_dict({"id": [str(i) for i in range(CANDIDATES)], "title": [""] * CANDIDATES, "text": texts})
    index = PassageIndex(table, vectors, fingerprint="f")
    found = Searcher(index, LexicalIndex(texts), encode=lambda asked: queries, mode="hybrid", weight=7.0).search(
        texts[:7], 10
    )
    for i in range(7):
        everything = 7.0 * vectors @ queries[i] + bm25(texts[i], texts)
        np.testing.assert_allclose(found.scores[i], np.sort(everything)[::-1][:10], atol=1e-4)


@pytest.mark.parametrize(("mode", "lexical"), [("sparse", True), ("hybrid", False), ("bm25", False)])
def test_an_unknown_mode_or_a_missing_index_is_refused(mode, lexical):
    table = Dataset.from_dict({"id": list("abcde"), "title": [""] * 5, "text": TEXTS})
    with pytest.raises(ValueError, match=mode):
        Searcher(
            PassageIndex(table, VECTORS, fingerprint="f"),
            LexicalIndex(TEXTS) if lexical else None,
            encode=lambda texts: VECTORS[:1],
            mode=mode,
        )


def test_a_stemmer_lets_forms_of_a_word_find_each_other_in_both_ways_of_scoring():
    texts = ["The abbey was founded by monks.", "A lake in the hills.", "Birds of the coast."]
    plain, stemmed = LexicalIndex(texts), LexicalIndex(texts, stemmer="english")
    question = "Who is founding abbeys?"
    assert plain.scores_at(question, [0, 1, 2]).tolist() == [0.0, 0.0, 0.0]
    scores, rows = stemmed.search([question], 1)
    assert rows.tolist() == [[0]] and scores[0, 0] > 0
    np.testing.assert_allclose(stemmed.scores_at(question, rows[0]), scores[0], atol=1e-5)
