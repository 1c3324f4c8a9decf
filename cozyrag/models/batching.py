"""Batches of rows, in an order that depends only on (seed, round, phase).

Because nothing else decides the order, an interrupted run resumes by computing the order again and slicing it, and any
number of processes takes the same steps: a step is a set of rows that the processes share.
Left out: tokenizing (prompts.py), devices and ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from cozyrag.models.prompts import Example

PHASES = ("generator", "retriever", "evaluation")
SORTING_POOL = 32  # batches whose rows are sorted by length together: little padding, yet well mixed


def phase_seed(seed: int, *, round_number: int, phase: str, step: int = 0) -> int:
    """A 32-bit seed for one step of one phase; equal arguments give equal seeds on every machine."""
    return int(np.random.SeedSequence([seed, round_number, PHASES.index(phase), step]).generate_state(1)[0])


def plan_steps(
    lengths: Sequence[int] | np.ndarray, *, batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[np.ndarray]:
    """The rows of every optimizer step of a phase.

    Each epoch is shuffled and cut into pools of `SORTING_POOL` batches; each pool is sorted by length and cut into
    batches, which are shuffled. So a batch holds rows of similar length and needs little padding.

    Args:
        lengths: (n_rows,) length of each row in tokens.
        batch_size: rows of one optimizer step, over all processes and micro-batches.
        epochs: passes over the rows, may be a fraction. max_steps: upper limit of the number of steps (None: no limit).

    Returns:
        one int64 array of row numbers per step; the last batch of an epoch may be smaller.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    lengths = np.asarray(lengths)
    if len(lengths) == 0 or epochs <= 0 or max_steps == 0:
        return []
    random = np.random.default_rng(seed)
    per_epoch = -(-len(lengths) // batch_size)
    total = max(1, round(epochs * per_epoch))
    total = total if max_steps is None else min(total, max_steps)
    steps: list[np.ndarray] = []
    while len(steps) < total:
        steps.extend(_one_epoch(lengths, batch_size, random))
    return steps[:total]


def _one_epoch(lengths: np.ndarray, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    order = random.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * SORTING_POOL):
        pool = order[start : start + batch_size * SORTING_POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches.extend(pool[i : i + batch_size] for i in range(0, len(pool), batch_size))
    return [batches[i] for i in random.permutation(len(batches))]


def shard(rows: Sequence[int], *, parts: int) -> list[list[int]]:
    """Split the rows of a step into `parts` lists whose sizes differ by at most one; some are empty if rows are few.

    Neighbours stay together: rows are sorted by length, so every part needs little padding.
    """
    return [[int(rows[at]) for at in part] for part in np.array_split(np.arange(len(rows)), parts)]


def collate(examples: Sequence[Example], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of one micro-batch, with the positions that predict answer tokens.

    Returns:
        input_ids, attention_mask: (batch, length) int64;
        positions: (n_answer_tokens,) int64, indices into the flattened (batch * length) hidden states;
        targets: (n_answer_tokens,) int64, the token that each position must predict, which is the one after it;
        rows, columns: (n_answer_tokens,) int64, the example a target belongs to and its index in that answer;
        keywords: (batch, k) int64, padded with -1.
    """
    ids = [torch.tensor(example.input_ids, dtype=torch.long) for example in examples]
    answers = [each[example.prompt_length :] for each, example in zip(ids, examples, strict=True)]
    columns = [torch.arange(len(answer)) for answer in answers]
    length = max(map(len, ids))
    firsts = [row * length + example.prompt_length - 1 for row, example in enumerate(examples)]
    keywords = [torch.tensor(example.keywords or (-1,), dtype=torch.long) for example in examples]
    return {
        "rows": torch.repeat_interleave(torch.arange(len(examples)), torch.tensor([len(each) for each in answers])),
        "columns": torch.cat(columns),
        "keywords": pad_sequence(keywords, batch_first=True, padding_value=-1),
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "positions": torch.cat([first + each for first, each in zip(firsts, columns, strict=True)]),
        "targets": torch.cat(answers),
    }


def answer_tokens(examples: Sequence[Example]) -> int:
    """Number of tokens of these examples that carry loss."""
    return sum(len(example.input_ids) - example.prompt_length for example in examples)
