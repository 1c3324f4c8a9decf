"""The retriever phase: its steps over questions with a known passage, and the gradients of a step.

Every question is contrasted with all passages of its step, on however many processes: vectors are gathered, gradients sent
back in micro-batches. Left out: the loop over the steps (trainer.py), how much a micro-batch may hold (micro_batches.py), positives and negatives (contexts.py), the losses (losses.py).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from cozyrag.config import TrainingSettings
from cozyrag.data.sentences import Span, split_sentences
from cozyrag.evaluation.metrics import contains_answer, normalize_answer
from cozyrag.models.batching import phase_seed, plan_steps, shard
from cozyrag.models.retriever import EMBED_TOGETHER, Retriever, texts_and_sentences
from cozyrag.retrieval.passage_index import Passages
from cozyrag.runtime.hardware import room_for_training
from cozyrag.training.losses import contrastive_loss, feedback_loss, sentence_loss
from cozyrag.training.micro_batches import Cut, Load, caching_load, retriever_budget, token_bytes
from cozyrag.training.trainer import PhaseCallback, chosen_together, first_cut, run_phase, trainable

# Vectors of the questions (n_questions, dim), passages (n_passages, dim) and sentences (n_sentences, dim) of a step to a scalar.
TermOfVectors = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
    """Teach the retriever to put each question next to its positive passage; returns the number of steps.

    Rows that no active loss can use are left out. No dropout: the vectors trained are the vectors indexed.

    Args:
        likelihoods: (n_rows, k), the generator's feedback on the k best passages of each row (lm_feedback.py), if wanted.
        left_out: ids of questions that are not to be learned from.
        refreshed: asked before each step with the steps done and their total; a table of the same questions that it gives
            takes the place of `contexts` as the source of negatives.
    """
    columns = contexts.select_columns(["id", "question", "answers", "positive", "negatives", "rows"])[:]
    usable = retriever_usable(columns, settings, likelihoods, left_out)
    at = [columns["positive"][row] if columns["positive"][row] >= 0 else columns["rows"][row][0] for row in usable]
    steps = retriever_steps([len(text) for text in passages.select(at)], settings, round_number)
    retriever.model.eval()

    def begin_step(number: int) -> None:
        newer = refreshed(number, len(steps))
        if newer is not None:
            columns["negatives"] = newer["negatives"][:]

    def take_step(number: int, cut: Cut) -> dict[str, float]:
        rows = [usable[row] for row in steps[number]]
        return retriever_gradients(accelerator, retriever, columns, passages, rows, settings, likelihoods, cut)

    def load(number: int, cut: Cut) -> Load:
        rows = [usable[row] for row in steps[number]]
        return retriever_load(
            accelerator, retriever, *step_texts(columns, passages, rows, likelihoods), cut, exact=True
        )

    def show(number: int) -> list[dict]:
        return [_pair(columns, passages, usable[row]) for row in steps[number]]

    run_phase(
        accelerator, "retriever", trainable(retriever.model), steps, take_step,
        settings=settings, learning_rate=settings.retriever_learning_rate, round_number=round_number, callback=callback, begin_step=begin_step, show=show,
        cut=first_cut(settings, callback, lambda: retriever_cut(accelerator, retriever)), load=load,
    )  # fmt: skip
    accelerator.free_memory()
    return len(steps)


def _pair(columns: dict[str, list], passages: Passages, row: int) -> dict:
    """What a row of the contexts table teaches the retriever, to be read by a person."""
    positive = columns["positive"][row]
    return {
        "question": columns["question"][row],
        "positive": passages.select([positive])[0] if positive >= 0 else None,
        "negatives": passages.select(columns["negatives"][row]),
    }


def retriever_usable(
    columns: dict[str, list],
    settings: TrainingSettings,
    likelihoods: np.ndarray | None = None,
    left_out: Collection[str] = (),
) -> list[int]:
    """Rows that an active loss can use: with a positive passage (-1: none), or with the generator's feedback.

    Of the columns, positive and id are read; rows with an id in `left_out` are not used.
    """
    positives, unwanted = np.array(columns["positive"]), set(left_out)
    judged = np.zeros(len(positives), dtype=bool) if likelihoods is None else ~np.isnan(likelihoods).any(axis=1)
    contrasted = positives >= 0 if settings.contrastive_weight or settings.sentence_weight else np.zeros_like(judged)
    wanted = np.array([row_id not in unwanted for row_id in columns["id"]], dtype=bool)
    return np.flatnonzero((judged | contrasted) & wanted).tolist()


def retriever_steps(lengths: Sequence[int], settings: TrainingSettings, round_number: int) -> list[np.ndarray]:
    """The steps of a retriever phase over pairs whose passages have these lengths, in characters; see `plan_steps`."""
    return plan_steps(
        lengths,
        batch_size=settings.retriever_batch_size,
        epochs=settings.retriever_epochs,
        max_steps=settings.retriever_steps,
        seed=phase_seed(settings.seed, round_number=round_number, phase="retriever"),
    )


def retriever_cut(accelerator: Accelerator, retriever: Retriever, *, free: float | None = None) -> Cut:
    """How the steps of a retriever phase are cut automatically, the same on every process.

    Args:
        free: bytes that this process may take for training; None: it looks.
    """
    each = retriever_token_bytes(accelerator, retriever)
    if each is None:
        return Cut()
    free = room_for_training(accelerator.device) if free is None else free
    states = 3 * sum(weight.numel() * weight.element_size() for weight in trainable(retriever.model))
    return chosen_together(accelerator, retriever_budget(each, free, states=states, device=accelerator.device.type))


def retriever_token_bytes(accelerator: Accelerator, retriever: Retriever) -> int | None:
    """About how many bytes of activations a token of a retriever step takes; None for a model without layers."""
    config = retriever.config
    return None if config is None else token_bytes(config, precision=accelerator.mixed_precision)


def retriever_load(
    accelerator: Accelerator,
    retriever: Retriever,
    questions: Sequence[str],
    passages: Sequence[str],
    cut: Cut,
    *,
    exact: bool = False,
) -> Load:
    """What a cut makes of this process's share of a step on these texts. Unless `exact`, they are counted in tokens only if
    that may matter for the pieces, and else the tokens are said to be 0."""
    texts = [
        [side[at] for at in _shares(accelerator, side)[accelerator.process_index]] for side in (questions, passages)
    ]
    most = retriever.model.max_seq_length
    if cut.tokens is None or (not exact and most and most * sum(map(len, texts)) <= cut.tokens):
        return Load(cut.micro_batches, 0, max(1, *map(len, texts)))
    sides = [retriever.count_tokens(side, kind=kind) for side, kind in zip(texts, ("query", "document"), strict=True)]
    return caching_load(sides, cut, together=EMBED_TOGETHER)


def _shares(accelerator: Accelerator, texts: Sequence[str]) -> list[list[int]]:
    """Which of the texts each process embeds."""
    return shard(range(len(texts)), parts=accelerator.num_processes)


def retriever_gradients(
    accelerator: Accelerator,
    retriever: Retriever,
    columns: dict[str, list],
    passages: Passages,
    rows: Sequence[int],
    settings: TrainingSettings,
    likelihoods: np.ndarray | None,
    cut: Cut,
) -> dict[str, float]:
    """Gradients of a step on some rows of a contexts table; its columns question, answers, positive, negatives and rows are read."""
    at = [columns["positive"][row] for row in rows]
    candidates = [columns["rows"][row][: likelihoods.shape[1]] for row in rows] if likelihoods is not None else []
    found = step_passages(columns, rows, 0 if likelihoods is None else likelihoods.shape[1])
    places = {row: place for place, row in enumerate(found)} | {-1: -1}
    sentences = None
    if settings.sentence_weight:
        sentences = step_sentences(passages, found, at, [columns["answers"][row] for row in rows])
    return retriever_step(
        accelerator,
        retriever,
        *step_texts(columns, passages, rows, likelihoods),
        retriever_terms(
            settings,
            positives=[places[row] for row in at],
            candidates=[[places[row] for row in each] for each in candidates],
            likelihoods=None if likelihoods is None else likelihoods[rows],
            sentences=sentences,
        ),
        cut=cut,
        spans=sentences.spans if sentences else None,
    )


def step_texts(
    columns: dict[str, list], passages: Passages, rows: Sequence[int], likelihoods: np.ndarray | None
) -> tuple[list[str], list[str]]:
    """(questions, passages) that a step on these rows reads."""
    found = step_passages(columns, rows, 0 if likelihoods is None else likelihoods.shape[1])
    return [columns["question"][row] for row in rows], passages.select(found)


def step_passages(columns: dict[str, list], rows: Sequence[int], judged: int) -> list[int]:
    """The passages of a step on these rows: positives, negatives, and the `judged` best ones of each row; each once."""
    found = [columns["positive"][row] for row in rows if columns["positive"][row] >= 0]
    found += [passage for row in rows for passage in columns["negatives"][row]]
    return list(dict.fromkeys(found + [passage for row in rows for passage in columns["rows"][row][:judged]]))


@dataclass(frozen=True)
class StepSentences:
    """The sentences of the positive passages of a step.

    spans: for each passage of the step where its sentences stand in what is read of it, none where it is no positive.
    own, right: (n_questions, n_sentences) bool: the sentences of the question's passage, and those that hold its answer.
    """

    spans: list[list[Span]]
    own: np.ndarray
    right: np.ndarray


def step_sentences(
    passages: Passages, found: Sequence[int], positives: Sequence[int], answers: Sequence[Sequence[str]]
) -> StepSentences:
    """The sentences of a step over the passages `found`, whose questions have these positive rows (-1: none) and answers."""
    golds = sorted({row for row in positives if row >= 0})
    known = dict(zip(golds, passages.spans(golds), strict=True))
    spans = [known.get(row, []) for row in found]
    ends = np.cumsum([0, *map(len, spans)])
    start_of = dict(zip(found, ends[:-1].tolist(), strict=True))
    own = np.zeros((len(positives), ends[-1]), dtype=bool)
    right = np.zeros_like(own)
    for question, row in enumerate(positives):
        if row >= 0:
            here = slice(start_of[row], start_of[row] + len(known[row]))
            own[question, here] = True
            sentences = map(normalize_answer, split_sentences(passages.texts[row]))
            right[question, here] = [contains_answer(sentence, answers[question]) for sentence in sentences]
    return StepSentences(spans, own, right)


def retriever_terms(
    settings: TrainingSettings,
    *,
    positives: Sequence[int],
    candidates: Sequence[Sequence[int]] = (),
    likelihoods: np.ndarray | None = None,
    sentences: StepSentences | None = None,
) -> dict[str, tuple[float, TermOfVectors]]:
    """The terms of the retriever's loss that are on, by name: the weight, and the term.

    Args:
        positives, candidates: places among the passages of the step, as losses.py takes them.
    """
    terms: dict[str, tuple[float, TermOfVectors]] = {}
    if settings.contrastive_weight:

        def contrastive(queries: torch.Tensor, passages: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            at = torch.tensor(positives, device=queries.device)
            return contrastive_loss(queries, passages, positives=at, temperature=settings.temperature)

        terms["contrastive"] = settings.contrastive_weight, contrastive
    if settings.sentence_weight and sentences is not None:

        def sentence(queries: torch.Tensor, _: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
            own, right = (torch.from_numpy(mask).to(queries.device) for mask in (sentences.own, sentences.right))
            return sentence_loss(queries, vectors, own=own, right=right, temperature=settings.temperature)

        terms["sentence"] = settings.sentence_weight, sentence
    if settings.feedback_weight and likelihoods is not None:

        def feedback(queries: torch.Tensor, passages: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return feedback_loss(
                queries,
                passages,
                candidates=torch.tensor(candidates, device=queries.device),
                likelihoods=torch.from_numpy(likelihoods).to(queries.device),
                temperature=settings.feedback_temperature,
            )

        terms["feedback"] = settings.feedback_weight, feedback
    return terms


def retriever_step(
    accelerator: Accelerator,
    retriever: Retriever,
    questions: Sequence[str],
    passages: Sequence[str],
    terms: dict[str, tuple[float, TermOfVectors]],
    *,
    cut: Cut,
    spans: Sequence[Sequence[Span]] | None = None,
) -> dict[str, float]:
    """Gradients of the weighted terms over the whole step; returns the loss and, where there are several, the terms.

    The loss needs all vectors at once but few texts fit into memory at once, on one process or many. So vectors are
    gathered without their graphs, the loss is taken once over all of them, and each process sends the gradients of
    its own vectors back through its encoder (gradient caching, Gao et al. 2021, arXiv:2101.06983). The graph of the last
    micro-batch is kept, so with one nothing is computed twice, and with two a half.

    Args:
        spans: for each passage where the sentences stand in it whose vectors the terms look at, too.
    """
    micro_batches = retriever_load(accelerator, retriever, questions, passages, cut).micro_batches
    sides = [
        _Side(accelerator, retriever, questions, "query", micro_batches),
        _Side(accelerator, retriever, passages, "document", micro_batches, spans),
    ]
    leaves = [side.gathered() for side in sides]
    vectors = leaves[0], *texts_and_sentences(leaves[1], spans)
    values = {name: (weight, term(*vectors)) for name, (weight, term) in terms.items()}
    loss = torch.stack([weight * value for weight, value in values.values()]).sum()
    accelerator.backward(loss)
    for side, leaf in zip(sides, leaves, strict=True):
        side.backward(leaf.grad)
    _sum_gradients(accelerator, retriever.model)
    parts = {name: value.item() for name, (_, value) in values.items()} if len(values) > 1 else {}
    return {"loss": loss.item()} | parts


class _Side:
    """The questions or the passages of a retriever step: this process embeds its share of them, in pieces.

    Each text makes a row, and below it one for each of its sentences if `spans` has any.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        retriever: Retriever,
        texts: Sequence[str],
        kind: str,
        micro_batches: int,
        spans: Sequence[Sequence[Span]] | None = None,
    ):
        self.accelerator, self.retriever, self.kind = accelerator, retriever, kind
        self.texts, self.spans = texts, spans
        self.shares = _shares(accelerator, texts)
        self.micro_batches = [
            piece for piece in shard(self.shares[accelerator.process_index], parts=micro_batches) if piece
        ]
        with torch.no_grad():
            self.vectors = [self._embed(piece) for piece in self.micro_batches[:-1]]
        self.vectors += [
            self._embed(piece) for piece in self.micro_batches[-1:]
        ]  # its graph is kept: one piece less to redo

    def _embed(self, piece: Sequence[int]) -> torch.Tensor:
        spans = [self.spans[at] for at in piece] if self.spans else None
        with self.accelerator.autocast():
            return self.retriever.embed([self.texts[at] for at in piece], kind=self.kind, spans=spans)

    def _height(self, texts: Sequence[int]) -> int:
        """How many rows these texts make."""
        return len(texts) + (sum(len(self.spans[at]) for at in texts) if self.spans else 0)

    def gathered(self) -> torch.Tensor:
        """All vectors of this side (n_rows, dim), on every process, as a leaf that collects gradients."""
        dimensions = self.retriever.model.get_embedding_dimension()
        heights = [self._height(share) for share in self.shares]
        padded = torch.zeros(max(heights), dimensions, device=self.accelerator.device)
        if self.vectors:
            mine = torch.cat([vectors.detach() for vectors in self.vectors])
            padded[: len(mine)] = mine
        everyone = self.accelerator.gather(padded).view(-1, len(padded), dimensions)
        kept = [everyone[rank, :height] for rank, height in enumerate(heights)]
        return torch.cat(kept).requires_grad_()

    def backward(self, gradient: torch.Tensor) -> None:
        """Send the gradients of this process's vectors back through the encoder, piece by piece from the last."""
        if self.vectors and not self.vectors[-1].requires_grad:
            return  # this side of the retriever is frozen
        end = sum(self._height(share) for share in self.shares[: self.accelerator.process_index + 1])
        while self.micro_batches:
            piece, vectors = self.micro_batches.pop(), self.vectors.pop()
            vectors = vectors if vectors.requires_grad else self._embed(piece)
            vectors.backward(gradient[end - len(vectors) : end])
            end -= len(vectors)


def _sum_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Add up the gradients of all processes. DDP would do it, but hangs or lies when a weight takes no part in the loss."""
    if accelerator.num_processes == 1:
        return
    parameters = trainable(model)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    flat = accelerator.reduce(flat, reduction="sum")
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()
