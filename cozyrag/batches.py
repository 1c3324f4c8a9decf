"""Rows to batches, in an order that depends only on (seed, round, phase).

Because nothing else decides the order, a run that was killed anywhere goes on by computing the order again and slicing
it, and one process and many take the same steps: a step is a set of rows, and the processes only share it out.
Left out: tokenizing (prompts.py), anything about devices or ranks beyond "part i of n".
"""

from collections.abc import Sequence

import numpy as np
import torch

from cozyrag.prompts import Example

PHASES = ("generator", "retriever", "examine")
SORTING_POOL = 32  # batches whose rows are sorted by length together: enough to pad little, few enough to stay mixed


def phase_seed(seed: int, *, round_number: int, phase: str, step: int = 0) -> int:
    """A 32-bit seed for one step of one phase; the same arguments give the same seed on every machine."""
    return int(np.random.SeedSequence([seed, round_number, PHASES.index(phase), step]).generate_state(1)[0])


def plan_steps(
    lengths: Sequence[int], *, batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[np.ndarray]:
    """The rows of every optimizer step of a phase.

    Each epoch is shuffled, cut into pools of `SORTING_POOL` batches, each pool sorted by length and cut into batches,
    and the batches shuffled, so that a batch holds rows of like length and little is padded.

    Args:
        lengths: (n_rows,) length of each row in tokens.
        batch_size: rows of one optimizer step, over all processes and accumulation pieces.
        epochs: passes over the rows, may be a fraction; `max_steps` caps the number of steps (None = no cap).

    Returns:
        one int64 array of row numbers for each step; the last batch of an epoch may be smaller.
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
    batches = []
    for start in range(0, len(order), batch_size * SORTING_POOL):
        pool = order[start : start + batch_size * SORTING_POOL]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches.extend(pool[i : i + batch_size] for i in range(0, len(pool), batch_size))
    return [batches[i] for i in random.permutation(len(batches))]


def share_out(rows: Sequence[int], *, parts: int) -> list[list[int]]:
    """Deal the rows of a step into `parts` lists whose sizes differ by one at most; some are empty when rows are few.

    Neighbours go to the same part: rows come sorted by length, so every part pads little.
    """
    return [[int(row) for row in part] for part in np.array_split(np.asarray(rows), parts)]


def collate(examples: Sequence[Example], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors of one micro-batch, with the places where an answer token is to be predicted.

    Returns:
        input_ids, attention_mask: (batch, length) int64;
        positions: (n_answer_tokens,) int64, indices into the flattened (batch * length) hidden states;
        targets: (n_answer_tokens,) int64, the token each of those positions must predict.
        A position is one before its target, since a causal model predicts the next token.
        rows, columns: (n_answer_tokens,) int64, whose answer a target belongs to and the how-manieth token of it;
        keywords: (batch, k) int64, padded with -1.
    """
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    keywords = torch.full((len(examples), max(1, *(len(e.keywords) for e in examples))), -1, dtype=torch.long)
    positions, targets, columns = [], [], []
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        keywords[row, : len(example.keywords)] = torch.tensor(example.keywords, dtype=torch.long)
        positions.append(torch.arange(example.prompt_length - 1, len(ids) - 1) + row * length)
        targets.append(ids[example.prompt_length :])
        columns.append(torch.arange(len(targets[-1])))
    return {
        "rows": torch.repeat_interleave(torch.arange(len(examples)), torch.tensor([len(each) for each in targets])),
        "columns": torch.cat(columns),
        "keywords": keywords,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": torch.cat(positions),
        "targets": torch.cat(targets),
    }


def collate_packed(
    examples: Sequence[Example], *, row_tokens: int, rows: int, pad_id: int
) -> tuple[dict[str, torch.Tensor], int]:
    """As many of `examples`, in order, as fit into `rows` rows of `row_tokens` tokens, several to a row, and their number.

    Each example keeps its own positions from 0 and sees only itself: with `position_ids` that start anew and no
    attention mask, transformers attends within the examples of a row (block-diagonal). What is left of a row is filled
    with one-token examples of padding that carry no loss. All shapes but the number of targets are fixed.

    Returns:
        the tensors of `collate` with `position_ids` (rows, row_tokens) in place of the attention mask; how many were used.
    """
    input_ids = np.full((rows, row_tokens), pad_id, dtype=np.int64)
    position_ids = np.zeros((rows, row_tokens), dtype=np.int64)
    positions, targets, used, row, start = [], [], 0, 0, 0
    for example in examples:
        length = len(example.input_ids)
        if length > row_tokens:
            raise ValueError(f"expected examples of at most {row_tokens} tokens to pack, found one of {length}")
        if start + length > row_tokens:
            row, start = row + 1, 0
        if row == rows:
            break
        input_ids[row, start : start + length] = example.input_ids
        position_ids[row, start : start + length] = np.arange(length)
        positions.append(np.arange(example.prompt_length - 1, length - 1) + row * row_tokens + start)
        targets.append(np.asarray(example.input_ids[example.prompt_length :], dtype=np.int64))
        used, start = used + 1, start + length
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "positions": np.concatenate(positions),
        "targets": np.concatenate(targets),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}, used


def answer_tokens(examples: Sequence[Example]) -> int:
    """How many tokens of these examples carry loss."""
    return sum(len(example.input_ids) - example.prompt_length for example in examples)
