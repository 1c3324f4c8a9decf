"""One generator phase and one retriever phase: the only file that calls backward and step.

Both phases share a loop: plan the steps, take them, tell the watcher. A step is a set of rows over all processes, its
loss the mean over all its answer tokens or pairs, so its result does not depend on how many processes share it or in
how many pieces they work. Left out: where rows come from (contexts.py), saving (checkpoint.py), rounds (rounds.py).
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from transformers import get_scheduler

from cozyrag.batches import answer_tokens, collate, phase_seed, plan_steps, share_out
from cozyrag.config import TrainingSettings
from cozyrag.generator import Generator, PenalizedLosses, TokenLosses
from cozyrag.index import Passages
from cozyrag.losses import contrastive_loss, feedback_loss
from cozyrag.penalties import Penalties
from cozyrag.prompts import Example, encode_examples, with_keywords
from cozyrag.retriever import Retriever
from cozyrag.sharding import Sharded, is_split, joined, keep_state_whole


@dataclass(frozen=True)
class StepReport:
    """What a step tells: `loss` in nats (mean over the step), `rate` in rows per second since the last report.

    `terms`: penalties that are on (means over the answers), or the terms of the retriever's loss if it has several; by
    name and before their weights. `bad`: the loss or the gradient was no number, and no step was taken.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    rate: float
    terms: dict[str, float]
    bad: bool = False


class Watcher:
    """Who is told about a phase: it restores an interrupted one, and logs and saves after steps."""

    def restore(self) -> int:
        """Load the optimizer of an interrupted phase, if there is one; returns the steps already taken."""
        return 0

    def pieces(self) -> int:
        """Pieces that steps are to be worked through in at least, since fewer did not fit into memory before."""
        return 1

    def after_step(self, report: StepReport) -> bool | None:
        """Called after each optimizer step, on every process; true ends the phase there, as a probe does that knows enough."""

    def bad_step(self, report: StepReport, gradient_norm: float, rows: Callable[[], list[dict]]) -> None:
        """Called before `after_step` when a step was skipped; `rows` gives its batch to look at."""

    def out_of_memory(self, pieces: int) -> None:
        """Called when memory did not do and the step is tried again in so many pieces."""


def train_generator(
    accelerator: Accelerator,
    generator: Generator,
    contexts: Dataset,
    *,
    settings: TrainingSettings,
    context_tokens: int,
    round_number: int,
    watcher: Watcher,
) -> int:
    """Teach the generator to answer from the contexts; returns the number of steps. Loss on answer and EOS tokens only.

    Rows without an answer are left out, unless it is to learn to write nothing (EOS alone) where there is none.
    """
    examples = generator_examples(generator, contexts[:], settings=settings, context_tokens=context_tokens)
    steps = generator_steps([len(example.input_ids) for example in examples], settings, round_number)
    module, take = generator_lesson(accelerator, generator, examples, settings)

    def take_step(number: int, pieces: int) -> dict[str, float]:
        return take(steps[number], pieces)

    def show(number: int) -> list[dict]:
        return [{"text": generator.tokenizer.decode(examples[row].input_ids)} for row in steps[number]]

    run_phase(
        accelerator, "generator", trainable(module), steps, take_step,
        settings=settings, learning_rate=settings.generator_learning_rate, round_number=round_number, watcher=watcher, show=show,
    )  # fmt: skip
    end_lesson(accelerator, generator, module)
    generator.model.eval()
    return len(steps)


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of a module that may be trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def generator_examples(
    generator: Generator, columns: dict[str, list], *, settings: TrainingSettings, context_tokens: int
) -> list[Example]:
    """The examples that the rows of a contexts table make, without those that have nothing to teach."""
    wanted = [answers[0] if answers else "" for answers in columns["answers"]]
    if settings.no_answer:
        wanted = ["" if noised else answer for answer, noised in zip(wanted, columns["noised"], strict=True)]
    usable = [row for row, answer in enumerate(wanted) if answer or settings.no_answer]
    questions = [columns["question"][row] for row in usable]
    examples = encode_examples(
        generator.tokenizer,
        questions=questions,
        contexts=[columns["context"][row] for row in usable],
        answers=[wanted[row] for row in usable],
        context_tokens=context_tokens,
        max_length=generator.max_length,
        layout=generator.layout,
    )
    return with_keywords(generator.tokenizer, examples, questions) if generator_penalties(settings).names else examples


