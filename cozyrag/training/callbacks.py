"""The callback of a run: log lines, checkpoints, and the end of a phase after a signal.

Left out: the steps (trainer.py), the content of a checkpoint (checkpointing.py), the order of phases (rounds.py).
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cozyrag.config import OutputSettings
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.signals import Interrupted, Interrupts
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.micro_batches import Cut
from cozyrag.training.run_log import RunLog
from cozyrag.training.tracking import log_numbers
from cozyrag.training.trainer import PhaseCallback, StepReport


@dataclass(eq=False)
class RunCallback(PhaseCallback):
    """Logs and saves within a phase, and restores an interrupted one.

    Args:
        progress: of the run; updated after each step.
        resumed_from: the checkpoint from which the phase resumes; None if it starts.
        unit: of the rate in the log, such as "pairs/s".
    """

    accelerator: Accelerator
    output: OutputSettings
    progress: Progress
    checkpoints: Checkpoints
    generator: Generator
    retriever: Retriever | None
    reranker: Reranker | None
    log: RunLog
    interrupts: Interrupts
    resumed_from: Path | None
    unit: str
    saved: float = field(init=False, default_factory=lambda: time.monotonic())
    saved_step: int = field(init=False, default=0)

    def restore(self) -> int:
        """The steps already taken in this phase; loads the optimizer if there are any."""
        if self.progress.step and self.resumed_from:
            self.checkpoints.restore_optimizer(self.resumed_from)
        self.saved_step = self.progress.step
        return self.progress.step

    def micro_batches(self) -> int:
        """The micro-batches that an earlier phase of this kind needed, or this one before the interruption."""
        return self.progress.micro_batches.get(self.progress.phase, 1)

    def cut(self) -> Cut | None:
        """The cut that this run has chosen for phases of this kind."""
        chosen = self.progress.cuts.get(self.progress.phase)
        return Cut(**chosen) if chosen else None

    def after_step(self, report: StepReport) -> None:
        """Log every `logging_steps`; save every `save_steps` or `save_minutes`, or after a signal.

        Raises:
            Interrupted: one of the processes has received a signal; the step is saved.
        """
        progress = self.progress
        progress.step = report.step
        self.log.steps += 1
        if not report.skipped:
            progress.skipped_steps = 0
            progress.pending.append([report.loss, report.terms, 1 / report.rate])
        if progress.pending and (report.step % self.output.logging_steps == 0 or report.step == report.steps):
            self._log(report)
        late, stop = self._agreed()
        due = late or (self.output.save_steps and report.step % self.output.save_steps == 0)
        if stop or (due and report.step < report.steps):  # the phase itself ends with a checkpoint
            self._save()
        if stop:
            raise Interrupted(self.interrupts.received or signal.SIGTERM)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A step that takes too long after a signal is given up, and the steps before it are saved.

        With several processes it is not: the others wait for the gradients of this one.
        """
        if self.accelerator.num_processes > 1:
            yield
            return
        try:
            with self.interrupts.may_give_up():
                yield
        except Interrupted:
            if self.progress.step > self.saved_step:
                self._save()
            raise

    def _agreed(self) -> tuple[bool, bool]:
        """Whether `save_minutes` are over on the main process, and whether any process has received a signal."""
        minutes = self.output.save_minutes
        late = minutes and time.monotonic() - self.saved >= 60 * minutes and self.accelerator.is_main_process
        flags = [bool(late), self.interrupts.received is not None]
        if self.accelerator.num_processes > 1:
            own = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
            flags = (self.accelerator.reduce(own, reduction="sum") > 0).tolist()
        return flags[0], flags[1]

    def _save(self) -> None:
        self.progress.steps_so_far = self.log.steps
        self.progress.spent = self.log.under_way()
        self.progress.metrics = self.log.rows
        self.checkpoints.save(self.progress, self.generator, self.retriever, self.reranker)
        self.saved, self.saved_step = time.monotonic(), self.progress.step

    def skipped_step(self, report: StepReport, gradient_norm: float, rows: Callable[[], list[dict]]) -> None:
        """Count a skipped step. Raises InputError after `max_skipped_steps` in a row, with the batch in a file."""
        progress = self.progress
        progress.skipped_steps += 1
        numbers = {"loss": str(report.loss), "gradient_norm": str(gradient_norm)}
        facts = self._place(report.step) | numbers
        self.log.record({"kind": "skipped step", "in_a_row": progress.skipped_steps} | facts)
        self._info(
            f" step {report.step}/{report.steps} is skipped ({progress.skipped_steps} in a row): loss {report.loss}, "
            f"gradient norm {gradient_norm}."
        )
        if progress.skipped_steps < self.output.max_skipped_steps:
            return
        path = self.log.folder / "skipped-steps" / f"round-{progress.round:03d}-{progress.phase}-{report.step:06d}.json"
        if self.accelerator.is_main_process:
            write_json(path, facts | {"rows": rows()})
        raise InputError(
            "Expected finite losses and gradients, found none in "
            f"{progress.skipped_steps} steps of the {progress.phase} in a row: training has diverged, or the data is "
            f"faulty. The last batch is in {path}. Lower --{progress.phase}_learning_rate and start again, or correct "
            "the data."
        )

    def recomputes(self, longest: int, cut: Cut) -> None:
        """Log that steps with long rows recompute activations."""
        self._info(
            f": the longest row has {longest:,} tokens, {cut.room:,} fit into memory; steps with longer rows recompute "
            "their activations in the backward pass (activation checkpointing), slower, with the same result."
        )

    def out_of_memory(self, cut: Cut) -> None:
        """Record the smaller micro-batches of the remaining steps."""
        progress = self.progress
        if cut.tokens is None:
            progress.micro_batches[progress.phase] = cut.micro_batches
            size, how = {"micro_batches": cut.micro_batches}, f"{cut.micro_batches} micro-batches"
        else:
            progress.cuts[progress.phase] = asdict(cut)
            size, how = {"tokens": cut.tokens}, f"micro-batches of up to {cut.tokens:,} tokens"
        self.log.record({"kind": "out of memory"} | self._place(progress.step) | size)
        self._info(
            f" step {progress.step + 1}: out of memory; from here on each step takes {how}, with the same result."
        )

    def _place(self, step: int) -> dict:
        return {"round": self.progress.round, "phase": self.progress.phase, "step": step}

    def _info(self, text: str) -> None:
        self.log.info(f"round {self.progress.round} {self.progress.phase}{text}")

    def _log(self, report: StepReport) -> None:
        """Log the means over the steps since the last line."""
        pending, self.progress.pending = self.progress.pending, []
        losses, terms, seconds = zip(*pending, strict=True)
        numbers = {"loss": float(np.mean(losses)), "learning_rate": report.learning_rate}
        rate = float(1 / np.mean(seconds))
        means = {name: float(np.mean([each[name] for each in terms])) for name in report.terms}
        counts = {"rate": round(rate, 2), "steps_so_far": self.log.steps}
        self.log.record({"kind": "step"} | self._place(report.step) | numbers | counts | means)
        tracked = numbers | {"rows_per_second": rate} | means
        log_numbers(self.accelerator, tracked, step=self.log.steps, prefix=self.progress.phase)
        parts = "".join(f", {name} {value:.4f}" for name, value in means.items())
        self._info(
            f" step {report.step}/{report.steps}: loss {numbers['loss']:.4f}{parts}, learning rate "
            f"{report.learning_rate:.2e}, {rate:.1f} {self.unit}"
        )
