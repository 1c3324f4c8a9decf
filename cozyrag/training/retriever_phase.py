"""The retriever phase: its steps, and the gradients of a step over any number of processes.

Every question is contrasted with all passages of its step: vectors are gathered, gradients are sent back in
micro-batches. Left out: the loop over the steps (trainer.py), the size of micro-batches (micro_batches.py), what a step
trains on (training_pairs.py).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from cozyrag.config import TrainingSettings
from cozyrag.data.sentences import Span
from cozyrag.models.product_attention import attention_by_products
from cozyrag.models.retriever import EMBED_TOGETHER, Retriever, texts_and_sentences
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.micro_batches import Cut, Load, caching_load
from cozyrag.training.step_order import phase_seed, plan_steps, shard
from cozyrag.training.trainer import (
    Phase,
    PhaseCallback,
    Rows,
    encoder_cut,
    first_cut,
    run_phase,
    sum_gradients,
    trainable,
)
from cozyrag.training.training_pairs import RetrieverBatch, TrainingPair, retriever_batch, training_pairs


def train_retriever(
    accelerator: Accelerator,
    retriever: Retriever,
    contexts: Dataset,
    passages: Passages,
    *,
    settings: TrainingSettings,
    round_number: int,
    callback: PhaseCallback,
    likelihoods: np.ndarray | None = None,
    left_out: Collection[str] = (),
    refreshed: Callable[[int, int], Dataset | None] = lambda done, total: None,
) -> int:
    """Train the retriever to place each question next to its positive passage; returns the number of steps.

    There is no dropout: the vectors in training are the vectors of the index.

    Args:
        likelihoods, left_out: see `retriever_usable`.
        refreshed: called before each step with the steps done and their total. If it returns a contexts table of the
            same questions, the negatives are taken from that table from then on.
    """
    columns = contexts.select_columns(["id", "question", "answers", "positive", "negatives", "rows"])[:]
    usable = retriever_usable(columns, settings, likelihoods, left_out)
    pairs = training_pairs(columns, usable, likelihoods)
    texts = passages.select([pair.candidates[0] if pair.positive is None else pair.positive for pair in pairs])
    steps = retriever_steps([len(text) for text in texts], settings, round_number)
    retriever.model.eval()

    def begin_step(number: int) -> None:
        newer = refreshed(number, len(steps))
        if newer is not None:
            negatives = newer["negatives"][:]
            pairs[:] = [replace(pair, negatives=negatives[row]) for pair, row in zip(pairs, usable, strict=True)]

    def batch(rows: Rows) -> RetrieverBatch:
        return retriever_batch([pairs[row] for row in rows], passages, settings)

    def take_step(rows: Rows, cut: Cut) -> dict[str, float]:
        return retriever_step(accelerator, retriever, batch(rows), cut=cut)

    def load(rows: Rows, cut: Cut) -> Load:
        return retriever_load(accelerator, retriever, batch(rows), cut, exact=True)

    def show(rows: Rows) -> list[dict]:
        return [_readable(pairs[row], passages) for row in rows]

    parameters, rate = trainable(retriever.model), settings.retriever_learning_rate
    phase = Phase("retriever", parameters, steps, rate, take_step, load, show, begin_step)
    cut = first_cut(settings, callback, lambda: encoder_cut(accelerator, retriever))
    run_phase(accelerator, phase, cut, settings=settings, round_number=round_number, callback=callback)
    accelerator.free_memory()
    return len(steps)


def _readable(pair: TrainingPair, passages: Passages) -> dict:
    """A pair with the texts of its passages."""
    return {
        "question": pair.question,
        "positive": None if pair.positive is None else passages.select([pair.positive])[0],
        "negatives": passages.select(pair.negatives),
    }


def retriever_usable(
    columns: Mapping[str, list],
    settings: TrainingSettings,
    likelihoods: np.ndarray | None = None,
    left_out: Collection[str] = (),
) -> list[int]:
    """The rows of a contexts table that an active loss can use: with a positive passage, or scored by the generator.

    Args:
        columns: id and positive (-1: unknown) of the table. likelihoods: as in `training_pairs`.
        left_out: ids of questions that are not used.
    """
    positives, excluded = np.array(columns["positive"]), set(left_out)
    scored = np.zeros(len(positives), dtype=bool) if likelihoods is None else ~np.isnan(likelihoods).any(axis=1)
    contrasted = positives >= 0 if settings.contrastive_weight or settings.sentence_weight else np.zeros_like(scored)
    included = np.array([row_id not in excluded for row_id in columns["id"]], dtype=bool)
    return np.flatnonzero((scored | contrasted) & included).tolist()


def retriever_steps(lengths: Sequence[int], settings: TrainingSettings, round_number: int) -> list[np.ndarray]:
    """The steps of a retriever phase over pairs whose passages have these lengths, in characters; see `plan_steps`."""
    return plan_steps(
        lengths,
        batch_size=settings.retriever_batch_size,
        epochs=settings.retriever_epochs,
        max_steps=settings.retriever_steps,
        seed=phase_seed(settings.seed, round_number=round_number, phase="retriever"),
    )


def retriever_load(
    accelerator: Accelerator, retriever: Retriever, batch: RetrieverBatch, cut: Cut, *, exact: bool = False
) -> Load:
    """The load of a step, for this process's share of it.

    Args:
        exact: always count the tokens. Otherwise they are counted only if the number of micro-batches may depend on
            them, and are reported as 0 if not.
    """
    texts = [
        [side[at] for at in _shares(accelerator, side)[accelerator.process_index]]
        for side in (batch.questions, batch.passages)
    ]
    most = retriever.model.max_seq_length
    if cut.tokens is None or (not exact and most and most * sum(map(len, texts)) <= cut.tokens):
        return Load(cut.micro_batches, 0, max(1, *map(len, texts)))
    sides = [retriever.count_tokens(side, kind=kind) for side, kind in zip(texts, ("query", "document"), strict=True)]
    return caching_load(sides, cut, together=EMBED_TOGETHER)


def _shares(accelerator: Accelerator, texts: Sequence[str]) -> list[list[int]]:
    """The positions of the texts that each process embeds."""
    return shard(range(len(texts)), parts=accelerator.num_processes)


def retriever_step(
    accelerator: Accelerator, retriever: Retriever, batch: RetrieverBatch, *, cut: Cut
) -> dict[str, float]:
    """Compute the gradients of the weighted terms over the whole step.

    The loss needs all vectors at once, but few texts fit into memory at once. So the vectors are gathered without their
    graphs, the loss is computed once over all of them, and each process sends the gradients of its own vectors back
    through its encoder (gradient caching, Gao et al. 2021, arXiv:2101.06983). Only the last micro-batch keeps its graph
    and is not embedded twice.

    Returns:
        the loss and, if there are several terms, their values before weighting, by name.
    """
    micro_batches = retriever_load(accelerator, retriever, batch, cut).micro_batches
    sides = [
        _Side(accelerator, retriever, batch.questions, "query", micro_batches),
        _Side(accelerator, retriever, batch.passages, "document", micro_batches, batch.spans),
    ]
    leaves = [side.gathered() for side in sides]
    vectors = leaves[0], *texts_and_sentences(leaves[1], batch.spans)
    values = [term.function(*vectors) for term in batch.terms]
    loss = torch.stack([term.weight * value for term, value in zip(batch.terms, values, strict=True)]).sum()
    accelerator.backward(loss)
    for side, leaf in zip(sides, leaves, strict=True):
        side.backward(leaf.grad)
    sum_gradients(accelerator, retriever.model)
    parts = {term.name: value.item() for term, value in zip(batch.terms, values, strict=True)}
    return {"loss": loss.item()} | (parts if len(parts) > 1 else {})


class _Side:
    """The questions or the passages of a retriever step, of which this process embeds its share in micro-batches.

    Each text gives a row and, with `spans`, one more row for each of its sentences.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        retriever: Retriever,
        texts: Sequence[str],
        kind: str,
        micro_batches: int,
        spans: Sequence[Sequence[Span]] = (),
    ):
        self.accelerator, self.retriever, self.kind = accelerator, retriever, kind
        self.texts, self.spans = texts, spans
        shares = _shares(accelerator, texts)
        self.heights = [sum(1 + len(spans[at]) if spans else 1 for at in share) for share in shares]
        own = shard(shares[accelerator.process_index], parts=micro_batches)
        self.micro_batches = [micro_batch for micro_batch in own if micro_batch]
        with torch.no_grad():
            self.vectors = [self._embed(micro_batch) for micro_batch in self.micro_batches[:-1]]
        self.vectors += [self._embed(micro_batch) for micro_batch in self.micro_batches[-1:]]  # keeps its graph

    def _embed(self, micro_batch: Sequence[int]) -> torch.Tensor:
        spans = [self.spans[at] for at in micro_batch] if self.spans else None
        with self.accelerator.autocast(), attention_by_products(self.accelerator, self.retriever.model):
            return self.retriever.embed([self.texts[at] for at in micro_batch], kind=self.kind, spans=spans)

    def gathered(self) -> torch.Tensor:
        """All vectors of this side (n_rows, dim), on every process, as a leaf that collects gradients."""
        padded = torch.zeros(max(self.heights), self.retriever.dimensions, device=self.accelerator.device)
        if self.vectors:
            mine = torch.cat([vectors.detach() for vectors in self.vectors])
            padded[: len(mine)] = mine
        everyone = self.accelerator.gather(padded).view(-1, *padded.shape)
        kept = [everyone[rank, :height] for rank, height in enumerate(self.heights)]
        return torch.cat(kept).requires_grad_()

    def backward(self, gradient: torch.Tensor | None) -> None:
        """Send the gradients of this process's vectors back through the encoder, the last micro-batch first."""
        if gradient is None or (self.vectors and not self.vectors[-1].requires_grad):
            return  # no term needs this side, or its encoder is frozen
        end = sum(self.heights[: self.accelerator.process_index + 1])
        while self.micro_batches:
            micro_batch, vectors = self.micro_batches.pop(), self.vectors.pop()
            vectors = vectors if vectors.requires_grad else self._embed(micro_batch)
            vectors.backward(gradient[end - len(vectors) : end])
            end -= len(vectors)
