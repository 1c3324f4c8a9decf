"""The metrics against cases computed by hand and an independent transcription of the official script."""

import math
import random
import re
import string
from collections import Counter

import numpy as np
import pytest
import pytrec_eval
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.evaluation.metrics import (
    bleu,
    bleu_interval,
    bleu_statistics,
    bootstrap_interval,
    exact_match,
    f1,
    hit_at,
    ndcg_at,
    normalize_answer,
    paired_bootstrap,
    ranks_of,
    recall_at,
    reciprocal_rank,
    rouge_l,
    same_letters,
)


def official_normalize(s):
    """evaluate-v1.1.py: the four steps in its order."""
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


@settings(deadline=None)  # the machine may be busy
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


def test_scores_by_hand():
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
    ("prediction", "references", "same"),
    [
        ("co operation", ["co-operation"], True),
        ("U. S.", ["nobody", "the US"], True),
        ("Zurich", ["Zürich"], True),
        ("six \u2013 seven", ["six-seven"], True),
        ("\uff11\uff19", ["19"], True),  # full-width digits
        ("in 1815", ["1815"], False),
        ("", ["the"], False),  # nothing remains of either
        ("", [], False),
    ],
)
def test_same_letters(prediction, references, same):
    assert same_letters(prediction, references) is same


def test_ranks():
    assert ranks_of(["x", "y", "z"], {"z", "y", "w"}) == [2, 3]
    assert ranks_of(["x"], {"y"}) == []
    assert ranks_of([], {"y"}) == []
    assert ranks_of(["y", "y", "x"], ["y", "x", "x"]) == [1, 3]  # a repeat occupies its rank and does not count


def test_rank_metrics_by_hand():
    assert (recall_at([2], 5), ndcg_at([1], 5)) == (1.0, 1.0)  # one relevant item by default
    assert (reciprocal_rank([10]), reciprocal_rank([11])) == (0.1, 0.0)
    ranks = ranks_of(list("abcdef"), {"b", "e", "z"})  # 2 and 5; one of three relevant items is not found
    assert [recall_at(ranks, k, 3) for k in (1, 2, 5, 100)] == [0, 1 / 3, 2 / 3, 2 / 3]
    assert [hit_at(ranks, k) for k in (1, 2, 100)] == [0.0, 1.0, 1.0]
    assert [reciprocal_rank(ranks, cutoff) for cutoff in (1, 2, 10)] == [0.0, 0.5, 0.5]
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at(ranks, 10, 3) == pytest.approx((1 / math.log2(3) + 1 / math.log2(6)) / ideal)
    assert ndcg_at(ranks, 2, 3) == pytest.approx(
        (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    )  # the ideal is truncated, too
    assert ndcg_at([1, 2, 3], 100, 3) == 1.0  # k exceeds the number of items
    assert [measure([], 5) for measure in (recall_at, hit_at, reciprocal_rank, ndcg_at)] == [0.0] * 4


@pytest.mark.slow
def test_rank_metrics_agree_with_trec_eval():
    """pytrec_eval is the C code of trec_eval; it ranks by score, so the scores are distinct."""
    rng = random.Random(7)
    runs, judged = {}, {}
    for number in range(1000):
        ids = [f"d{i}" for i in range(rng.randint(1, 40))]
        rng.shuffle(ids)
        runs[f"q{number}"] = ids[: rng.randint(1, len(ids))]
        judged[f"q{number}"] = {key: 1 for key in rng.sample(ids, rng.randint(1, len(ids)))}
    measures = {"recall.1,5,10,20", "success.1,5,10", "ndcg_cut.1,5,10,100", "recip_rank"}
    scored = {query: {key: 1000.0 - place for place, key in enumerate(ids)} for query, ids in runs.items()}
    theirs = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(scored)
    for query, ids in runs.items():
        ranks, count = ranks_of(ids, judged[query]), len(judged[query])
        ours = {f"recall_{k}": recall_at(ranks, k, count) for k in (1, 5, 10, 20)}
        ours |= {f"success_{k}": hit_at(ranks, k) for k in (1, 5, 10)}
        ours |= {f"ndcg_cut_{k}": ndcg_at(ranks, k, count) for k in (1, 5, 10, 100)}
        ours["recip_rank"] = reciprocal_rank(ranks, 1000)
        assert ours == pytest.approx(theirs[query]), query


@pytest.mark.slow
def test_em_and_f1_agree_with_the_official_script_on_10000_random_cases():
    rng = random.Random(3)
    words = [
        "the",
        "a",
        "An",
        "river",
        "Rivers",
        "1,815",
        "1815",
        "U.S.",
        "co-op",
        "(red)",
        "\u00e9t\u00e9",
        "\u2013",
        "",
        "fox.",
    ]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(0, 7)))

    for _ in range(10_000):
        prediction, references = text(), [text() for _ in range(rng.randint(1, 2))]
        matched = any(official_normalize(prediction) == official_normalize(reference) for reference in references)
        assert exact_match(prediction, references) == float(matched)
        assert f1(prediction, references) == max(official_f1(prediction, reference) for reference in references)


