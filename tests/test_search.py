"""BM25 against its formula; sparse, dense and hybrid search; words of sentences; fitting of the fusion weights."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from cozyrag.data.sentences import SentenceVectors, split_sentences
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.fitting import TRUST
from cozyrag.retrieval.hybrid import CANDIDATES, MODES, NAT, Searcher, Weights
from cozyrag.retrieval.passage_index import PassageIndex

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
    np.testing.assert_allclose(index.scores_at(index.split([question])[0], np.arange(5)), expected, atol=1e-5)
    scores, rows = index.search([question], 5)
    np.testing.assert_allclose(scores[0], expected[rows[0]], atol=1e-5)
    assert rows[0].tolist() == sorted(range(5), key=lambda row: (-round(float(expected[row]), 6), row))


def test_k_larger_than_the_corpus_returns_all_passages():
    scores, rows = LexicalIndex(TEXTS).search(["fox", "sea"], 50)
    assert scores.shape == rows.shape == (2, 5)
    assert sorted(rows[1].tolist()) == [0, 1, 2, 3, 4]


ANGLES = np.deg2rad([0, 20, 40, 60, 80])
VECTORS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


def searcher(mode, *, weights=None, aimed_at=0.0):
    """A search whose question vectors all point in one direction (degrees)."""
    table = Dataset.from_dict({"id": list("abcde"), "title": [""] * 5, "text": TEXTS})
    aim = np.array([np.cos(np.deg2rad(aimed_at)), np.sin(np.deg2rad(aimed_at))], dtype=np.float32)
    index = PassageIndex(table, VECTORS, fingerprint="f")
    return Searcher(
        index, LexicalIndex(TEXTS), encode=lambda texts: np.tile(aim, (len(texts), 1)), mode=mode, weights=weights
    )


def test_each_mode_ranks_by_its_own_scores():
    question, cosines = "red fox", VECTORS @ np.array([1, 0], dtype=np.float32)
    points = bm25(question, TEXTS)
    for mode, expected in (("dense", cosines), ("bm25", points), ("hybrid", 3 * cosines + points)):
        found = searcher(mode, weights=Weights(3.0)).search([question, question], 5)
        assert found.rows[1].tolist() == np.lexsort((np.arange(5), -expected)).tolist()
        np.testing.assert_allclose(found.scores[1], np.sort(expected)[::-1], atol=1e-5)
        assert found.scores.dtype == np.float32


def test_hybrid_search_returns_both_rankings_for_mining():
    found = searcher("hybrid").search(["Vitamin C"], 3)
    assert [ranking.tolist()[0] for ranking in found.rankings] == [[0, 1, 2], [2, 0, 1]]


def test_each_search_has_a_list_of_its_own_to_be_measured():
    vectors, words = [0, 1, 2, 3, 4], [2, 0, 1, 3, 4]
    both = searcher("hybrid").search(["Vitamin C"], 5).rows.tolist()[0]
    expected = {
        "dense": {"dense": vectors},
        "bm25": {"dense": vectors, "sparse": words},
        "hybrid": {"dense": vectors, "sparse": words, "hybrid": both},
    }
    for mode, lists in expected.items():
        plain, found = (getattr(searcher(mode), name)(["Vitamin C"], 5) for name in ("search", "each_search"))
        assert {name: rows.tolist()[0] for name, rows in found.lists.items()} == lists
        assert found.rows.tolist() == plain.rows.tolist() and found.scores.tolist() == plain.scores.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_measuring_each_search_searches_no_index_twice(mode, monkeypatch):
    counts = {"dense": 0, "sparse": 0}

    def counted(name, real):
        def search(*given):
            counts[name] += 1
            return real(*given)

        return search

    monkeypatch.setattr(PassageIndex, "search", counted("dense", PassageIndex.search))
    monkeypatch.setattr(LexicalIndex, "search", counted("sparse", LexicalIndex.search))
    searcher(mode).each_search(["Vitamin C"], 5)
    assert counts == {"dense": 1, "sparse": int(mode != "dense")}


def sentence_searcher(words=True, weights=None):
    """Five passages whose sentences have vectors of their own; all questions point to 30 degrees."""
    sentences = [split_sentences(text) for text in TEXTS]
    count = sum(map(len, sentences))
    angles = np.deg2rad(np.linspace(0, 170, count))
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    kept = SentenceVectors(vectors, np.cumsum([len(own) for own in sentences]))
    table = Dataset.from_dict({"id": list("abcde"), "title": [""] * 5, "text": TEXTS})
    aim = np.array([np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))], dtype=np.float32)
    return Searcher(
        PassageIndex(table, VECTORS, fingerprint="f", sentences=kept),
        LexicalIndex(TEXTS),
        encode=lambda texts: np.tile(aim, (len(texts), 1)),
        mode="hybrid",
        words=SentenceWords([""] * 5, sentences) if words else None,
        weights=weights,
    )


def test_with_sentences_a_passage_is_scored_by_its_best_sentence():
    search, question = sentence_searcher(weights=Weights(3.0, 0.5)), "Which red fox eats?"
    aim = np.array([np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))])
    of = search.index.sentences.of(range(5))
    cosines = np.array([(own.astype(np.float64) @ aim).max() for own in of])
    holders = {"red": 2, "fox": 2, "eats": 1}  # passages with that word
    worth = {word: math.log(1 + 5 / count) for word, count in holders.items()}
    words = [[set(re.findall(r"\w+", sentence.lower())) for sentence in split_sentences(text)] for text in TEXTS]
    shared = [max(sum(worth.get(word, 0) for word in own) for own in sentences) for sentences in words]
    expected = bm25(question, TEXTS) + 3.0 * cosines + 0.5 * np.array(shared)
    found = search.search([question], 5)
    assert found.rows[0].tolist() == np.argsort(-expected).tolist()
    # sentence vectors have half precision
    np.testing.assert_allclose(found.scores[0], np.sort(expected)[::-1], atol=2e-3)


def test_without_words_or_vectors_of_sentences_whole_passages_are_scored():
    assert sentence_searcher(words=False).fusion_weights == searcher("hybrid").fusion_weights == Weights.default(False)
    assert sentence_searcher().fusion_weights == Weights.default(True)


def test_fitted_weights_minimise_the_softmax_loss_near_the_default_ones():
    search = sentence_searcher(weights=Weights(2.0, 1.0))
    questions, relevant = ["red fox", "blue sea", "oranges", "the red hen"], [3, 1, 2, 0]
    start = np.array([1.0, 2.0, 1.0])
    lists = [points for _, points in search._pool(search.lexical, questions, search.encode(questions), 5).candidates]

    def loss(theta):
        surprise = sum(
            np.log(np.exp(points @ theta).sum()) - (points @ theta)[row]
            for points, row in zip(lists, relevant, strict=True)
        )
        return surprise + TRUST / 2 * ((theta * NAT / start - 1) ** 2).sum()

    search, facts = search.fitted(questions, relevant)
    assert facts["vectors"] == search.weights.vectors and 0 <= facts["recall@5 before"] <= facts["recall@5"] == 1.0
    grid = [
        (a, b, c) for a in np.linspace(0.05, 0.6, 12) for b in np.linspace(0, 1.5, 16) for c in np.linspace(0, 0.8, 17)
    ]
    best = np.array(min(grid, key=lambda each: loss(np.array(each))))
    fitted = np.array([search.weights.vectors, search.weights.sentence_words])
    scale = min(np.linspace(0.05, 0.6, 200), key=lambda s: loss(s * np.array([1, *fitted])))
    assert loss(scale * np.array([1, *fitted])) <= loss(best) + 1e-3


def test_fitting_favours_the_better_search_and_without_questions_changes_nothing():
    search = searcher("hybrid", aimed_at=0)  # dense search ranks row 0 first, sparse search row 2
    dense = search.fitted(["Vitamin C"] * 200, [0] * 200)[0]
    sparse = search.fitted(["Vitamin C"] * 200, [2] * 200)[0]
    assert dense.weights.vectors > Weights.default(False).vectors > sparse.weights.vectors >= 0
    assert dense.search(["Vitamin C"], 1).rows.tolist() == [[0]]
    assert sparse.search(["Vitamin C"], 1).rows.tolist() == [[2]]
    assert search.fitted([], [])[0].fusion_weights == Weights.default(False)


def test_words_of_sentences_are_deterministic_and_allow_empty_passages():
    words = SentenceWords(["", "Foxes", ""], [["Red fox.", "Fox red."], [], ["Running foxes run."]], stemmer="english")
    first, none, last = words.overlaps("a red running fox", [0, 1, 2])
    assert first[0] == first[1] == np.float32(words.rarity_of("red")) + np.float32(words.rarity_of("fox"))
    assert none.shape == (0,)
    # "running" and "run" have one stem
    assert last.tolist() == pytest.approx([words.rarity_of("fox") + words.rarity_of("run")])
    assert words.rarity_of("fox") == pytest.approx(math.log(1 + 3 / 3))
    assert sum(own.size for own in words.overlaps("x", [])) == 0


def test_if_all_passages_are_candidates_hybrid_search_is_exact():
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(random.choice(words, size=12)) for _ in range(CANDIDATES)]
    vectors = random.normal(size=(CANDIDATES, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:7]
    table = Dataset.from_dict({"id": [str(i) for i in range(CANDIDATES)], "title": [""] * CANDIDATES, "text": texts})
    index = PassageIndex(table, vectors, fingerprint="f")
    found = Searcher(
        index, LexicalIndex(texts), encode=lambda asked: queries, mode="hybrid", weights=Weights(7.0)
    ).search(texts[:7], 10)
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


def test_a_stemmer_matches_forms_of_a_word_in_search_and_scores_at():
    texts = ["The abbey was founded by monks.", "A lake in the hills.", "Birds of the coast."]
    plain, stemmed = LexicalIndex(texts), LexicalIndex(texts, stemmer="english")
    question = "Who is founding abbeys?"
    assert plain.scores_at(plain.split([question])[0], np.arange(3)).tolist() == [0.0, 0.0, 0.0]
    scores, rows = stemmed.search([question], 1)
    assert rows.tolist() == [[0]] and scores[0, 0] > 0
    np.testing.assert_allclose(stemmed.scores_at(stemmed.split([question])[0], rows[0]), scores[0], atol=1e-5)
