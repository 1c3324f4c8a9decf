"""Packed readings: a context shared by several questions gives the losses of separate examples."""

import sys
from pathlib import Path

import pytest
import torch

from cozyrag.models.batching import collate
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import Example
from cozyrag.models.token_losses import TokenLosses

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from packed_readings import Reading, collate_readings, reading_mask  # noqa: E402

READINGS = [
    Reading([5, 6, 7, 8], [([9, 10], [11, 2]), ([12, 13, 14], [15, 16, 2]), ([9], [2])], plain=True),
    Reading([20, 21], [([22, 23], [24, 25, 2])]),
    Reading([30] * 9, [([31, 33, 34], [32, 2])], asked=True),
]


def test_a_reading_has_the_losses_of_separate_examples(generator_path):
    losses = TokenLosses(Generator.load(str(generator_path)).model.eval())
    batch, used = collate_readings(READINGS, row_tokens=24, rows=2, pad_id=0)
    assert used == 3
    mask = reading_mask(batch["documents"], batch["branches"])
    with torch.no_grad():
        shared = losses(batch["input_ids"], batch["positions"], batch["targets"], mask, batch["position_ids"])
        separate = []
        for reading in READINGS:
            if reading.plain:
                alone = collate([Example(reading.context, 1)], pad_id=0)
                separate.append(losses(**alone))
            for asked, answer in reading.branches:
                prompt = reading.context + asked
                first = len(reading.context) + 1 if reading.asked else len(prompt)
                separate.append(losses(**collate([Example(prompt + answer, first)], pad_id=0)))
    torch.testing.assert_close(shared, torch.cat(separate), rtol=1e-4, atol=1e-5)
    assert batch["plain"].tolist() == [True] * 3 + [False] * (len(shared) - 7) + [True] * 2 + [False] * 2


def test_readings_beyond_the_rows_are_left_for_the_next_step():
    batch, used = collate_readings(READINGS, row_tokens=17, rows=1, pad_id=0)
    assert used == 1
    assert (batch["documents"] == 1).sum() == len(READINGS[0])
    with pytest.raises(ValueError, match="at most 10 tokens"):
        collate_readings(READINGS, row_tokens=10, rows=4, pad_id=0)


def test_which_tokens_see_each_other_in_a_row():
    mask = reading_mask(torch.tensor([[1, 1, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1, 2, 0, 0]]))[0, 0]
    seen = [[key for key in range(6) if mask[query, key]] for query in range(6)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [4], [5]]


def test_readings_that_fill_their_rows_completely():
    readings = [
        Reading(list(range(10 * n, 10 * n + 5)), [([90, 91], [92, 93]), ([94], [95])], plain=True) for n in (1, 2, 3)
    ]
    batch, used = collate_readings(readings, row_tokens=len(readings[0]), rows=3, pad_id=0)
    assert used == 3 and not (batch["input_ids"] == 0).any()
    assert batch["input_ids"][:, :5].tolist() == [reading.context for reading in readings]
    assert batch["branches"].unique().tolist() == [0, 1, 2] and batch["documents"].unique().tolist() == [1, 2, 3]
    flat = batch["input_ids"].flatten()
    own = batch["plain"]  # targets in the context directly follow their positions
    assert flat[batch["positions"][own] + 1].tolist() == batch["targets"][own].tolist()
    assert batch["targets"][~own].tolist() == [92, 93, 95] * 3
    assert flat[batch["positions"][~own]].tolist() == [91, 92, 94] * 3
    half, count = collate_readings(readings, row_tokens=2 * len(readings[0]), rows=1, pad_id=0)
    assert count == 2 and half["positions"].min() == 0 and half["position_ids"][0, 0] == 0
