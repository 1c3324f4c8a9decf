"""The loop that both phases share: take the planned steps, keep within memory, step the optimizer, tell the watcher.

A step whose loss is no number changes nothing; one that does not fit into memory is taken in smaller micro-batches. Left out: what a
step computes and over which rows (generator_phase.py, retriever_phase.py), how it is cut (micro_batches.py), saving (checkpointing.py),
rounds (rounds.py).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed, tqdm
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import get_scheduler

from cozyrag.config import TrainingSettings
from cozyrag.models.batching import phase_seed
from cozyrag.models.fsdp import joined, keep_state_whole
from cozyrag.training.micro_batches import Cut, Load


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


class PhaseCallback:
    """Who is told about a phase: it restores an interrupted one, and logs and saves after steps."""

    def restore(self) -> int:
        """Load the optimizer of an interrupted phase, if there is one; returns the steps already taken."""
        return 0

    def micro_batches(self) -> int:
        """Micro-batches that steps are to be worked through in at least, since fewer did not fit into memory before.

        Asked where the settings give a number.
        """
        return 1

    def cut(self) -> Cut | None:
        """The tokens of micro-batches that the run has chosen for this phase; None: it has not. Asked where the settings give no number."""

    def recomputes(self, longest: int, cut: Cut) -> None:
        """Called before the first step of a phase whose longest row has so many tokens, more than there is room for."""

    def after_step(self, report: StepReport) -> bool | None:
        """Called after each optimizer step, on every process; true ends the phase there, as a probe does that knows enough."""

    def skipped_step(self, report: StepReport, gradient_norm: float, rows: Callable[[], list[dict]]) -> None:
        """Called before `after_step` when a step was skipped; `rows` gives its batch to look at."""

    def out_of_memory(self, cut: Cut) -> None:
        """Called when memory did not do and the step is tried again in smaller micro-batches."""


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of a module that may be trained."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def first_cut(settings: TrainingSettings, callback: PhaseCallback, choose: Callable[[], Cut]) -> Cut:
    """How a phase cuts its steps to begin with: as the settings, the run or, if neither says, `choose` will have it."""
    if settings.gradient_accumulation_steps is not None:
        return Cut(micro_batches=max(settings.gradient_accumulation_steps, callback.micro_batches()))
    return callback.cut() or choose()


def chosen_together(accelerator: Accelerator, cut: Cut) -> Cut:
    """The smallest of the cuts by tokens that the processes have chosen, each by its own memory."""
    found = gather_object([(cut.tokens, cut.room)])
    tokens, rooms = ([each for each in column if each is not None] for column in zip(*found, strict=True))
    return replace(cut, tokens=min(tokens, default=None), room=min(rooms, default=None))


def run_phase(
    accelerator: Accelerator,
    phase: str,
    parameters: list[torch.nn.Parameter],
    steps: list[np.ndarray],
    take_step: Callable[[int, Cut], dict[str, float]],
    *,
    cut: Cut = Cut(),  # noqa: B008
    load: Callable[[int, Cut], Load] | None = None,
    settings: TrainingSettings,
    learning_rate: float,
    round_number: int,
    callback: PhaseCallback,
    begin_step: Callable[[int], object] = lambda number: None,
    show: Callable[[int], list[dict]] = lambda number: [],
    quiet: bool = False,
) -> None:
    """Take the steps of a phase: gradients, clip, AdamW, schedule. A resumed phase takes the ones that are left.

    A step whose loss or gradient is no number changes no weight. One that does not fit into memory is taken in smaller
    micro-batches, and so are those after it.

    Args:
        take_step: (number, cut); leaves the gradients of the step of that number, worked through in micro-batches of that
            cut, and returns its loss and terms by name.
        cut: the one to begin with. load: what a cut makes of the step of a number; needed for cuts by tokens.
        begin_step: called before it, once for each step.
        show: the batch of a step as rows that a person can read.
    """
    if not steps:
        return
    optimizer, scheduler = accelerator.prepare(
        *_optimizer(parameters, len(steps), learning_rate, settings, accelerator.device.type)
    )
    done = callback.restore()
    load = load or (lambda number, cut: Load(cut.micro_batches, 0, len(steps[number])))
    bar = tqdm(total=len(steps), initial=done, desc=f"round {round_number}: {phase} phase", unit="step", disable=quiet)
    clock = time.perf_counter()
    for number in range(done, len(steps)):
        begin_step(number)

        def attempt(cut: Cut, number: int = number) -> dict[str, float]:
            set_seed(phase_seed(settings.seed, round_number=round_number, phase=phase, step=number))
            return take_step(number, cut)

        told, cut = _within_memory(accelerator, attempt, optimizer, cut, partial(load, number), callback)
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
            callback.skipped_step(report, norm, lambda number=number: show(number))
        enough = callback.after_step(report)
        clock = time.perf_counter()  # what the watcher took (saving, logging) is not training time
        bar.update()
        if enough:
            break
    bar.close()


def _within_memory(
    accelerator: Accelerator,
    attempt: Callable[[Cut], dict[str, float]],
    optimizer: torch.optim.Optimizer,
    cut: Cut,
    load: Callable[[Cut], Load],
    callback: PhaseCallback,
) -> tuple[dict[str, float], Cut]:
    """What an attempt at a step gives and the cut it took: a smaller one than before whenever memory does not do.

    Several processes cannot try again, since the others are already waiting for this one's gradients.

    Raises:
        RuntimeError: single rows do not fit either, or there are several processes; says what to do.
    """
    while True:
        try:
            return attempt(cut), cut
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            if accelerator.num_processes > 1:
                raise RuntimeError(
                    f"out of memory on process {accelerator.process_index}: run again with --gradient_accumulation_steps {2 * load(cut).micro_batches} and "
                    "--resume_anyway, which goes on from the last checkpoint with the same batches in smaller micro-batches"
                ) from error
            smaller = cut.smaller(load(cut))
            if smaller is None:
                raise RuntimeError(
                    "out of memory even with one row at a time: use a smaller model, or lower --context_tokens or --passage_tokens"
                ) from error
        cut = smaller
        optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        callback.out_of_memory(cut)


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
