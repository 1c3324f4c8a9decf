"""The log of a run: metrics.jsonl, lines on the screen, the tables of results and of times.

Left out: the experiment trackers (tracking.py), the metrics themselves (evaluation.py).
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from accelerate import Accelerator

from cozyrag.evaluation.evaluation import retrieval_table, table
from cozyrag.runtime.atomic_files import write_jsonl
from cozyrag.runtime.terminal import say_above_bars


class RunLog:
    """The rows of metrics.jsonl, kept by every process and written by the main one.

    Args:
        rows: those of the checkpoint from which the run resumes; the list is extended. Later rows in the file are
            dropped, since their steps are taken again.
        steps: optimizer steps so far.
        spent: seconds that interrupted parts of a round have already taken, by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        rows: list[dict],
        *,
        steps: int = 0,
        spent: Mapping = MappingProxyType({}),
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.rows = rows
        self.steps = steps
        self.round = 0  # the current round
        self._spent = dict(spent)
        self._began: dict[str, float] = {}
        if rows:
            self._write()

    def record(self, row: dict) -> None:
        """Add a row to metrics.jsonl."""
        self.rows.append(row)
        self._write()

    def holds(self, **facts: object) -> bool:
        """Whether a row has these entries, which include "kind"."""
        return any(facts.items() <= row.items() for row in self.rows if row["kind"] == facts["kind"])

    def under_way(self) -> dict[str, float]:
        """Seconds of the parts in progress, by name."""
        return {part: time.perf_counter() - began for part, began in self._began.items()}

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            # Not flushed at every row: after a power cut the rows come from the checkpoint.
            write_jsonl(self.folder / "metrics.jsonl", self.rows, flushed=False)

    def info(self, text: str) -> None:
        """Print a line above the progress bars, on the main process only."""
        if self.accelerator.is_main_process:
            say_above_bars(text)

    @contextmanager
    def timed(self, part: str, round_number: int) -> Iterator[None]:
        """Record the seconds of a part of a round, including those before an interruption."""
        self._began[part] = time.perf_counter() - self._spent.pop(part, 0.0)
        yield
        seconds = round(time.perf_counter() - self._began.pop(part), 2)
        self.record({"kind": "time", "round": round_number, "part": part, "seconds": seconds})

    def evaluated(self) -> list[tuple[str, dict]]:
        """(name, summary) of every evaluation so far."""
        rows = [row for row in self.rows if row["kind"] == "evaluation"]
        return [("untuned baseline" if row["round"] == 0 else f"after round {row['round']}", row) for row in rows]

    def results(self) -> str:
        """The tables of evaluations, from the untuned baseline to the last round."""
        return "\n\n".join(filter(None, (table(self.evaluated()), retrieval_table(self.evaluated()))))

    def times(self) -> str:
        """A Markdown table of the seconds of each part of each round, and the peak memory of this process."""
        rows = [row for row in self.rows if row["kind"] == "time"]
        parts = list(dict.fromkeys(row["part"] for row in rows))
        lines = ["| seconds | " + " | ".join(parts) + " |", "|---|" + "---:|" * len(parts)]
        for number in sorted({row["round"] for row in rows}):
            spent = [sum(r["seconds"] for r in rows if r["round"] == number and r["part"] == part) for part in parts]
            name = "untuned baseline" if number == 0 else f"round {number}"
            lines.append(f"| {name} | " + " | ".join(f"{seconds:.1f}" for seconds in spent) + " |")
        return "\n".join(lines) + f"\n\nPeak memory of the main process: {peak_memory() / 1e9:.2f} GB."


def peak_memory() -> int:
    """The peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
