"""The output folder of a run: its settings, metrics.jsonl, and the evaluated questions of each round.

Left out: writing these files (checkpointing.py, run_log.py, rounds.py), the models (pipeline.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cozyrag.errors import InputError
from cozyrag.runtime import old_names
from cozyrag.runtime.contents import read_object
from cozyrag.runtime.json_lines import AGAIN, read_json_lines

Row = TypeVar("Row")
WITHOUT = "Copy the file again, or delete it: only the settings are then missing."


@dataclass(frozen=True)
class FinishedRun:
    """`settings`: flat. `metrics`: rows of metrics.jsonl. `evaluated`: rows by round, 0 the untuned baseline."""

    folder: Path
    settings: dict
    metrics: list[dict]
    evaluated: dict[int, list[dict]]

    @classmethod
    def read(cls, folder: str | Path) -> "FinishedRun":
        """Read a run's folder. Raises InputError if it has no evaluation, or a file is broken."""
        folder = Path(folder)
        found = old_names.evaluation_files(folder)
        if not found:
            raise InputError(
                f"Expected evaluated questions in {(folder / old_names.EVALUATIONS).absolute()}, found none: this is "
                "not the output folder of a run that evaluated a pair. Name one."
            )
        settings, metrics = folder / "settings.json", folder / "metrics.jsonl"
        return cls(
            folder,
            settings=old_names.current_settings(read_object(settings, WITHOUT)) if settings.exists() else {},
            metrics=[old_names.current_metrics(row) for row in read_json_lines(metrics)] if metrics.exists() else [],
            evaluated={number: read_evaluation(path) for number, path in found.items()},
        )

    @property
    def last(self) -> int:
        """The last evaluated round."""
        return max(self.evaluated)

    def rows(self, kind: str) -> list[dict]:
        """The rows of metrics.jsonl of that kind."""
        return [row for row in self.metrics if row["kind"] == kind]


def read_evaluation(path: Path, remedy: str = AGAIN) -> list[dict]:
    """The rows of an evaluation file, one per question. Raises InputError for a broken line, and for an empty file."""
    rows = [old_names.current_evaluation(row) for row in read_json_lines(path, remedy)]
    if not rows:
        raise InputError(f"{path}: expected evaluated questions, found an empty file. {remedy}")
    return rows


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` of the rows, at even distances, the first one included."""
    return [rows[at * len(rows) // count] for at in range(count)] if len(rows) > count else list(rows)
