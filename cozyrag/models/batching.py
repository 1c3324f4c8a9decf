"""Rows to batches, in an order that depends only on (seed, round, phase).

Because nothing else decides the order, a run that was killed anywhere goes on by computing the order again and slicing
it, and one process and many take the same steps: a step is a set of rows, and the processes only share it out.
Left out: tokenizing (prompts.py), anything about devices or ranks beyond "part i of n".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cozyrag.models.prompts import Example

PHASES = ("generator", "retriever", "evaluation")
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
        batch_size: rows of one optimizer step, over all processes and micro-batches.
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


def shard(rows: Sequence[int], *, parts: int) -> list[list[int]]:
    """Deal the rows of a step into `parts` lists whose sizes differ by one at most; some are empty when rows are few.

    Neighbours go to the same part: rows come sorted by length, so every part pads little.
    """
    return [[int(rows[at]) for at in part] for part in np.array_split(np.arange(len(rows)), parts)]


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


@dataclass(frozen=True)
class Reading:
    """A context and what is asked of it, as token ids: each branch is the prompt after the context, and the answer with EOS.

    `plain`: the tokens of the context are to be predicted too (plain language modelling); `asked`: those of the questions,
    which mostly repeat words of the context and so teach to copy.
    """

    context: list[int]
    branches: list[tuple[list[int], list[int]]]
    plain: bool = False
    asked: bool = False

    def __len__(self) -> int:
        """Tokens it takes in a packed row: the last token of an answer is only ever a target."""
        return len(self.context) + sum(len(asked) + len(answer) - 1 for asked, answer in self.branches)


def collate_readings(
    readings: Sequence[Reading], *, row_tokens: int, rows: int, pad_id: int
) -> tuple[dict[str, torch.Tensor], int]:
    """As many of `readings`, in order, as fit into `rows` rows of `row_tokens` tokens, several to a row, and their number.

    A context stands there once for all its branches. A branch sees its context and itself and counts its positions on
    from the context, so losses and gradients are those of as many separate examples: `reading_mask` says who sees whom.

    Returns:
        input_ids, position_ids, documents, branches: (rows, row_tokens) int64, the latter two numbering readings from 1
        (0: padding) and their branches from 1 (0: the context); positions, targets: (n_targets,) as in `collate`;
        plain: (n_targets,) bool, targets that are not in an answer. And how many readings were used.
    """
    shape = (rows, row_tokens)
    input_ids, grids = np.full(shape, pad_id, dtype=np.int64), np.zeros((3, *shape), dtype=np.int64)
    positions, targets, plain, used, row, start = [], [], [], 0, 0, 0
    for number, reading in enumerate(readings, 1):
        if len(reading) > row_tokens:
            raise ValueError(f"expected readings of at most {row_tokens} tokens to pack, found one of {len(reading)}")
        if start + len(reading) > row_tokens:
            row, start = row + 1, 0
        if row == rows:
            break
        context = len(reading.context)
        pieces = [(reading.context, 0, 0, 1 if reading.plain else context, context)]
        for branch, (asked, answer) in enumerate(reading.branches, 1):
            pieces.append((asked + answer, context, branch, 1 if reading.asked else len(asked), len(asked)))
        for ids, first, branch, learned, answered in pieces:
            stop = len(ids) - bool(branch)
            here = slice(start, start + stop)
            input_ids[row, here] = ids[:stop]
            grids[:, row, here] = np.arange(first, first + stop), np.full(stop, number), np.full(stop, branch)
            positions.append(np.arange(learned - 1, len(ids) - 1) + row * row_tokens + start)
            targets.append(np.asarray(ids[learned:], dtype=np.int64))
            plain.append(np.arange(learned, len(ids)) < answered)
            start += stop
        used = number
    position_ids, documents, branches = grids
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "documents": documents,
        "branches": branches,
        "positions": np.concatenate(positions),
        "targets": np.concatenate(targets),
        "plain": np.concatenate(plain),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}, used


def reading_mask(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Who sees whom in packed rows: (rows, 1, row_tokens, row_tokens) bool, true where a query (dim 2) may see a key (dim 3).

    A token sees earlier tokens (and itself) of its reading, as far as they stand in the context or in its own branch.
    """
    same = documents[:, :, None] == documents[:, None, :]
    open_to = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    earlier = torch.ones(documents.shape[1:] * 2, dtype=torch.bool, device=documents.device).tril()
    return (same & open_to & earlier).unsqueeze(1)


def answer_tokens(examples: Sequence[Example]) -> int:
    """How many tokens of these examples carry loss."""
    return sum(len(example.input_ids) - example.prompt_length for example in examples)