def test_rouge_l_takes_the_best_reference_and_empty_is_correct_without_any():
    assert rouge_l("the red fox", ["a blue river", "red fox"]) == pytest.approx(0.8)  # 2 of 3 words, 2 of 2
    assert rouge_l("", ["fox"]) == 0.0
    assert (rouge_l("", []), rouge_l("fox", [])) == (1.0, 0.0)


def test_bleu_from_statistics_is_sacrebleus_corpus_bleu():
    predictions = ["the red fox lives in a house of stone", "the river is blue", "", "1815"]
    references = [
        ["the red fox lives in a house", "a red fox lives in a stone house"],
        ["the blue river is long"],
        ["x"],
        ["1815"],
    ]
    statistics = np.stack([bleu_statistics(p, r) for p, r in zip(predictions, references, strict=True)])
    streams = [[own[n] if n < len(own) else None for own in references] for n in range(2)]
    assert bleu(statistics.sum(axis=0)) == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score)
    assert bleu_statistics("fox", []).tolist() == [0.0] * 10
    assert bleu(np.zeros(10)) == 0.0
    low, high = bleu_interval(statistics)
    assert 0 <= low < bleu(statistics.sum(axis=0)) < high <= 100
    assert bleu_interval(statistics[:1]) == (pytest.approx(bleu(statistics[0])),) * 2


def test_the_interval_of_bleu_resamples_corpora():
    rows = [
        ("the red fox lives here", ["the red fox lives there"]),
        ("a blue river", ["the blue river"]),
        ("no", ["yes"]),
    ]
    statistics = np.stack([bleu_statistics(*row) for row in rows])
    draws = np.random.default_rng(0).integers(3, size=(1000, 3), dtype=np.int32)
    scores = [bleu(statistics[drawn].sum(axis=0)) for drawn in draws]
    assert bleu_interval(statistics) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_interval_of_coin_tosses_is_binomial():
    values = np.repeat([0.0, 1.0], 200)
    low, high = bootstrap_interval(values, resamples=20_000)
    # 400 fair tosses: the 2.5% and 97.5% points of Binomial(400, 1/2) are 180 and 220.
    assert low == pytest.approx(180 / 400, abs=0.0026)
    assert high == pytest.approx(220 / 400, abs=0.0026)
    assert (low, high) == bootstrap_interval(values, resamples=20_000)
    assert (low, high) != bootstrap_interval(values, resamples=300, seed=1)
    narrow = bootstrap_interval(values, level=0.5, resamples=20_000)
    assert narrow == pytest.approx((193 / 400, 207 / 400), abs=0.0026)  # 0.67 standard deviations of 10 tosses
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)


def test_coverage_of_the_interval():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.normal(size=80), resamples=400, seed=seed)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.98  # 0.95 within about three standard errors of 300 draws


def test_interval_does_not_depend_on_the_block_size(monkeypatch):
    values = np.arange(101.0)
    whole = bootstrap_interval(values, resamples=90)
    monkeypatch.setattr(
        "cozyrag.evaluation.metrics._DRAWS", 2020
    )  # 20 resamples of 101 at once: an even number of draws
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


def test_the_number_of_resamples_and_their_reproducibility():
    values = np.arange(50.0)
    ours = np.array([bootstrap_interval(values, resamples=count)[0] for count in (1, 2, 1000)])
    draws = np.random.default_rng(0).integers(50, size=(1000, 50), dtype=np.int32)
    theirs = [np.quantile(values[draws[:count]].mean(axis=1), 0.025) for count in (1, 2, 1000)]
    assert ours == pytest.approx(theirs)
    assert bootstrap_interval(values) == bootstrap_interval(values, resamples=1000, seed=0)
    assert paired_bootstrap(values, values[::-1]) == paired_bootstrap(values, values[::-1], resamples=2000, seed=0)
    assert paired_bootstrap(values, values[::-1]) != paired_bootstrap(values, values[::-1], seed=1)


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
    for level in (0, 1, 1.5, 95):
        with pytest.raises(ValueError, match="level"):
            bootstrap_interval(np.zeros(2), level=level)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval(np.zeros(2), resamples=0)
