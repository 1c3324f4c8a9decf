"""The reranker phase: the passage of a question must score above the other passages that the search finds for it.

Left out: the loop over the steps (trainer.py), the size of micro-batches (micro_batches.py), the formula of the loss
(losses.py), and what the scores are for (retrieval/reranking.py).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset

from cozyrag.config import TrainingSettings
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.models.product_attention import attention_by_products
from cozyrag.models.reranker import Pair, Reranker
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.losses import ranking_loss
from cozyrag.training.micro_batches import Cut, Load, load_of, micro_batches
from cozyrag.training.step_order import phase_seed, plan_steps
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

NEGATIVES = 4  # passages that a question's passage must outrank in a step


@dataclass(frozen=True)
class Ranking:
    """A question and the rows of the passages that are ranked for it, the one that answers it first."""

    question: str
    rows: tuple[int, ...]

    def pairs(self, passages: Passages) -> list[Pair]:
        """What the reranker reads."""
        return [(self.question, text) for text in passages.select(self.rows)]


def train_reranker(
    accelerator: Accelerator,
    reranker: Reranker,
    contexts: Dataset,
    passages: Passages,
    *,
    depth: int,
    settings: TrainingSettings,
    round_number: int,
    callback: PhaseCallback,
    left_out: Collection[str] = (),
) -> int:
    """Train the reranker to place a question's passage first; returns the number of steps.

    Args:
        contexts: questions with their passage and the `rows` that the search found.
        depth: the first passages of the search, from which negatives are drawn.
        left_out: ids of questions that are not used.
    """
    columns = contexts.select_columns(["id", "question", "answers", "positive", "rows"])[:]
    rankings = rankings_of(columns, passages, depth=depth, seed=settings.seed + round_number, left_out=left_out)
    lengths = [sum(reranker.count_tokens(ranking.pairs(passages))) for ranking in rankings]
    steps = reranker_steps(lengths, settings, round_number)
    reranker.model.eval()  # no dropout: the scores in training are those of the search

    def take_step(rows: Rows, cut: Cut) -> dict[str, float]:
        pairs, tokens = [rankings[row].pairs(passages) for row in rows], [lengths[row] for row in rows]
        return reranker_step(accelerator, reranker, pairs, tokens, cut=cut)

    def load(rows: Rows, cut: Cut) -> Load:
        return load_of([lengths[row] for row in rows], cut, processes=accelerator.num_processes)

    def show(rows: Rows) -> list[dict]:
        return [{"pairs": rankings[row].pairs(passages)} for row in rows]

    rate = settings.reranker_learning_rate
    phase = Phase("reranker", trainable(reranker.model), steps, rate, take_step, load, show)
    cut = first_cut(settings, callback, lambda: encoder_cut(accelerator, reranker))
    run_phase(accelerator, phase, cut, settings=settings, round_number=round_number, callback=callback)
    accelerator.free_memory()
    return len(steps)


def rankings_of(
    columns: Mapping[str, list], passages: Passages, *, depth: int, seed: int, left_out: Collection[str] = ()
) -> list[Ranking]:
    """The questions with a known passage, each with at most NEGATIVES of the passages found.

    Negatives are drawn from the first `depth` passages, which is what the reranker orders; none holds an answer.

    Args:
        columns: id, question, answers, positive (-1: unknown) and rows of a contexts table.
    """
    excluded, forms, made = set(left_out), dict[int, str](), list[Ranking]()
    for row_id, question, answers, positive, rows in zip(
        *(columns[name] for name in ("id", "question", "answers", "positive", "rows")), strict=True
    ):
        if positive < 0 or row_id in excluded:
            continue
        wrong = []
        for row in rows[:depth]:
            if row not in forms:
                forms[row] = matching_form(passages.texts[row])
            if row != positive and not contains_answer(forms[row], answers):
                wrong.append(row)
        random = np.random.default_rng([seed, len(made)])
        drawn = random.permutation(len(wrong))[:NEGATIVES]
        if len(drawn):
            made.append(Ranking(question, (positive, *(wrong[at] for at in drawn))))
    return made


def reranker_steps(lengths: Sequence[int], settings: TrainingSettings, round_number: int) -> list[np.ndarray]:
    """The steps of a reranker phase over rankings of these lengths, in tokens; see `plan_steps`."""
    return plan_steps(
        lengths,
        batch_size=settings.reranker_batch_size,
        epochs=settings.reranker_epochs,
        max_steps=settings.reranker_steps,
        seed=phase_seed(settings.seed, round_number=round_number, phase="reranker"),
    )


def reranker_step(
    accelerator: Accelerator,
    reranker: Reranker,
    rankings: Sequence[Sequence[Pair]],
    lengths: Sequence[int],
    *,
    cut: Cut,
) -> dict[str, float]:
    """Leave the gradients of the mean loss over these rankings, of which each process takes a share.

    Args:
        lengths: tokens of each ranking.
    """
    groups = micro_batches(lengths, cut, processes=accelerator.num_processes)
    total = 0.0
    for group in groups[accelerator.process_index :: accelerator.num_processes]:
        if group:
            with accelerator.autocast(), attention_by_products(accelerator, reranker.model):
                scores = reranker.logits([pair for at in group for pair in rankings[at]])
            loss = ranking_loss(scores, [len(rankings[at]) for at in group]) * len(group) / len(rankings)
            accelerator.backward(loss)
            total += loss.item()
    sum_gradients(accelerator, reranker.model)
    return {"loss": sum(gather_object([total]))}
