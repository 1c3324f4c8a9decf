"""What a run left in its output folder, read again: settings, metrics.jsonl, and the examined questions of each round.

Left out: writing them (checkpointing.py, run_log.py, rounds.py), the models (pipeline.py), and what the numbers mean.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cozyrag.errors import InputError
from cozyrag.runtime.old_names import (
    EVALUATIONS,
    current_evaluation,
    current_metrics,
    current_settings,
    evaluation_files,
)


@dataclass(frozen=True)
class FinishedRun:
    """`settings` flat; `metrics` the rows of metrics.jsonl; `examined` the rows of each round's examination, 0 being before training."""

    folder: Path
    settings: dict
    metrics: list[dict]
    evaluated: dict[int, list[dict]]

    @classmethod
    def read(cls, folder: str | Path) -> "FinishedRun":
        """Read a run's folder. Raises InputError when there is no examination in it, or a file is broken."""
        folder = Path(folder)
        found = evaluation_files(folder)
        if not found:
            raise InputError(
                f"Expected examined questions in {(folder / EVALUATIONS).absolute()}, found none: this is no folder that train.py "
                "examined a pair in. Name the output folder of a run."
            )
        settings = folder / "settings.json"
        return cls(
            folder,
            settings=current_settings(json.loads(settings.read_text(encoding="utf-8"))) if settings.exists() else {},
            metrics=[current_metrics(row) for row in read_lines(folder / "metrics.jsonl")]
            if (folder / "metrics.jsonl").exists()
            else [],
            evaluated={number: read_evaluation(path) for number, path in found.items()},
        )

    @property
    def last(self) -> int:
        """The number of the last round that was examined."""
        return max(self.evaluated)

    def rows(self, kind: str) -> list[dict]:
        """The rows of metrics.jsonl of that kind."""
        return [row for row in self.metrics if row["kind"] == kind]


def read_evaluation(path: Path) -> list[dict]:
    """The rows of an evaluation file, one for each question. Raises InputError for a broken line."""
    return [current_evaluation(row) for row in read_lines(path)]


def read_lines(path: Path) -> list[dict]:
    """The rows of a file that a run wrote, one JSON object a line. Raises InputError for a line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: expected a JSON object as train.py writes it, found {line[:40]!r} ({error}). Copy the file anew."
            ) from error
    return rows


def spread(rows: Sequence[dict], count: int) -> list[dict]:
    """At most that many of the rows, taken at even distances: the first, and others from everywhere."""
    return [rows[at * len(rows) // count] for at in range(count)] if len(rows) > count else list(rows)