def generator_steps(lengths: Sequence[int], settings: TrainingSettings, round_number: int) -> list[np.ndarray]:
    """The steps of a generator phase over examples of these lengths, in tokens; see `plan_steps`."""
    return plan_steps(
        lengths,
        batch_size=settings.generator_batch_size,
        epochs=settings.generator_epochs,
        max_steps=settings.generator_steps,
        seed=phase_seed(settings.seed, round_number=round_number, phase="generator"),
    )


def generator_lesson(
    accelerator: Accelerator, generator: Generator, examples: Sequence[Example], settings: TrainingSettings
) -> tuple[torch.nn.Module, Callable[..., dict[str, float]]]:
    """The module that a generator phase trains, and what leaves in it the gradients of a step on some of the examples.

    That takes their rows and, if they shall be others than in the settings, the pieces to work through them in. `end_lesson`
    must follow.
    """
    penalties = generator_penalties(settings)
    generator.model.train()
    module = _prepared(accelerator, generator, generator_losses(generator, penalties), settings.generator_sharding)

    def take(rows: Sequence[int], pieces: int = settings.gradient_accumulation_steps) -> dict[str, float]:
        told = generator_step(
            accelerator,
            module,
            [examples[row] for row in rows],
            pad_id=generator.tokenizer.pad_token_id,
            pieces=pieces,
            weights=penalties.weights,
        )
        return dict(zip(["loss", *penalties.names], told, strict=True))

    return module, take


def _prepared(
    accelerator: Accelerator, generator: Generator, losses: TokenLosses, sharding: str | None
) -> torch.nn.Module:
    """The losses as all processes train them together: whole under DDP, or in parts."""
    if not is_split(sharding):
        return accelerator.prepare(losses)
    blocks = generator.model._no_split_modules or ()  # transformers' name for its layers
    generator.parts = Sharded(
        losses, blocks, device=accelerator.device, sharding=sharding, precision=accelerator.mixed_precision
    )
    return generator.parts.module


def end_lesson(accelerator: Accelerator, generator: Generator, module: torch.nn.Module) -> None:
    """Give the generator back whole and plain after `generator_lesson`, and let go of what trained it."""
    if generator.parts is None:
        accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    else:
        generator.gather()
        generator.parts = None
    accelerator.free_memory()
    generator.model.to(accelerator.device)


def generator_penalties(settings: TrainingSettings) -> Penalties:
    """The penalties on answers as the settings weigh them."""
    return Penalties(
        repeats=settings.repeat_penalty,
        keywords=settings.keyword_penalty,
        shortness=settings.short_penalty,
        ngram=settings.repeat_ngram,
        min_tokens=settings.short_tokens,
    )


def generator_losses(generator: Generator, penalties: Penalties) -> TokenLosses:
    """The module that gives the terms of the generator: the cross-entropy, and the penalties that are on."""
    if penalties.names:
        return PenalizedLosses(generator.model, penalties=penalties, eos=generator.end)
    return TokenLosses(generator.model)


