"""The loop that both phases share: take the planned steps within memory, step the optimizer, call the callback.

Left out: what a step computes and over which rows (generator_phase.py, retriever_phase.py), its micro-batches
(micro_batches.py), checkpoints (checkpointing.py), rounds (rounds.py).
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed, tqdm
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import get_scheduler

from cozyrag.config import TrainingSettings
from cozyrag.models.fsdp import joined, keep_state_whole
from cozyrag.models.product_attention import has_products
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.runtime.hardware import room_for_training
from cozyrag.training.micro_batches import Cut, Load, retriever_budget, token_bytes
from cozyrag.training.step_order import phase_seed

Rows: TypeAlias = Sequence[int] | np.ndarray  # of a step


@dataclass(frozen=True)
class StepReport:
    """The result of a step: `loss` in nats (mean over the step), `rate` in rows per second.

    terms: by name and before weighting, the active penalties (means over the answers), or the terms of the retriever's
    loss if it has several. skipped: the loss or the gradient is not finite, and the weights are unchanged.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    rate: float
    terms: dict[str, float]
    skipped: bool = False


@dataclass(frozen=True)
class Phase:
    """What a phase trains, and how its steps are computed.

    Args:
        steps: the rows of each step.
        take_step: leaves the gradients of a step on some rows and returns its loss and terms by name.
        load: the load of a step on some rows; required for micro-batches by tokens.
        show: some rows in readable form.
        begin_step: called once before each step with its number.
    """

    name: str
    parameters: list[torch.nn.Parameter]
    steps: Sequence[Rows]
    learning_rate: float
    take_step: Callable[[Rows, Cut], dict[str, float]]
    load: Callable[[Rows, Cut], Load] = lambda rows, cut: Load(cut.micro_batches, 0, len(rows))
    show: Callable[[Rows], list[dict]] = lambda rows: []
    begin_step: Callable[[int], object] = lambda number: None


