"""The order of the steps and the tensors of a batch.

A plan depends only on (seed, round, phase) and covers each row once per epoch; a shorter plan is a prefix of a longer
one; sharding loses no row; labels are exactly the answer and its EOS.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.models.batching import answer_tokens, collate
from cozyrag.models.prompts import Example
from cozyrag.training.step_order import PHASES, SORTING_POOL, phase_seed, plan_steps, shard

PAD = 99


def plan(lengths, *, batch_size=4, epochs=1.0, max_steps=None, seed=0):
    return plan_steps(lengths, batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed)


def as_lists(steps):
    return [step.tolist() for step in steps]


# ---- seeds ----


def test_phase_seed_has_fixed_values():
    seeds = [
        phase_seed(13, round_number=1, phase="generator"),
        phase_seed(13, round_number=2, phase="retriever", step=7),
    ]
    assert seeds == [3405998857, 4207835329]


def test_phase_seed_depends_on_every_argument():
    seeds = {
        phase_seed(seed, round_number=number, phase=phase, step=step)
        for seed, number, phase, step in itertools.product(range(4), range(4), PHASES, range(4))
    }
    assert len(seeds) == 4 * 4 * len(PHASES) * 4
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)


# ---- plans ----


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=150), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_each_epoch_covers_each_row_once(lengths, batch_size, epochs, seed):
    steps = plan(lengths, batch_size=batch_size, epochs=epochs, seed=seed)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(steps) == epochs * per_epoch
    for start in range(0, len(steps), per_epoch):
        epoch = steps[start : start + per_epoch]
        assert sorted(np.concatenate(epoch).tolist()) == list(range(len(lengths)))
        assert sorted(len(step) for step in epoch)[1:] == [batch_size] * (per_epoch - 1)


@pytest.mark.parametrize("phase", ["generator", "retriever"])
def test_plan_is_decided_by_seed_round_and_phase(phase):
    lengths = np.random.default_rng(0).integers(5, 90, size=300)

    def planned(seed, number, phase):
        return as_lists(plan(lengths, epochs=2, seed=phase_seed(seed, round_number=number, phase=phase)))

    other = next(name for name in PHASES if name != phase)
    ours = planned(1, 2, phase)
    np.random.seed(5)
    torch.manual_seed(5)  # the global random states have no effect
    assert planned(1, 2, phase) == ours
    for changed in ((2, 2, phase), (1, 3, phase), (1, 2, other)):
        assert planned(*changed) != ours


# 10 rows in batches of 3: 4 steps per epoch
@pytest.mark.parametrize(
    ("epochs", "max_steps", "count"),
    [
        (1, None, 4), (2, None, 8), (0.5, None, 2), (1.25, None, 5), (2.8, None, 11), (0.01, None, 1),
        (0, None, 0), (-1, None, 0), (1, 3, 3), (1, 4, 4), (1, 100, 4), (3, 5, 5), (0.5, 1, 1), (1, 0, 0), (0.01, 0, 0),
    ],
)  # fmt: skip
def test_fractional_epochs_and_max_steps(epochs, max_steps, count):
    steps = plan([5] * 10, batch_size=3, epochs=epochs, max_steps=max_steps)
    assert len(steps) == count
    assert as_lists(steps) == as_lists(plan([5] * 10, batch_size=3, epochs=5))[:count]  # a prefix of a longer plan


def test_each_epoch_has_another_order():
    steps = as_lists(plan([5] * 40, epochs=2))
    assert steps[:10] != steps[10:]
    assert sum(steps[:10], []) != list(range(40))


def test_a_batch_holds_rows_of_similar_length():
    lengths = np.random.default_rng(1).permutation(4 * SORTING_POOL)
    runs = sorted(sorted(lengths[step].tolist()) for step in plan(lengths))
    assert runs == [list(range(start, start + 4)) for start in range(0, 4 * SORTING_POOL, 4)]


def test_batches_are_not_sorted():
    first = [step.min() for step in plan(np.arange(4 * SORTING_POOL))]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_rows_of_several_pools_are_mixed():
    """Without pools every epoch would hold the same batches."""
    lengths = np.arange(8 * SORTING_POOL)
    one, two = (plan(lengths, batch_size=2, seed=seed) for seed in (0, 1))
    assert {frozenset(step.tolist()) for step in one} != {frozenset(step.tolist()) for step in two}


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_an_epoch_of_several_pools_covers_each_row_once(extra):
    size = 3 * 2 * SORTING_POOL + extra
    lengths = np.random.default_rng(2).integers(5, 90, size=size)
    steps = plan(lengths, batch_size=2)
    assert len(steps) == -(-size // 2)
    assert sorted(np.concatenate(steps).tolist()) == list(range(size))


def test_without_rows_there_are_no_steps():
    assert plan([]) == []


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        plan([1, 2], batch_size=0)


# ---- sharding ----


@given(st.lists(st.integers(), max_size=40), st.integers(1, 12))
def test_every_row_is_in_one_shard(rows, parts):
    shares = shard(rows, parts=parts)
    sizes = [len(share) for share in shares]
    assert len(shares) == parts
    assert sum(shares, []) == rows
    assert max(sizes) - min(sizes) <= 1
    assert all(type(row) is int for share in shares for row in share)


@pytest.mark.parametrize(
    ("rows", "parts", "shares"),
    [([7, 8, 9, 4, 5], 2, [[7, 8, 9], [4, 5]]), ([3], 3, [[3], [], []]), ([], 2, [[], []]), (range(3), 1, [[0, 1, 2]])],
)
def test_shards_by_hand(rows, parts, shares):
    assert shard(rows, parts=parts) == shares


# ---- collating ----


def test_collate_by_hand():
    batch = collate([Example([5, 6, 7, 1], 2), Example([8, 9, 1], 2), Example([3, 4, 2, 2, 1], 3)], pad_id=PAD)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 1, PAD], [8, 9, 1, PAD, PAD], [3, 4, 2, 2, 1]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "positions": [1, 2, 6, 12, 13],
        "targets": [7, 1, 1, 2, 1],
        "rows": [0, 0, 1, 2, 2],
        "columns": [0, 1, 0, 0, 1],
        "keywords": [[-1], [-1], [-1]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@st.composite
def examples(draw):
    ids = draw(st.lists(st.integers(0, PAD - 1), min_size=2, max_size=12))
    return Example(ids, draw(st.integers(1, len(ids) - 1)))


@given(st.lists(examples(), min_size=1, max_size=6), st.sampled_from([PAD, 0]))
def test_labels_are_on_the_answer_and_nowhere_else(rows, pad_id):
    batch = collate(rows, pad_id=pad_id)
    labels = torch.full(batch["input_ids"].shape, -100)
    predicted = batch["positions"] + 1  # a position predicts the token after it
    labels.view(-1)[predicted] = batch["targets"]
    width = max(len(row.input_ids) for row in rows)
    assert labels.tolist() == [
        [-100] * row.prompt_length + row.input_ids[row.prompt_length :] + [-100] * (width - len(row.input_ids))
        for row in rows
    ]
    assert torch.equal(batch["input_ids"].view(-1)[predicted], batch["targets"])
    assert batch["attention_mask"].view(-1)[predicted].all()  # no padding carries loss
    assert len(batch["targets"]) == answer_tokens(rows)


def test_answer_tokens_by_hand():
    assert answer_tokens([Example([5, 6, 7, 1], 2), Example([8, 9, 1], 2)]) == 3
    assert answer_tokens([]) == 0


def test_rows_of_equal_length_keep_their_random_order():
    steps = plan_steps([7] * 300, batch_size=300, epochs=1, max_steps=None, seed=3)
    shortest_first = plan_steps([7] * 299 + [1], batch_size=300, epochs=1, max_steps=None, seed=3)
    drawn = steps[0].tolist()
    assert drawn != sorted(drawn)
    assert shortest_first[0].tolist() == [299, *(row for row in drawn if row != 299)]
