"""What goes on beside the steps of a phase: lines in the log, checkpoints in time, a stop when one is asked for.

Left out: the steps themselves (trainer.py and the phases), what a checkpoint holds (checkpointing.py), and the way of a run (rounds.py).
"""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cozyrag.config import OutputSettings
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.runtime.atomic_files import write_json
from cozyrag.runtime.signals import Interrupted, Interrupts
from cozyrag.training.checkpointing import Checkpoints, Progress
from cozyrag.training.micro_batches import Cut
from cozyrag.training.run_log import RunLog
from cozyrag.training.tracking import log_numbers
from cozyrag.training.trainer import PhaseCallback, StepReport


class RunCallback(PhaseCallback):
    """Logs and saves inside a phase, and brings back an interrupted one.

    Args:
        progress: of the run; its steps are counted on here.
        resumed_from: the checkpoint that the phase goes on from; None where it begins.
        unit: what a second brings, for the log.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output: OutputSettings,
        *,
        progress: Progress,
        checkpoints: Checkpoints,
        generator: Generator,
        retriever: Retriever,
        log: RunLog,
        interrupts: Interrupts,
        resumed_from: Path | None,
        unit: str,
    ):
        self.accelerator = accelerator
        self.output = output
        self.progress = progress
        self.checkpoints = checkpoints
        self.generator = generator
        self.retriever = retriever
        self.log = log
        self.interrupts = interrupts
        self.resumed_from = resumed_from
        self.unit = unit
        self.saved = time.monotonic()

    def restore(self) -> int:
        """Steps already taken in this phase; loads the optimizer if there are any."""
        if self.progress.step and self.resumed_from:
            self.checkpoints.restore_optimizer(self.resumed_from)
        return self.progress.step

    def micro_batches(self) -> int:
        """Micro-batches that memory asked for in an earlier phase of this kind, or before the interruption."""
        return self.progress.micro_batches.get(self.progress.phase, 1)

    def cut(self) -> Cut | None:
        """The tokens of micro-batches that this run has chosen for phases of this kind."""
        chosen = self.progress.cuts.get(self.progress.phase)
        return Cut(**chosen) if chosen else None

    def after_step(self, report: StepReport) -> None:
        """A log line every `logging_steps`; a checkpoint every `save_steps` or `save_minutes`, or when a signal asks for it.

        Raises:
            Interrupted: a signal has come to one of the processes, and the step is saved.
        """
        progress = self.progress
        progress.step = report.step
        self.log.steps += 1
        if not report.bad:
            progress.skipped_steps = 0
            progress.pending.append([report.loss, report.terms, 1 / report.rate])
        if report.step % self.output.logging_steps == 0 or report.step == report.steps:
            self._log(report)
        due, stop = self._agreed()
        due = due or (self.output.save_steps and report.step % self.output.save_steps == 0)
        if stop or (due and report.step < report.steps):  # the phase itself ends with a checkpoint
            self._save()
        if stop:
            raise Interrupted(self.interrupts.received or signal.SIGTERM)

    def _agreed(self) -> tuple[bool, bool]:
        """Whether minutes or a signal ask for a checkpoint: the first process's clock, and a signal to any of them."""
        minutes = self.output.save_minutes
        late = minutes and time.monotonic() - self.saved >= 60 * minutes and self.accelerator.is_main_process
        flags = [bool(late), self.interrupts.received is not None]
        if self.accelerator.num_processes > 1:
            told = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
            flags = (self.accelerator.reduce(told, reduction="sum") > 0).tolist()
        return flags[0], flags[1]

    def _save(self) -> None:
        self.progress.steps_so_far = self.log.steps
        self.progress.spent = self.log.under_way()
        self.progress.metrics = self.log.rows
        self.checkpoints.save(self.progress, self.generator, self.retriever)
        self.saved = time.monotonic()

    def skipped_step(self, report: StepReport, gradient_norm: float, rows: Callable[[], list[dict]]) -> None:
        """Count a step that was skipped. Raises InputError after `max_bad_steps` in a row, with the batch in a file."""
        progress = self.progress
        progress.skipped_steps += 1
        facts = {
            "round": progress.round,
            "phase": progress.phase,
            "step": report.step,
            "loss": str(report.loss),
            "gradient_norm": str(gradient_norm),
        }
        self.log.record({"kind": "skipped step", "in_a_row": progress.skipped_steps} | facts)
        self.log.info(
            f"round {progress.round} {progress.phase} step {report.step}/{report.steps}: loss {report.loss}, gradient norm {gradient_norm}; the step is "
            f"skipped ({progress.skipped_steps} in a row)."
        )
        if progress.skipped_steps < self.output.max_skipped_steps:
            return
        path = self.log.folder / "skipped-steps" / f"round-{progress.round:03d}-{progress.phase}-{report.step:06d}.json"
        if self.accelerator.is_main_process:
            write_json(path, facts | {"rows": rows()})
        raise InputError(
            f"Expected losses that are numbers, found {progress.skipped_steps} steps of the {progress.phase} in a row that have none: the training has "
            f"diverged, or the data holds what it should not. The last batch is in {path}. Lower --{progress.phase}_learning_rate and start anew, "
            "or correct the data."
        )

    def recomputes(self, longest: int, cut: Cut) -> None:
        """Say that steps with long rows compute activations again."""
        progress = self.progress
        self.log.info(
            f"round {progress.round} {progress.phase}: the longest row has {longest:,} tokens and there is room for {cut.room:,}; steps with longer "
            "rows compute their activations again on the way back (activation checkpointing), slower, with the same result."
        )

    def out_of_memory(self, cut: Cut) -> None:
        """Note that steps are worked through in smaller micro-batches from here."""
        progress = self.progress
        if cut.tokens is None:
            progress.micro_batches[progress.phase] = cut.micro_batches
            size, how = {"micro_batches": cut.micro_batches}, f"{cut.micro_batches} micro-batches"
        else:
            progress.cuts[progress.phase] = asdict(cut)
            size, how = {"tokens": cut.tokens}, f"micro-batches of up to {cut.tokens:,} tokens"
        where = {"round": progress.round, "phase": progress.phase, "step": progress.step}
        self.log.record({"kind": "out of memory"} | where | size)
        self.log.info(
            f"round {progress.round} {progress.phase} step {progress.step + 1}: out of memory; from here each step is worked through in {how}, "
            "with the same result."
        )

    def _log(self, report: StepReport) -> None:
        progress = self.progress
        where = {"round": progress.round, "phase": progress.phase, "step": report.step}
        pending, progress.pending = progress.pending, []
        if not pending:
            return  # all steps since the last line were bad, and said so
        losses, terms, rates = zip(*pending, strict=True)
        loss, rate = float(np.mean(losses)), float(1 / np.mean(rates))
        means = {name: float(np.mean([each[name] for each in terms])) for name in report.terms}
        self.log.record(
            {"kind": "step"}
            | where
            | {
                "loss": loss,
                "learning_rate": report.learning_rate,
                "rate": round(rate, 2),
                "steps_so_far": self.log.steps,
            }
            | means
        )
        numbers = {"loss": loss, "learning_rate": report.learning_rate, "rows_per_second": rate} | means
        log_numbers(self.accelerator, numbers, step=self.log.steps, prefix=progress.phase)
        told = "".join(f", {name} {value:.4f}" for name, value in means.items())
        self.log.info(
            f"round {progress.round} {progress.phase} step {report.step}/{report.steps}: loss {loss:.4f}{told}, learning rate {report.learning_rate:.2e}, {rate:.1f} {self.unit}"
        )
