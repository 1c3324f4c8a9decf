"""The self-test: does each loss term have a gradient for its model, and for no other weights?

A term without a gradient shows only as bad results, hours later; one batch shows it in a second. Gradients are taken of
one term at a time, in float32, without dropout, on each process alone. Weights, gradients, modes and random states are
restored. Left out: retrieval (any passage will do), mixed precision, how processes share a step, and whether a saved
pair belongs together (pair_check.py).
"""

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from cozyrag.config import Settings, TrainingSettings
from cozyrag.data.corpus import Corpus
from cozyrag.data.passages import read_column, rows_of
from cozyrag.models.batching import answer_tokens, collate
from cozyrag.models.generator import Generator
from cozyrag.models.prompts import encode_examples, with_keywords
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import UNUSED, Retriever, texts_and_sentences
from cozyrag.retrieval.passage_index import Passages
from cozyrag.training.generator_phase import generator_losses, generator_penalties, generator_terms
from cozyrag.training.losses import ranking_loss
from cozyrag.training.training_pairs import LossTerm, TrainingPair, retriever_batch

CANDIDATES = 256  # first questions of the table, from which the batch is chosen
QUESTIONS = 4  # of the batch
CHARACTERS = 200  # of a passage: a second or two in all for a generator of 80 M weights
NO_GRADIENT = 1e-30  # an optimizer ignores gradients up to this size
NO_VALUE = 1e-12  # a term up to this size counts as zero
STEPS = (1e-2, 1e-3, 1e-4)  # relative decrease of a term that a step aims at, to first order
SCORED = 2  # passages of each question that the generator scores: the fewest that differ in rank
NAMES = {  # of the terms in the phases: the name on the screen, and the setting that leaves the term out
    "cross-entropy": ("cross-entropy", "--generator_steps 0"),
    "repeats": ("penalty on repeats", "--repeat_penalty 0"),
    "keywords": ("penalty on keywords", "--keyword_penalty 0"),
    "shortness": ("penalty on shortness", "--short_penalty 0"),
    "contrastive": ("contrastive loss", "--retriever_steps 0"),
    "sentence": ("sentence loss", "--sentence_weight 0"),
    "feedback": ("generator feedback", "--feedback_weight 0"),
    "ranking": ("ranking loss", "--reranker_steps 0"),
}