def generator_terms(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1 + n_penalties,) sums over one micro-batch: cross-entropy over its answer tokens, penalties over its answers."""
    result = module(**batch)
    losses, penalties = result if isinstance(result, tuple) else (result, result.new_zeros(0))
    return torch.cat([losses.sum().unsqueeze(0), penalties])


def generator_step(
    accelerator: Accelerator,
    module: torch.nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    pieces: int,
    weights: Sequence[float] = (),
) -> list[float]:
    """Gradients of the mean loss over all answer tokens of the step and of the weighted penalties.

    Every process works through `pieces` micro-batches. Each micro-batch weighs as much as it has answer tokens (for the
    penalties: answers), so uneven lengths and shares change nothing.

    Args:
        module: TokenLosses, or with `weights` of the penalties that are on PenalizedLosses.

    Returns:
        the loss, then the penalties before their weights, each a mean over the step.
    """
    world = accelerator.num_processes
    mine = share_out(range(len(examples)), parts=world * pieces)[accelerator.process_index :: world]
    # DDP takes the mean over processes, we want the sum
    shares = torch.tensor([world / answer_tokens(examples)] + [world / len(examples)] * len(weights))
    shares, factors = shares.to(accelerator.device), torch.tensor([1.0, *weights], device=accelerator.device)
    told = torch.zeros_like(factors)
    for number, rows in enumerate(mine):
        # An empty share still goes forward and backward, with weight 0: DDP waits for every process.
        batch = collate([examples[row] for row in rows] or examples[:1], pad_id=pad_id)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.no_sync(module) if number + 1 < len(mine) else nullcontext():
            parts = generator_terms(module, batch) * shares * bool(rows)
            accelerator.backward((parts * factors).sum())
        told += parts.detach()
    return accelerator.reduce(told, reduction="mean").tolist()


def train_retriever(
    accelerator: Accelerator,
    retriever: Retriever,
    contexts: Dataset,
    passages: Passages,
    *,
    settings: TrainingSettings,
    round_number: int,
    watcher: Watcher,
    likelihoods: np.ndarray | None = None,
    left_out: Collection[str] = (),
    refreshed: Callable[[int, int], Dataset | None] = lambda done, total: None,
) -> int:
    """Teach the retriever to put each question next to its positive passage; returns the number of steps.

    Rows that no active loss can use are left out. No dropout: the vectors trained are the vectors indexed.

    Args:
        likelihoods: (n_rows, k), the generator's feedback on the k best passages of each row (feedback.py), if wanted.
        left_out: ids of questions that are not to be learned from.
        refreshed: asked before each step with the steps done and their total; a table of the same questions that it gives
            takes the place of `contexts` as the source of negatives.
    """
    columns = contexts.select_columns(["id", "question", "positive", "negatives", "rows"])[:]
    usable = retriever_usable(columns, settings, likelihoods, left_out)
    texts = passages.to_read()
    steps = retriever_steps(
        [
            len(texts[columns["positive"][row] if columns["positive"][row] >= 0 else columns["rows"][row][0]])
            for row in usable
        ],
        settings,
        round_number,
    )
    retriever.model.eval()

    def begin_step(number: int) -> None:
        newer = refreshed(number, len(steps))
        if newer is not None:
            columns["negatives"] = newer["negatives"][:]

    def take_step(number: int, pieces: int) -> dict[str, float]:
        rows = [usable[row] for row in steps[number]]
        return retriever_lesson(accelerator, retriever, columns, texts, rows, settings, likelihoods, pieces=pieces)

    def show(number: int) -> list[dict]:
        return [_pair(columns, texts, usable[row]) for row in steps[number]]

    run_phase(
        accelerator, "retriever", trainable(retriever.model), steps, take_step,
        settings=settings, learning_rate=settings.retriever_learning_rate, round_number=round_number, watcher=watcher, begin_step=begin_step, show=show,
    )  # fmt: skip
    accelerator.free_memory()
    return len(steps)


def _pair(columns: dict[str, list], texts: Sequence[str], row: int) -> dict:
    """What a row of the contexts table teaches the retriever, to be read by a person."""
    positive = columns["positive"][row]
    return {
        "question": columns["question"][row],
        "positive": texts[positive] if positive >= 0 else None,
        "negatives": [texts[each] for each in columns["negatives"][row]],
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
    contrasted = positives >= 0 if settings.contrastive_weight else np.zeros_like(judged)
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


def retriever_lesson(
    accelerator: Accelerator,
    retriever: Retriever,
    columns: dict[str, list],
    texts: Sequence[str],
    rows: Sequence[int],
    settings: TrainingSettings,
    likelihoods: np.ndarray | None,
    *,
    pieces: int | None = None,
) -> dict[str, float]:
    """Gradients of a step on some rows of a contexts table; its columns question, positive, negatives and rows are read."""
    at = [columns["positive"][row] for row in rows]
    candidates = [columns["rows"][row][: likelihoods.shape[1]] for row in rows] if likelihoods is not None else []
    found = step_passages(columns, rows, 0 if likelihoods is None else likelihoods.shape[1])
    places = {row: place for place, row in enumerate(found)} | {-1: -1}
    return retriever_step(
        accelerator,
        retriever,
        [columns["question"][row] for row in rows],
        [texts[row] for row in found],
        retriever_terms(
            settings,
            positives=[places[row] for row in at],
            candidates=[[places[row] for row in each] for each in candidates],
            likelihoods=None if likelihoods is None else likelihoods[rows],
        ),
        pieces=pieces or settings.gradient_accumulation_steps,
    )


def step_passages(columns: dict[str, list], rows: Sequence[int], judged: int) -> list[int]:
    """The passages of a step on these rows: positives, negatives, and the `judged` best ones of each row; each once."""
    found = [columns["positive"][row] for row in rows if columns["positive"][row] >= 0]
    found += [passage for row in rows for passage in columns["negatives"][row]]
    return list(dict.fromkeys(found + [passage for row in rows for passage in columns["rows"][row][:judged]]))


def retriever_terms(
    settings: TrainingSettings,
    *,
    positives: Sequence[int],
    candidates: Sequence[Sequence[int]] = (),
    likelihoods: np.ndarray | None = None,
) -> dict[str, tuple[float, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]]:
    """The terms of the retriever's loss that are on, by name: the weight, and vectors (questions, passages) to a scalar.

    Args:
        positives, candidates: places among the passages of the step, as losses.py takes them.
    """
    terms: dict[str, tuple[float, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {}
    if settings.contrastive_weight:

        def contrastive(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
            at = torch.tensor(positives, device=queries.device)
            return contrastive_loss(queries, passages, positives=at, temperature=settings.temperature)

        terms["contrastive"] = settings.contrastive_weight, contrastive
    if settings.feedback_weight and likelihoods is not None:

        def feedback(queries: torch.Tensor, passages: torch.Tensor) -> torch.Tensor:
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
    terms: dict[str, tuple[float, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]],
    *,
    pieces: int,
) -> dict[str, float]:
    """Gradients of the weighted terms over the whole step; returns the loss and, where there are several, the terms.

    The loss needs all vectors at once but few texts fit into memory at once, on one process or many. So vectors are
    gathered without their graphs, the loss is taken once over all of them, and each process sends the gradients of
    its own vectors back through its encoder (gradient caching, Gao et al. 2021, arXiv:2101.06983). The graph of the last
    piece is kept, so with one piece nothing is computed twice, and with two a half.
    """
    sides = [
        _Side(accelerator, retriever, questions, "query", pieces),
        _Side(accelerator, retriever, passages, "document", pieces),
    ]
    leaves = [side.gathered() for side in sides]
    values = {name: (weight, term(*leaves)) for name, (weight, term) in terms.items()}
    loss = torch.stack([weight * value for weight, value in values.values()]).sum()
    accelerator.backward(loss)
    for side, leaf in zip(sides, leaves, strict=True):
        side.backward(leaf.grad)
    _sum_gradients(accelerator, retriever.model)
    parts = {name: value.item() for name, (_, value) in values.items()} if len(values) > 1 else {}
    return {"loss": loss.item()} | parts


class _Side:
    """The questions or the passages of a retriever step: this process embeds its share of them, in pieces."""

    def __init__(self, accelerator: Accelerator, retriever: Retriever, texts: Sequence[str], kind: str, pieces: int):
        self.accelerator, self.retriever, self.kind = accelerator, retriever, kind
        self.shares = share_out(range(len(texts)), parts=accelerator.num_processes)
        mine = self.shares[accelerator.process_index]
        self.pieces = [
            [texts[mine[at]] for at in piece] for piece in share_out(range(len(mine)), parts=pieces) if piece
        ]
        with torch.no_grad():
            self.vectors = [self._embed(piece) for piece in self.pieces[:-1]]
        self.vectors += [self._embed(piece) for piece in self.pieces[-1:]]  # its graph is kept: one piece less to redo

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.retriever.embed(texts, kind=self.kind)

    def gathered(self) -> torch.Tensor:
        """All vectors of this side (n_texts, dim), on every process, as a leaf that collects gradients."""
        dimensions = self.retriever.model.get_embedding_dimension()
        longest = len(self.shares[0])
        padded = torch.zeros(longest, dimensions, device=self.accelerator.device)
        if self.vectors:
            mine = torch.cat([vectors.detach() for vectors in self.vectors])
            padded[: len(mine)] = mine
        everyone = self.accelerator.gather(padded).view(-1, longest, dimensions)
        kept = [everyone[rank, : len(share)] for rank, share in enumerate(self.shares)]
        return torch.cat(kept).requires_grad_()

    def backward(self, gradient: torch.Tensor) -> None:
        """Send the gradients of this process's vectors back through the encoder, piece by piece from the last."""
        if self.vectors and not self.vectors[-1].requires_grad:
            return  # this side of the retriever is frozen
        mine = self.shares[self.accelerator.process_index]
        end = sum(len(share) for share in self.shares[: self.accelerator.process_index]) + len(mine)
        while self.pieces:
            piece, vectors = self.pieces.pop(), self.vectors.pop()
            vectors = vectors if vectors.requires_grad else self._embed(piece)
            vectors.backward(gradient[end - len(piece) : end])
            end -= len(piece)


