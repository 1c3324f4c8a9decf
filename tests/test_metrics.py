"""The numbers against hand-worked cases and an independent transcription of the official script."""

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.metrics import (
    bootstrap_interval,
    contains_answer,
    exact_match,
    f1,
    normalize_answer,
    paired_bootstrap,
    rank_of,
    recall_at,
    reciprocal_rank,
)


def official_normalize(s):
    """evaluate-v1.1.py, the four steps in its order."""
    lowered = s.lower()
    exclude = set(string.punctuation)
    bare = "".join(ch for ch in lowered if ch not in exclude)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def official_f1(prediction, truth):
    prediction_tokens = official_normalize(prediction).split()
    truth_tokens = official_normalize(truth).split()
    common = Counter(prediction_tokens) & Counter(truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(truth_tokens)
    return (2 * precision * recall) / (precision + recall)


WORDS = st.lists(st.sampled_from(["the", "A", "an", "cat", "Cat's", "dog", "u.s.", "-", "ä", "\u2028"]), max_size=6)
TEXT = st.one_of(st.text(max_size=12), WORDS.map(" ".join))


@settings(deadline=None)  # a busy machine is no fault
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_scores_agree_with_the_official_script(prediction, references):
    assert normalize_answer(prediction) == official_normalize(prediction)
    wanted = max(official_normalize(prediction) == official_normalize(reference) for reference in references)
    assert exact_match(prediction, references) == float(wanted)
    assert f1(prediction, references) == max(official_f1(prediction, reference) for reference in references)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat's  pajamas!", "cats pajamas"),
        ("An apple, a pear", "apple pear"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("«Ä»", "«ä»"),
        ("the", ""),
    ],
)
def test_normalize(text, normal):
    assert normalize_answer(text) == normal


def test_hand_worked_scores():
    assert exact_match("The October 1973.", ["1972", "october 1973"]) == 1.0
    assert exact_match("October", ["October 1973"]) == 0.0
    # 1 of 1 predicted words right, 1 of 2 wanted words found: 2 * 1 * 0.5 / 1.5
    assert f1("October", ["October 1973"]) == pytest.approx(2 / 3)
    # two of three "x" count: precision 2/3, recall 2/2
    assert f1("x x x", ["x x"]) == pytest.approx(0.8)
    assert f1("October", ["1973", "October"]) == 1.0
    assert f1("red", ["blue"]) == 0.0


def test_no_references_means_no_answer():
    assert [(exact_match(p, []), f1(p, [])) for p in ("", "the.", "Ada")] == [(1.0, 1.0), (1.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        ("She was born in the 1815s.", ["1815"], False),
        ("She was born in 1815.", ["1815"], True),
        ("Ada, Countess of Lovelace", ["nobody", "the countess of Lovelace"], True),
        ("Ada", ["ada"], True),
        ("Ada Lovelace", ["Lovelace Ada"], False),
        ("anything", ["", "the", "?"], False),
        ("anything", [], False),
    ],
)
def test_contains_answer(text, answers, found):
    assert contains_answer(normalize_answer(text), answers) is found


def test_ranks():
    assert rank_of(["x", "y", "z"], {"z", "y"}) == 2
    assert rank_of(["x"], {"y"}) is None
    assert rank_of([], {"y"}) is None
    assert [recall_at(rank, 5) for rank in (1, 5, 6, None)] == [1.0, 1.0, 0.0, 0.0]
    assert [reciprocal_rank(rank) for rank in (1, 4, 10, 11, None)] == [1.0, 0.25, 0.1, 0.0, 0.0]
    assert reciprocal_rank(11, cutoff=20) == 1 / 11


def test_interval_of_a_coin_is_the_binomial_one():
    values = np.repeat([0.0, 1.0], 200)
    low, high = bootstrap_interval(values, resamples=20_000)
    # 400 fair tosses: the 2.5% and 97.5% points of Binomial(400, 1/2) are 180 and 220.
    assert low == pytest.approx(180 / 400, abs=0.0026)
    assert high == pytest.approx(220 / 400, abs=0.0026)
    assert (low, high) == bootstrap_interval(values, resamples=20_000)
    assert (low, high) != bootstrap_interval(values, resamples=300, seed=1)
    narrow = bootstrap_interval(values, level=0.5, resamples=20_000)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)


def test_interval_covers_as_often_as_it_says():
    chance = np.random.default_rng(5)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(chance.normal(size=80), resamples=400, seed=seed)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.98  # 0.95 within about three standard errors of 300 draws


def test_interval_does_not_depend_on_the_blocks(monkeypatch):
    values = np.arange(101.0)
    whole = bootstrap_interval(values, resamples=90)
    monkeypatch.setattr("cozyrag.metrics._DRAWS", 2020)  # 20 resamples of 101 at once: an even number of draws
    assert bootstrap_interval(values, resamples=90) == whole


def test_paired_bootstrap():
    before = np.tile([0.0, 1.0, 0.0, 1.0], 50)
    better = before.copy()
    better[:40:2] = 1.0  # 20 of 200 rows go from 0 to 1
    mean, low, high, p_not_better = paired_bootstrap(before, better)
    assert mean == pytest.approx(0.1)
    assert low == pytest.approx(0.06, abs=0.0051)  # Binomial(200, 0.1): 12 and 29 of 200
    assert high == pytest.approx(0.145, abs=0.0051)
    assert p_not_better == 0.0
    assert paired_bootstrap(better, before)[0] == pytest.approx(-0.1)
    assert paired_bootstrap(better, before)[3] == 1.0
    assert paired_bootstrap(before, before) == (0.0, 0.0, 0.0, 1.0)


def test_paired_p_of_a_balanced_difference():
    # 100 rows up, 100 down: the resampled sum is Binomial(200, 1/2), and P(sum <= 100) = 1/2 + P(sum = 100)/2 = 0.528.
    after = np.repeat([1.0, -1.0], 100)
    assert paired_bootstrap(np.zeros(200), after, resamples=20_000)[3] == pytest.approx(0.528, abs=0.015)


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((2, 2))])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="shape"):
        bootstrap_interval(values)
    with pytest.raises(ValueError, match="shape"):
        paired_bootstrap(values, values)


def test_bootstrap_refuses_other_arguments():
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(np.zeros(2), level=95)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval(np.zeros(2), resamples=0)
