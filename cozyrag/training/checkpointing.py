"""What a run keeps in OUTPUT/checkpoints, and how it goes on from there.

A checkpoint folder is complete: progress, both models as ordinary checkpoints, and inside a phase the optimizer's
state. A manifest tells whether it is still what was written. Left out: what the models are (generator.py, retriever.py),
when to save (callbacks.py, rounds.py), and the output folder as a whole (output_dir.py).
"""

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator

from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.runtime.atomic_files import PARTIAL, SPARE, check_room, damage, seal, settle, write_json, writing
from cozyrag.runtime.distributed import main_decides, run_on_all
from cozyrag.runtime.old_names import current_progress
from cozyrag.training.output_dir import check_changes, complete_checkpoints

PHASES = ("generator", "retriever", "evaluation")


@dataclass
class Progress:
    """What is to be done next: `phase` of `round`, of which `step` optimizer steps are taken. Round 0 only examines.

    Args:
        metrics: rows of metrics.jsonl so far.
        steps_so_far: optimizer steps of the whole run.
        pending: [loss, terms, seconds a row] of the steps since the last log line.
        spent: seconds already spent on the part that is under way, by its name.
        bad_steps: steps in a row whose loss was no number.
        pieces: in how many micro-batches a phase's steps are worked through, by phase, where memory did not do for fewer and the
            number is not chosen automatically.
        cuts: tokens of the micro-batches of a phase, and how many have room (`Cut`), by phase, as chosen when the run began: what is
            free when it goes on must not change its rounding.
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
        """Folder name; names sort in the order of the run."""
        return f"round-{self.round:03d}-{PHASES.index(self.phase)}-{self.phase}-{self.step:06d}"

    def following(self, round_number: int, phase: str) -> "Progress":
        """The beginning of the phase that comes after this one."""
        return Progress(
            round_number, phase, steps_so_far=self.steps_so_far, micro_batches=self.micro_batches, cuts=self.cuts
        )


class Checkpoints:
    """Checkpoints of one run under OUTPUT/checkpoints, newest last, at most `limit` of them.

    Args:
        facts: what else must be as it was when a run goes on: "data", a fingerprint of the tables, and "processes".
    """

    def __init__(self, accelerator: Accelerator, folder: Path, *, limit: int, facts: dict):
        self.accelerator = accelerator
        self.folder = folder
        self.limit = limit
        self.facts = facts
        # Models travel as ordinary checkpoints; Accelerate keeps optimizer, schedule, scaler and random states.
        accelerator.register_save_state_pre_hook(lambda models, weights, _folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, or None, and a sentence for each damaged one that was passed over.

        Raises:
            InputError: there are checkpoints, but all are damaged.
        """
        return main_decides(self.accelerator, self._newest)

    def _newest(self) -> tuple[Path | None, list[str]]:
        told = []
        for checkpoint in reversed(complete_checkpoints(self.folder)):
            fault = damage(checkpoint)
            if fault is None:
                return checkpoint, told
            told.append(f"Checkpoint {checkpoint.name} is damaged ({fault}); the one before it is used.")
            aside = checkpoint.with_name("damaged")  # out of the way of new ones, for a look at it
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        if told:
            raise InputError(
                f"{told[-1].split(';')[0]}, and there is no other in {self.folder.absolute()}. Start anew with --overwrite_output_dir."
            )
        return None, told

    def read(self, checkpoint: Path, *, allow_changes: bool) -> Progress:
        """Progress of a checkpoint. Raises InputError if the data or the number of processes are others than then."""
        saved = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        check_changes(saved.pop("facts"), self.facts, allow_changes)
        return Progress(**current_progress(saved))

    def save(self, progress: Progress, generator: Generator, retriever: Retriever) -> None:
        """Write a checkpoint on every process's behalf and drop the oldest beyond the limit.

        Raises:
            InputError: the disk is full or may not be written; the earlier checkpoints are as they were.
        """
        final = self.folder / "checkpoints" / progress.name
        partial = final.with_name(final.name + PARTIAL)
        needed = SPARE + checkpoint_bytes(generator, retriever, inside=progress.step > 0)
        generator.gather()

        def models() -> None:
            with writing(final, needed=needed):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                check_room(final, needed)
                generator.save(partial / "generator")
                retriever.save(partial / "retriever")
                write_json(partial / "progress.json", asdict(progress) | {"facts": self.facts})

        def state() -> None:
            with writing(final, needed=needed), contextlib.redirect_stdout(None):
                self.accelerator.save_state(str(partial / "state"))

        def close() -> None:
            with writing(final, needed=needed):
                seal(partial)
                settle(partial, final)
                for old in complete_checkpoints(self.folder)[: -self.limit]:
                    shutil.rmtree(old)

        try:
            main_decides(self.accelerator, models)
            if progress.step:
                run_on_all(self.accelerator, state)
            main_decides(self.accelerator, close)
        except InputError:
            shutil.rmtree(partial, ignore_errors=True)  # what does not fit must not fill the disk
            raise

    def restore_optimizer(self, checkpoint: Path) -> None:
        """Load optimizer, schedule and scaler of an interrupted phase into what is prepared now."""
        self.accelerator.load_state(str(checkpoint / "state"), map_location="cpu")


def checkpoint_bytes(generator: Generator, retriever: Retriever, *, inside: bool) -> int:
    """About how many bytes a checkpoint takes; inside a phase AdamW's two moments of the larger model are counted."""
    held = retriever.model.state_dict().values()
    sizes = [generator.saved_bytes(), sum(tensor.numel() * tensor.element_size() for tensor in held)]
    return sum(sizes) + (2 * max(sizes) if inside else 0)