# ---- the terms


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    switch: the setting that leaves the term out. model: the one it trains, "generator", "retriever" or "reranker".
    value: computes the term on the batch, a scalar with its graph. may_be_zero: without a graph. note: for the log.
    """

    name: str
    switch: str
    model: str
    value: Callable[[], torch.Tensor]
    may_be_zero: bool = False
    note: str = ""


@dataclass(frozen=True)
class SmallBatch:
    """A few training questions: `contexts` are for the generator, `passages` for the retriever.

    `answers`: the first reference of each question, or ""; `positives`: the place of each question's passage.
    """

    questions: list[str]
    answers: list[str]
    contexts: list[str]
    passages: Passages
    positives: list[int]


def small_batch(corpus: Corpus) -> SmallBatch:
    """A few training questions with the beginning of their gold passage, else of any, and two more passages.

    Questions with answers come first, the longest answers before others: short ones repeat nothing.
    """
    asked, count = corpus.questions[:CANDIDATES], len(corpus.passages)
    row_of = rows_of(read_column(corpus.passages, "id"), asked["passage_id"])
    answers = [each[0] if each else "" for each in asked["answers"]]
    order = sorted(
        range(len(answers)),
        key=lambda row: (not answers[row], asked["passage_id"][row] not in row_of, -len(answers[row])),
    )[:QUESTIONS]
    gold = [row_of.get(asked["passage_id"][row], place % count) for place, row in enumerate(order)]
    chosen = list(dict.fromkeys([*gold, *range(min(2, count))]))  # a contrastive loss needs two
    found = corpus.passages[chosen]
    texts = [text[:CHARACTERS] for text in found["text"]]
    return SmallBatch(
        questions=[asked["question"][row] for row in order],
        answers=[answers[row] for row in order],
        contexts=[texts[chosen.index(row)] for row in gold],
        passages=Passages(found["id"], found["title"], texts),
        positives=[chosen.index(row) for row in gold],
    )


def active_terms(
    generator: Generator, retriever: Retriever, corpus: Corpus, settings: Settings, reranker: Reranker | None = None
) -> list[Term]:
    """The loss terms of a run with these settings, as the phases make them."""
    training = settings.training
    terms: list[Term] = []
    if not training.rounds or not len(corpus.questions):
        return terms
    batch, context_tokens = small_batch(corpus), settings.contexts.context_tokens
    if training.generator_steps != 0 and training.generator_epochs > 0:
        terms += _generator_terms(generator, batch, training, context_tokens)
    if training.retriever_steps != 0 and training.retriever_epochs > 0:
        judged = _likelihoods(generator, batch, context_tokens) if training.feedback_weight else []
        terms += _retriever_terms(retriever, batch, training, judged)
    if reranker is not None and training.reranker_steps != 0 and training.reranker_epochs > 0:
        terms.append(_ranking_term(reranker, batch))
    return terms


def _generator_terms(
    generator: Generator, batch: SmallBatch, training: TrainingSettings, context_tokens: int
) -> list[Term]:
    """The cross-entropy and the penalties that are on, as means over the batch."""
    rows = [row for row, answer in enumerate(batch.answers) if answer or training.no_answer]
    if not rows:
        return []
    questions = [batch.questions[row] for row in rows]
    examples = encode_examples(
        generator.tokenizer,
        questions=questions,
        contexts=[batch.contexts[row] for row in rows],
        answers=[batch.answers[row] for row in rows],
        context_tokens=context_tokens,
        max_length=generator.max_length,
        layout=generator.layout,
    )
    batch_of = with_keywords(generator.tokenizer, examples, questions)
    collated = collate(batch_of, pad_id=generator.tokenizer.pad_token_id)
    tensors = {name: tensor.to(generator.device) for name, tensor in collated.items()}
    penalties = generator_penalties(training)
    module = generator_losses(generator, penalties)

    def value(place: int, count: int) -> Callable[[], torch.Tensor]:
        return lambda: generator_terms(module, tensors)[place] / count

    found = [Term(*NAMES["cross-entropy"], "generator", value(0, answer_tokens(examples)))]
    for place, name in enumerate(penalties.names, 1):
        found.append(Term(*NAMES[name], "generator", value(place, len(examples)), may_be_zero=True))
    return found


def _likelihoods(generator: Generator, batch: SmallBatch, context_tokens: int) -> list[tuple[list[int], list[float]]]:
    """(candidates, their likelihoods) for each question, as in the retriever phase; NaN where there is no answer."""
    texts = batch.passages.to_read()
    scored = min(SCORED, len(texts))
    candidates = [[(place + shift) % len(texts) for shift in range(scored)] for place in batch.positives]
    likelihoods = generator.log_likelihoods(
        [question for question in batch.questions for _ in range(scored)],
        [texts[place] for places in candidates for place in places],
        [answer for answer in batch.answers for _ in range(scored)],
        context_tokens=context_tokens,
    ).reshape(-1, scored)
    likelihoods[[not answer for answer in batch.answers]] = np.nan
    return list(zip(candidates, likelihoods.astype(np.float32).tolist(), strict=True))


def _retriever_terms(
    retriever: Retriever, batch: SmallBatch, training: TrainingSettings, feedback: list[tuple[list[int], list[float]]]
) -> list[Term]:
    """The active terms of the retriever; `feedback`: candidates and likelihoods per question, or empty."""
    everything = range(len(batch.passages.ids))  # as negatives, so that all passages take part
    scored = feedback or [([], [])] * len(batch.questions)
    pairs = [
        TrainingPair(question, [answer] if answer else [], positive, everything, *own)
        for question, answer, positive, own in zip(batch.questions, batch.answers, batch.positives, scored, strict=True)
    ]
    step = retriever_batch(pairs, batch.passages, training)

    def value(term: LossTerm) -> Callable[[], torch.Tensor]:
        def recompute() -> torch.Tensor:
            queries = retriever.embed(step.questions, kind="query")
            vectors = retriever.embed(step.passages, kind="document", spans=step.spans)
            return term.function(queries, *texts_and_sentences(vectors, step.spans))

        return recompute

    return [Term(*NAMES[term.name], "retriever", value(term)) for term in step.terms]


def _ranking_term(reranker: Reranker, batch: SmallBatch) -> Term:
    """The reranker's loss: each question's passage against the others of the batch."""
    texts = batch.passages.to_read()
    pairs = [
        (question, texts[place])
        for question, positive in zip(batch.questions, batch.positives, strict=True)
        for place in (positive, *(other for other in range(len(texts)) if other != positive))
    ]
    counts = [len(texts)] * len(batch.questions)
    note = "" if reranker.is_trained else ", all of them once its head is no longer zero"
    return Term(*NAMES["ranking"], "reranker", lambda: ranking_loss(reranker.logits(pairs), counts), note=note)


# ---- the result of a check


@dataclass(frozen=True)
class Finding:
    """The result for one term on one batch.

    connected: whether the value has a graph. tensors: number of trainable tensors of its model; still: those without a
    gradient; norm: of the gradients of the others. broken: tensors with a gradient that is NaN or infinite. foreign:
    tensors with a gradient that belong to no trained part. lowered: whether a small step along the negative gradient
    lowers the term, None without such a step.
    """

    term: Term
    value: float
    connected: bool
    tensors: int
    norm: float
    still: tuple[str, ...]
    broken: tuple[str, ...]
    foreign: tuple[str, ...]
    lowered: bool | None

    @property
    def moved(self) -> int:
        """Number of trainable tensors of its model that get a gradient."""
        return self.tensors - len(self.still)

    @property
    def is_zero(self) -> bool:
        """Whether the term is zero on the batch without a fault."""
        return not self.moved and abs(self.value) <= NO_VALUE and (self.connected or self.term.may_be_zero)

    @property
    def fault(self) -> str | None:
        """Expected, found, consequence and remedy in two sentences, or None."""
        name, model = self.term.name, self.term.model
        remedy = f"give another --{model}, or {self.term.switch}."
        if not math.isfinite(self.value) or self.broken:
            return (
                f"Self-test: expected the {name} and its gradients to be finite, found the value {self.value:.4g} and "
                f"NaN or infinity in the gradients of {len(self.broken)} tensors{_such_as(self.broken)}; one step "
                f"would destroy the weights of the {model}. To go on, {remedy}"
            )
        if self.foreign:
            return (
                f"Self-test: expected the {name} to move the {model} and nothing else, found gradients in "
                f"{len(self.foreign)} other tensors{_such_as(self.foreign)}, which training must not change. The fault "
                f"is in the code of the loss or of the model: fix it, {remedy}"
            )
        if not self.moved and not self.is_zero:
            return (
                f"Self-test: expected the {name}, here {self.value:.4g}, to move the {model}, found no gradient in any "
                f"of the {self.tensors} trainable tensors; steps would change nothing. Unfreeze weights, {remedy}"
            )
        return None

    @property
    def verdict(self) -> str:
        """The result in a word or two."""
        if self.fault:
            return "FAULT"
        if self.is_zero:
            return "zero on this batch"
        return "step does not lower it" if self.lowered is False else "ok"

    def row(self) -> dict:
        """The row of metrics.jsonl; NaN and infinity become null."""
        value, norm = (number if math.isfinite(number) else None for number in (self.value, self.norm))
        return {
            "term": self.term.name,
            "model": self.term.model,
            "value": value,
            "gradient_norm": norm,
            "tensors": self.tensors,
            "tensors_moved": self.moved,
            "without_gradient": list(self.still),
            "wrongly_moved": list(self.foreign),
            "lowered": self.lowered,
            "verdict": self.verdict,
        }


def _such_as(names: Sequence[str]) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""


def check_terms(
    generator: Generator,
    retriever: Retriever,
    corpus: Corpus,
    settings: Settings,
    *,
    reranker: Reranker | None = None,
    moving: Collection[str] = ("generator", "retriever", "reranker"),
) -> list[Finding]:
    """A finding for each active term of the models in `moving`, on one small batch. The models are unchanged after."""
    models = {"generator": generator.model, "retriever": retriever.model}
    models |= {"reranker": reranker.model} if reranker is not None else {}
    with left_as_found(models.values()):
        terms = active_terms(generator, retriever, corpus, settings, reranker)
        return [_check_term(term, models) for term in terms if term.model in moving]


@contextmanager
def left_as_found(models: Collection[torch.nn.Module], *, weights: bool = False) -> Iterator[None]:
    """Models without dropout; modes and random states are restored at the end, with `weights=True` weights, too."""
    kept = [
        {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        for model in models
        if weights
    ]
    modes = [(module, module.training) for model in models for module in model.modules()]
    devices = {parameter.device for model in models for parameter in model.parameters() if parameter.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            for model in models:
                model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for model, state in zip(models, kept, strict=False):
            model.load_state_dict(state)
            model.zero_grad()


def _check_term(term: Term, models: dict[str, torch.nn.Module]) -> Finding:
    weights = {
        f"{role}: {name}": parameter
        for role, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    unused = UNUSED if term.model == "retriever" else None  # a reranker reads its pooler
    claimed = {name for name in weights if name.startswith(f"{term.model}: ") and not (unused and unused in name)}
    loss = term.value()
    gradients = _gradients(loss, weights)
    norms = {name: norm for name, gradient in gradients.items() if (norm := _norm(gradient)) != 0}
    value = loss.item()
    norm = math.hypot(*(norms[name] for name in norms if name in claimed))
    lowered = None
    if math.isfinite(value) and math.isfinite(norm) and norm:
        moved = [(weights[name], gradients[name]) for name in norms if name in claimed]
        lowered = _step_lowers(term, value, moved, norm)
    return Finding(
        term,
        value,
        loss.requires_grad,
        tensors=len(claimed),
        norm=norm,
        still=tuple(name for name in weights if name in claimed and name not in norms),
        broken=tuple(name for name in norms if not math.isfinite(norms[name])),
        foreign=tuple(name for name in norms if name not in claimed),
        lowered=lowered,
    )


def _gradients(value: torch.Tensor, weights: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Gradients by name where there is one. The weights' .grad is not touched."""
    if not value.requires_grad or not weights:
        return {}
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def _norm(tensor: torch.Tensor) -> float:
    """Euclidean norm; scaled first, because squares of small gradients are zero in float32."""
    peak = torch.linalg.vector_norm(tensor, torch.inf).item()
    if peak <= NO_GRADIENT:
        return 0.0
    if not 1e-12 < peak < 1e12:
        return peak * torch.linalg.vector_norm(tensor / peak).item()
    return torch.linalg.vector_norm(tensor).item()


