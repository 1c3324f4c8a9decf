"""Packed rows with several questions on one context, which is computed once (for pretrain_generator.py).

Left out: making the readings (pretrain_examples.py), the batches of ordinary training (cozyrag/models/batching.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Reading:
    """A context and its questions, as token ids.

    Args:
        branches: for each question the rest of the prompt after the context, and the answer with EOS.
        plain: the tokens of the context are targets too (language modelling).
        asked: the tokens of the questions are targets too; they mostly repeat the context, which trains copying.
    """

    context: list[int]
    branches: list[tuple[list[int], list[int]]]
    plain: bool = False
    asked: bool = False

    def __len__(self) -> int:
        """Tokens in a packed row: the last token of an answer is only ever a target."""
        return len(self.context) + sum(len(asked) + len(answer) - 1 for asked, answer in self.branches)


def collate_readings(
    readings: Sequence[Reading], *, row_tokens: int, rows: int, pad_id: int
) -> tuple[dict[str, torch.Tensor], int]:
    """As many of `readings`, in order, as fit into `rows` rows of `row_tokens` tokens, and their number.

    A branch attends to its context and itself (`reading_mask`), and its positions continue those of the context, so
    losses and gradients are those of separate examples.

    Returns:
        input_ids, position_ids, documents, branches: (rows, row_tokens) int64, the latter two numbering readings from 1
        (0: padding) and their branches from 1 (0: the context); positions, targets: (n_targets,) as in
        `batching.collate`; plain: (n_targets,) bool, targets outside of answers. And the number of readings used.
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
        parts = [(reading.context, 0, 0, 1 if reading.plain else context, context)]
        for branch, (asked, answer) in enumerate(reading.branches, 1):
            parts.append((asked + answer, context, branch, 1 if reading.asked else len(asked), len(asked)))
        for ids, first, branch, learned, answered in parts:
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
    """Attention mask of packed rows, (rows, 1, row_tokens, row_tokens) bool: does a query (dim 2) see a key (dim 3)?

    A token sees earlier tokens (and itself) of its reading, if they are in the context or in its own branch.
    """
    same = documents[:, :, None] == documents[:, None, :]
    open_to = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    earlier = torch.ones(documents.shape[1:] * 2, dtype=torch.bool, device=documents.device).tril()
    return (same & open_to & earlier).unsqueeze(1)