def _sum_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Add up the gradients of all processes. DDP would do it, but hangs or lies when a weight takes no part in the loss."""
    if accelerator.num_processes == 1:
        return
    parameters = trainable(model)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    flat = accelerator.reduce(flat, reduction="sum")
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def run_phase(
    accelerator: Accelerator,
    phase: str,
    parameters: list[torch.nn.Parameter],
    steps: list[np.ndarray],
    take_step: Callable[[int, int], dict[str, float]],
    *,
    settings: TrainingSettings,
    learning_rate: float,
    round_number: int,
    watcher: Watcher,
    begin_step: Callable[[int], object] = lambda number: None,
    show: Callable[[int], list[dict]] = lambda number: [],
    quiet: bool = False,
) -> None:
    """Take the steps of a phase: gradients, clip, AdamW, schedule. A resumed phase takes the ones that are left.

    A step whose loss or gradient is no number changes no weight. One that does not fit into memory is taken in twice as
    many pieces, and so are those after it.

    Args:
        take_step: (number, pieces); leaves the gradients of the step of that number, worked through in so many pieces, and
            returns its loss and terms by name.
        begin_step: called before it, once for each step.
        show: the batch of a step as rows that a person can read.
    """
    if not steps:
        return
    optimizer, scheduler = accelerator.prepare(
        *_optimizer(parameters, len(steps), learning_rate, settings, accelerator.device.type)
    )
    done = watcher.restore()
    pieces = max(settings.gradient_accumulation_steps, watcher.pieces())
    bar = tqdm(total=len(steps), initial=done, desc=f"round {round_number}: {phase} phase", unit="step", disable=quiet)
    clock = time.perf_counter()
    for number in range(done, len(steps)):
        begin_step(number)

        def attempt(pieces: int, number: int = number) -> dict[str, float]:
            set_seed(phase_seed(settings.seed, round_number=round_number, phase=phase, step=number))
            return take_step(number, pieces)

        told, pieces = _within_memory(accelerator, attempt, optimizer, pieces, len(steps[number]), watcher)
        norm = float(joined(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)))
        used_rate = scheduler.get_last_lr()[0]
        bad = not (math.isfinite(told["loss"]) and (accelerator.scaler or math.isfinite(norm)))
        if not bad or accelerator.scaler:  # a scaler skips by itself, and must be told of every step
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rate = len(steps[number]) / (time.perf_counter() - clock)
        report = StepReport(number + 1, len(steps), told.pop("loss"), used_rate, rate, told, bad)
        if bad:
            watcher.bad_step(report, norm, lambda number=number: show(number))
        enough = watcher.after_step(report)
        clock = time.perf_counter()  # what the watcher took (saving, logging) is not training time
        bar.update()
        if enough:
            break
    bar.close()


def _within_memory(
    accelerator: Accelerator,
    attempt: Callable[[int], dict[str, float]],
    optimizer: torch.optim.Optimizer,
    pieces: int,
    rows: int,
    watcher: Watcher,
) -> tuple[dict[str, float], int]:
    """What an attempt at a step gives and the pieces it took: twice as many as before whenever memory does not do.

    Several processes cannot try again, since the others are already waiting for this one's gradients.

    Raises:
        RuntimeError: single rows do not fit either, or there are several processes; says what to do.
    """
    while True:
        try:
            return attempt(pieces), pieces
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if accelerator.num_processes > 1:
                raise RuntimeError(
                    f"out of memory on process {accelerator.process_index}: run again with --gradient_accumulation_steps {2 * pieces} and "
                    "--resume_anyway, which goes on from the last checkpoint with the same batches in smaller pieces"
                ) from error
            if pieces >= rows:
                raise RuntimeError(
                    "out of memory even with one row at a time: use a smaller model, or lower --context_tokens or --passage_tokens"
                ) from error
        pieces = min(2 * pieces, rows)
        optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        watcher.out_of_memory(pieces)


def _optimizer(
    parameters: list[torch.nn.Parameter], steps: int, learning_rate: float, settings: TrainingSettings, device: str
):
    """AdamW (weight decay on matrices only) and its schedule."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=device in ("cpu", "cuda"))
    keep_state_whole(optimizer)
    warmup = round(settings.warmup_ratio * steps)
    return optimizer, get_scheduler(
        settings.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