@torch.no_grad()
def _step_lowers(
    term: Term, value: float, moved: Sequence[tuple[torch.nn.Parameter, torch.Tensor]], norm: float
) -> bool:
    """Whether a gradient step lowers the term; shorter steps are tried after a longer one. Weights are restored."""
    kept = [weight.clone() for weight, _ in moved]
    size = math.hypot(*(_norm(weight) for weight in kept)) or math.inf  # a head of zeros may move as far as it needs
    try:
        for share in STEPS:
            length = share * min(abs(value) / norm, size)
            for (weight, gradient), before in zip(moved, kept, strict=True):
                weight.copy_(torch.sub(before, gradient, alpha=length / norm))
            if term.value().item() < value:
                return True
        return False
    finally:
        for (weight, _), before in zip(moved, kept, strict=True):
            weight.copy_(before)


# ---- on the screen


def findings_line(findings: Sequence[Finding], seconds: float) -> str:
    """The findings in a run's log."""
    parts = []
    for finding in findings:
        name, model = finding.term.name, finding.term.model
        if finding.is_zero:
            parts.append(f"{name} is zero on this batch")
        else:
            note = ", but a small step does not lower it" if finding.lowered is False else ""
            parts.append(f"{name} moves {finding.moved} of {finding.tensors} {model} tensors{finding.term.note}{note}")
    return f"self-test: {'; '.join(parts) or 'no loss term is active'} ({seconds:.1f} s)"


def findings_table(findings: Sequence[Finding]) -> str:
    """The findings as columns; below them, tensors without a gradient, and those that should have none."""
    rows = [("term", "moves", "value", "gradient norm", "tensors moved", "step lowers it", "verdict")]
    for found in findings:
        lowered = {True: "yes", False: "no", None: "-"}[found.lowered]
        moved, value, norm = f"{found.moved} of {found.tensors}", f"{found.value:.4g}", f"{found.norm:.3g}"
        rows.append((found.term.name, found.term.model, value, norm, moved, lowered, found.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for found in findings:
        if found.still and not found.is_zero:
            lines.append(f"{found.term.name}: no gradient in {', '.join(found.still)}")
        if found.foreign:
            lines.append(f"{found.term.name}: unexpected gradient in {', '.join(found.foreign)}")
    return "\n".join(lines)
