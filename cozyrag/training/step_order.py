"""The order of the rows in training, which depends only on (seed, round, phase).

So an interrupted run computes the order again and slices it, and any number of processes takes the same steps: a step
is a set of rows that the processes share. Left out: the tensors of a batch (models/batching.py).
"""

from collections.abc import Sequence

import numpy as np

PHASES = ("generator", "retriever", "reranker")  # their places make the seeds, so new ones come last
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
    return [[int(rows[at]) for at in part.tolist()] for part in np.array_split(np.arange(len(rows)), parts)]
