"""What a retriever step trains on: pairs of a question and its passages, and the terms of the loss.

Left out: choosing positives and negatives (contexts.py), the formulas of the losses (losses.py), gradients
(retriever_phase.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cozyrag.config import TrainingSettings
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.sentences import Span, split_sentences
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.losses import contrastive_loss, feedback_loss, sentence_loss


@dataclass(frozen=True)
class TrainingPair:
    """A question and the passages it trains on, which are given as rows of the passage table.

    Args:
        positive: the passage that answers the question; None if unknown.
        negatives: its hard negatives.
        candidates: the passages that the generator scored (lm_feedback.py), if it did.
        likelihoods: mean log-likelihood of an answer token given each candidate, in nats; NaN without an answer.
    """

    question: str
    answers: Sequence[str]
    positive: int | None
    negatives: Sequence[int]
    candidates: Sequence[int] = ()
    likelihoods: Sequence[float] = ()


@dataclass(frozen=True)
class LossTerm:
    """A weighted term of the retriever's loss.

    function: takes the vectors of a step, those of the questions (n_questions, dim), of the passages (n_passages, dim)
    and of the sentences (n_sentences, dim), and returns a scalar.
    """

    name: str
    weight: float
    function: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RetrieverBatch:
    """The texts of a retriever step and the terms of its loss.

    spans: per passage the positions of its sentences in the text, if their vectors are needed; empty without.
    """

    questions: Sequence[str]
    passages: Sequence[str]
    terms: Sequence[LossTerm]
    spans: Sequence[Sequence[Span]] = ()


def training_pairs(
    columns: Mapping[str, list], rows: Sequence[int], likelihoods: np.ndarray | None = None
) -> list[TrainingPair]:
    """The pairs in some rows of a contexts table.

    Args:
        columns: question, answers, positive (-1: unknown), negatives and rows of the table.
        likelihoods: (n_questions, k) for the first k passages in `rows` of each question, from lm_feedback.py.
    """
    scores = np.zeros((len(columns["question"]), 0)) if likelihoods is None else likelihoods
    return [
        TrainingPair(
            question=columns["question"][row],
            answers=columns["answers"][row],
            positive=columns["positive"][row] if columns["positive"][row] >= 0 else None,
            negatives=columns["negatives"][row],
            candidates=columns["rows"][row][: scores.shape[1]],
            likelihoods=scores[row].tolist(),
        )
        for row in rows
    ]


def retriever_batch(pairs: Sequence[TrainingPair], passages: Passages, settings: TrainingSettings) -> RetrieverBatch:
    """The step on these pairs: each question is compared with the positives, negatives and candidates of all pairs."""
    rows = [pair.positive for pair in pairs if pair.positive is not None]
    rows += [row for pair in pairs for row in pair.negatives]
    rows += [row for pair in pairs for row in pair.candidates]
    rows = list(dict.fromkeys(rows))
    sentences = step_sentences(pairs, passages, rows) if settings.sentence_weight else ([], np.empty(0), np.empty(0))
    terms = _terms(pairs, rows, sentences[1:], settings)
    return RetrieverBatch([pair.question for pair in pairs], passages.select(rows), terms, sentences[0])


def step_sentences(
    pairs: Sequence[TrainingPair], passages: Passages, rows: Sequence[int]
) -> tuple[list[list[Span]], np.ndarray, np.ndarray]:
    """The sentences of the positives in a step over the passages `rows`.

    Returns:
        their spans per passage, none for other passages; (n_questions, n_sentences) bool, the sentences of the
        question's positive; those of them that hold an answer.
    """
    positives = {pair.positive for pair in pairs}
    spans = [passages.spans([row])[0] if row in positives else [] for row in rows]
    owners = np.repeat(np.array(rows), [len(each) for each in spans])
    own = np.array([owners == pair.positive for pair in pairs])
    texts = [split_sentences(passages.texts[row]) for row in rows if row in positives]
    sentences = [matching_form(sentence) for each in texts for sentence in each]
    right = np.zeros_like(own)
    for question, at in np.argwhere(own):
        right[question, at] = contains_answer(sentences[at], pairs[question].answers)
    return spans, own, right


def _terms(
    pairs: Sequence[TrainingPair], rows: Sequence[int], masks: Sequence[np.ndarray], settings: TrainingSettings
) -> list[LossTerm]:
    """The active terms; `masks`: of the sentences, from `step_sentences`."""
    place = {row: at for at, row in enumerate(rows)}
    positives = [-1 if pair.positive is None else place[pair.positive] for pair in pairs]
    candidates = [[place[row] for row in pair.candidates] for pair in pairs]
    likelihoods = [pair.likelihoods for pair in pairs]

    def contrastive(queries: Tensor, passages: Tensor, _: Tensor) -> Tensor:
        at = torch.tensor(positives, device=queries.device)
        return contrastive_loss(queries, passages, positives=at, temperature=settings.temperature)

    def sentence(queries: Tensor, _: Tensor, sentences: Tensor) -> Tensor:
        own, right = (torch.from_numpy(mask).to(queries.device) for mask in masks)
        return sentence_loss(queries, sentences, own=own, right=right, temperature=settings.temperature)

    def feedback(queries: Tensor, passages: Tensor, _: Tensor) -> Tensor:
        scored = torch.tensor(candidates, device=queries.device), torch.tensor(likelihoods, device=queries.device)
        temperature = settings.feedback_temperature
        return feedback_loss(queries, passages, candidates=scored[0], likelihoods=scored[1], temperature=temperature)

    terms = [
        LossTerm("contrastive", settings.contrastive_weight, contrastive),
        LossTerm("sentence", settings.sentence_weight, sentence),
        LossTerm("feedback", settings.feedback_weight if any(likelihoods) else 0.0, feedback),
    ]
    return [term for term in terms if term.weight]
