"""The checkpoints of a run in OUTPUT/checkpoints, and reading them to resume.

A checkpoint folder is complete: progress, the models, within a phase the optimizer's state, and a manifest that
reveals damage. Left out: when to save (callbacks.py, rounds.py), the output folder as a whole (output_dir.py).
"""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator

from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.reranker import Reranker
from cozyrag.models.retriever import Retriever
from cozyrag.pair_file import starts_text
from cozyrag.runtime.atomic_files import PARTIAL, SPARE, check_room, damage, seal, settle, write_json, writing
from cozyrag.runtime.distributed import main_decides, run_on_all
from cozyrag.runtime.old_names import current_progress
from cozyrag.training.output_dir import check_changes, complete_checkpoints

# Places in the names of checkpoints, which sort in the order of the run: "reranker" comes after "generator" by itself.
PLACES = {"generator": 0, "reranker": 0, "retriever": 1, "evaluation": 2}


@dataclass
class Progress:
    """The position in a run: `phase` of `round` is next or in progress, with `step` of its optimizer steps taken.

    Args:
        round: 0 only evaluates the untuned baseline.
        metrics: rows of metrics.jsonl so far.
        steps_so_far: optimizer steps of the whole run.
        pending: [loss, terms, seconds per row] of the steps since the last log line.
        spent: seconds spent on the parts in progress, by name.
        skipped_steps: consecutive steps with a non-finite loss or gradient.
        micro_batches: micro-batches per step, by phase, where fewer did not fit and the settings give a number.
        cuts: the fields of the `Cut` chosen when the run began, by phase: the free memory at resumption must not change
            the rounding.
    """

    round: int = 0
    phase: str = "evaluation"
    step: int = 0
    metrics: list[dict] = field(default_factory=list)
    steps_so_far: int = 0
    pending: list[list] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    micro_batches: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, dict] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder name; names sort in the order of the run."""
        return f"round-{self.round:03d}-{PLACES[self.phase]}-{self.phase}-{self.step:06d}"

    def following(self, round_number: int, phase: str) -> "Progress":
        """The start of a later phase."""
        return Progress(
            round_number, phase, steps_so_far=self.steps_so_far, micro_batches=self.micro_batches, cuts=self.cuts
        )


class Checkpoints:
    """Checkpoints of one run under OUTPUT/checkpoints, newest last, at most `limit` of them.

    Args:
        facts: what must be unchanged on resumption, besides the settings: "data", a fingerprint of the tables, and
            "processes".
    """

    def __init__(self, accelerator: Accelerator, folder: Path, *, limit: int, facts: dict):
        self.accelerator = accelerator
        self.folder = folder
        self.limit = limit
        self.facts = facts
        # Models are saved as ordinary checkpoints; Accelerate saves optimizer, schedule, scaler and random states.
        accelerator.register_save_state_pre_hook(lambda models, weights, _folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, or None without checkpoints, and a warning for each damaged one.

        Raises:
            InputError: all checkpoints are damaged.
        """
        return main_decides(self.accelerator, self._newest)

    def _newest(self) -> tuple[Path | None, list[str]]:
        warnings: list[str] = []
        for checkpoint in reversed(complete_checkpoints(self.folder)):
            fault = damage(checkpoint)
            if fault is None:
                return checkpoint, warnings
            warnings.append(f"Checkpoint {checkpoint.name} is damaged ({fault}); the one before it is used.")
            aside = checkpoint.with_name("damaged")  # kept for inspection, out of the way of new ones
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        if warnings:
            fault = warnings[-1].partition(";")[0]
            raise InputError(
                f"{fault}, and there is no other in {self.folder.absolute()}. Start again with --overwrite_output_dir."
            )
        return None, warnings

    def read(self, checkpoint: Path, *, allow_changes: bool) -> Progress:
        """The progress in a checkpoint. Raises InputError if the data or the number of processes has changed."""
        saved = _read(checkpoint)
        saved.pop("prompt", None)  # of the generator; see `load_generator`
        check_changes(saved.pop("facts"), self.facts, allow_changes)
        return Progress(**current_progress(saved))

    def save(
        self,
        progress: Progress,
        generator: Generator,
        retriever: Retriever | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        """Write a checkpoint of these models and delete the oldest beyond the limit. All processes must call it.

        Raises:
            InputError: the disk is full or not writable; the earlier checkpoints are unchanged.
        """
        final = self.folder / "checkpoints" / progress.name
        partial = final.with_name(final.name + PARTIAL)
        needed = SPARE + checkpoint_bytes(generator, retriever, reranker, inside=progress.step > 0)
        generator.gather()

        def save_models() -> None:
            with writing(final, needed=needed):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                check_room(final, needed)
                generator.save(partial / "generator")
                for name, model in (("retriever", retriever), ("reranker", reranker)):
                    if model is not None:
                        model.save(partial / name)
                write_json(partial / "progress.json", asdict(progress) | self._facts_of(generator))

        def save_state() -> None:
            with writing(final, needed=needed), contextlib.redirect_stdout(None):
                self.accelerator.save_state(str(partial / "state"))

        def close() -> None:
            with writing(final, needed=needed):
                seal(partial)
                settle(partial, final)
                for old in complete_checkpoints(self.folder)[: -self.limit]:
                    shutil.rmtree(old)

        try:
            main_decides(self.accelerator, save_models)
            if progress.step:
                run_on_all(self.accelerator, save_state)
            main_decides(self.accelerator, close)
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)  # frees the disk for other files
            raise

    def _facts_of(self, generator: Generator) -> dict:
        return {"facts": self.facts, "prompt": generator.prompt_facts}

    def restore_optimizer(self, checkpoint: Path) -> None:
        """Load optimizer, schedule and scaler of an interrupted phase into the prepared ones."""
        self.accelerator.load_state(str(checkpoint / "state"), map_location="cpu")


def load_generator(checkpoint: Path, *, dropout: float) -> Generator:
    """The generator of a checkpoint, with the prompts that it was trained with so far."""
    return Generator.load(str(checkpoint / "generator"), dropout=dropout, start_of_text=starts_text(_read(checkpoint)))


def _read(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))


def checkpoint_bytes(
    generator: Generator, retriever: Retriever | None, reranker: Reranker | None = None, *, inside: bool
) -> int:
    """Estimated bytes of a checkpoint; inside a phase, with AdamW's two moments of the largest model."""
    sizes = [generator.saved_bytes()]
    for other in (retriever, reranker):
        weights = other.model.state_dict().values() if other is not None else ()
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in weights))
    return sum(sizes) + (2 * max(sizes) if inside else 0)