class PhaseCallback:
    """Hooks of a phase: restore an interrupted one, log and save after steps. All do nothing by default."""

    def restore(self) -> int:
        """Load the optimizer of an interrupted phase, if there is one; returns the steps already taken."""
        return 0

    def micro_batches(self) -> int:
        """The fewest micro-batches per step that fit into memory so far; called if the settings give a number."""
        return 1

    def cut(self) -> Cut | None:
        """The micro-batches that the run has chosen for this phase, if any; called if the settings give no number."""

    def interruptible(self) -> AbstractContextManager[None]:
        """Entered for the gradients of a step: what is raised inside ends the run after the step before it."""
        return nullcontext()

    def recomputes(self, longest: int, cut: Cut) -> None:
        """Called before the first step if the longest row, in tokens, exceeds `cut.room`."""

    def after_step(self, report: StepReport) -> bool | None:
        """Called after each step on every process; returns true to end the phase there."""

    def skipped_step(self, report: StepReport, gradient_norm: float, rows: Callable[[], list[dict]]) -> None:
        """Called before `after_step` if a step was skipped; `rows` returns its readable batch."""

    def out_of_memory(self, cut: Cut) -> None:
        """Called when a step did not fit into memory, before it is taken again with these smaller micro-batches."""


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a module that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def sum_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Sum the gradients over all processes. DDP hangs or is wrong if a weight takes no part in the loss."""
    if accelerator.num_processes == 1:
        return
    parameters = trainable(model)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    flat = accelerator.reduce(flat, reduction="sum")
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def first_cut(settings: TrainingSettings, callback: PhaseCallback, choose: Callable[[], Cut]) -> Cut:
    """The micro-batches at the start of a phase: from the settings, else from the run, else from `choose`."""
    if settings.gradient_accumulation_steps is not None:
        return Cut(micro_batches=max(settings.gradient_accumulation_steps, callback.micro_batches()))
    return callback.cut() or choose()


def chosen_together(accelerator: Accelerator, cut: Cut) -> Cut:
    """The smallest of the micro-batches by tokens that the processes have chosen, each by its own memory."""
    found = gather_object([(cut.tokens, cut.room)])
    tokens, rooms = ([each for each in column if each is not None] for column in zip(*found, strict=True))
    return replace(cut, tokens=min(tokens, default=None), room=min(rooms, default=None))


def encoder_cut(accelerator: Accelerator, encoder: Retriever | Reranker, *, free: float | None = None) -> Cut:
    """The micro-batches of a retriever or reranker phase, chosen from the free memory; the same on every process.

    Args:
        free: bytes available to this process for training; None: measured.
    """
    each = encoder_token_bytes(accelerator, encoder)
    if each is None:
        return Cut()
    free = room_for_training(accelerator.device) if free is None else free
    states = 3 * sum(weight.numel() * weight.element_size() for weight in trainable(encoder.model))
    return chosen_together(accelerator, retriever_budget(each, free, states=states, device=accelerator.device.type))


def encoder_token_bytes(accelerator: Accelerator, encoder: Retriever | Reranker) -> int | None:
    """Estimated bytes of activations per token of a step; None for a model without layers."""
    if encoder.config is None:
        return None
    products, length = has_products(accelerator, encoder.model), encoder.model.max_seq_length or 0
    return token_bytes(encoder.config, precision=accelerator.mixed_precision, length=length, products=products)


def run_phase(
    accelerator: Accelerator,
    phase: Phase,
    cut: Cut,
    *,
    settings: TrainingSettings,
    round_number: int,
    callback: PhaseCallback,
) -> None:
    """Take the steps of a phase: gradients, clipping, AdamW, schedule. A resumed phase takes the remaining ones.

    A step with a non-finite loss or gradient leaves the weights unchanged. A step that does not fit into memory is
    taken in smaller micro-batches, as are those after it.

    Args:
        cut: the micro-batches of the first step.
    """
    steps, desc = phase.steps, f"round {round_number}: {phase.name} phase"
    if not steps:
        return
    optimizer, scheduler = accelerator.prepare(*_optimizer(phase, settings, accelerator.device.type))
    done = callback.restore()

    def attempt(number: int, cut: Cut) -> dict[str, float]:
        set_seed(phase_seed(settings.seed, round_number=round_number, phase=phase.name, step=number))
        return phase.take_step(steps[number], cut)

    clock = time.perf_counter()
    for number in tqdm(range(done, len(steps)), total=len(steps), initial=done, desc=desc, unit="step"):
        rows = steps[number]
        phase.begin_step(number)
        load = partial(phase.load, rows)
        with callback.interruptible():
            values, cut = _within_memory(accelerator, partial(attempt, number), optimizer, cut, load, callback)
        norm = float(joined(accelerator.clip_grad_norm_(phase.parameters, settings.max_grad_norm)))
        used_rate = scheduler.get_last_lr()[0]
        skipped = not (math.isfinite(values["loss"]) and (accelerator.scaler or math.isfinite(norm)))
        if not skipped or accelerator.scaler:  # a loss scaler skips by itself, and must see every step
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rate = len(rows) / (time.perf_counter() - clock)
        report = StepReport(number + 1, len(steps), values.pop("loss"), used_rate, rate, values, skipped)
        if skipped:
            callback.skipped_step(report, norm, partial(phase.show, rows))
        if callback.after_step(report):
            break
        clock = time.perf_counter()  # the callback's time (saving, logging) is not training time


def _within_memory(
    accelerator: Accelerator,
    attempt: Callable[[Cut], dict[str, float]],
    optimizer: torch.optim.Optimizer,
    cut: Cut,
    load: Callable[[Cut], Load],
    callback: PhaseCallback,
) -> tuple[dict[str, float], Cut]:
    """The result of a step and the micro-batches it took: smaller ones whenever memory is exhausted.

    Several processes cannot try again, since the others already wait for the gradients of this one.

    Raises:
        RuntimeError: single rows do not fit either, or there are several processes; the message says what to do.
    """
    while True:
        try:
            return attempt(cut), cut
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if accelerator.num_processes > 1:
                raise RuntimeError(
                    f"Out of memory on process {accelerator.process_index}. Run again with "
                    f"--gradient_accumulation_steps {2 * load(cut).micro_batches} and --allow_changed_settings: "
                    "the run resumes from the last checkpoint with the same batches in smaller micro-batches."
                ) from error
            smaller = cut.smaller(load(cut))
            if smaller is None:
                raise RuntimeError(
                    "Out of memory even with one row at a time. Use a smaller model, or lower --context_tokens or "
                    "--passage_tokens."
                ) from error
        cut = smaller
        optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        callback.out_of_memory(cut)


def _optimizer(
    phase: Phase, settings: TrainingSettings, device: str
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW (weight decay on matrices only) and its schedule."""
    matrices = [parameter for parameter in phase.parameters if parameter.ndim >= 2]
    others = [parameter for parameter in phase.parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=phase.learning_rate, fused=device in ("cpu", "cuda"))
    keep_state_whole(optimizer)
    steps = len(phase.steps)
    warmup = round(settings.warmup_ratio * steps)
    return optimizer, get_scheduler(
        settings.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
