"""Finding duplicates: exact ones by hash, near ones by signatures, compared with the true overlap."""

import random

import numpy as np
import pytest

from cozyrag.data.deduplication import BINS, RUN, near_repeats, repeats, signatures, text_hash


def words(count, seed):
    chance = random.Random(seed)
    return " ".join("".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(count))


def changed(text, count, seed):
    chance, parts = random.Random(seed), text.split()
    for place in chance.sample(range(len(parts)), count):
        parts[place] = f"new{place}"
    return " ".join(parts)


def jaccard(a, b):
    runs = [{text[i : i + RUN] for i in range(len(text) - RUN + 1)} for text in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def estimate(a, b):
    signs = signatures([a, b])
    return float((signs[0] == signs[1]).mean())


def test_hashes_differ_between_texts_and_never_change():
    assert text_hash("a", "b") != text_hash("ab") != text_hash("b", "a")
    assert text_hash("Wien") == 0xC40602549EF471A5  # on every machine


def test_repeats_are_all_but_the_first():
    assert repeats(np.array([5, 3, 5, 1, 3, 5], dtype=np.uint64)).tolist() == [False, False, True, False, True, True]
    assert repeats(np.zeros(0, np.uint64)).tolist() == []


@pytest.mark.parametrize("count", [0, 1, 3, 8, 20])
def test_signatures_estimate_the_share_of_common_runs(count):
    errors = []
    for seed in range(20):
        text = words(100, seed)
        other = changed(text, count, seed)
        errors.append(estimate(text, other) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.09


def test_a_signature_does_not_depend_on_its_neighbours():
    texts = [words(n, n) for n in (1, 30, 5, 100)]
    together = signatures(texts)
    assert together.shape == (4, BINS) and together.dtype == np.uint8
    np.testing.assert_array_equal(together, np.concatenate([signatures([text]) for text in texts]))


def test_case_and_the_width_of_spaces_do_not_count():
    assert estimate("The river  flows\nthrough Vienna.", "the river flows through vienna.") == 1
    assert signatures(["", "a", "维也纳"]).shape == (3, BINS)
    assert signatures([]).shape == (0, BINS)


def test_only_near_repeats_are_found():
    base = [words(100, seed) for seed in range(300)]
    near = [changed(text, 2, 1) for text in base[:100]]
    far = [changed(text, 40, 1) for text in base[100:200]]
    found = near_repeats(signatures([*base, *near, *far]), 0.8)
    assert found[:300].sum() == 0 and found[400:].sum() == 0 and found[300:400].sum() >= 97


def test_chinese_needs_no_spaces():
    text = (
        "维也纳是奥地利的首都，也是该国最大的城市。多瑙河流经该市。它的历史有两千年，曾是帝国的中心，今天有两百万居民。"
        * 3
    )
    other = text.replace("两百万", "三百万", 1)
    assert near_repeats(signatures([text, other, text[::-1]]), 0.8).tolist() == [False, True, False]
