"""What a run tells while it goes on: metrics.jsonl, lines on the screen, the tables of results and of times.

Left out: the trackers (tracking.py) and what the numbers mean (evaluation.py).
"""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from accelerate import Accelerator
from tqdm.auto import tqdm

from cozyrag.evaluation.evaluation import table
from cozyrag.runtime.atomic_files import write_jsonl


class RunLog:
    """The rows of metrics.jsonl, kept by every process and written by the main one.

    Args:
        rows: those of an interrupted run, to go on from; the list is kept and added to. Rows that were written after its
            last checkpoint are not among them and go: their steps are taken again.
        steps: optimizer steps so far.
        spent: seconds that an interrupted part of a round has already taken, by name.
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
        self.round = 0  # the round under way
        self._spent = dict(spent)
        self._began: dict[str, float] = {}
        if rows:
            self._write()

    def record(self, row: dict) -> None:
        """Add a row to metrics.jsonl."""
        self.rows.append(row)
        self._write()

    def holds(self, **facts: object) -> bool:
        """Whether there is a row with these entries."""
        return any(facts.items() <= row.items() for row in self.rows if row["kind"] == facts["kind"])

    def under_way(self) -> dict[str, float]:
        """Seconds so far of the parts that have begun and not ended, by name."""
        return {part: time.perf_counter() - began for part, began in self._began.items()}

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            write_jsonl(self.folder / "metrics.jsonl", self.rows)

    def info(self, text: str) -> None:
        """A line on the screen, above the progress bars, from the main process only."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)

    @contextmanager
    def timed(self, part: str, round_number: int) -> Iterator[None]:
        """Record the seconds that a part of a round takes, with those before an interruption."""
        self._began[part] = time.perf_counter() - self._spent.pop(part, 0.0)
        yield
        seconds = round(time.perf_counter() - self._began.pop(part), 2)
        self.record({"kind": "time", "round": round_number, "part": part, "seconds": seconds})

    def evaluated(self) -> list[tuple[str, dict]]:
        """(name, summary) of every examination so far."""
        rows = [row for row in self.rows if row["kind"] == "evaluation"]
        return [("untuned baseline" if row["round"] == 0 else f"after round {row['round']}", row) for row in rows]

    def results(self) -> str:
        """The before -> after table."""
        return table(self.evaluated())

    def times(self) -> str:
        """Seconds of each part of each round as a Markdown table, and the peak memory of this process."""
        rows = [row for row in self.rows if row["kind"] == "time"]
        parts = list(dict.fromkeys(row["part"] for row in rows))
        lines = ["| seconds | " + " | ".join(parts) + " |", "|---|" + "---:|" * len(parts)]
        for number in sorted({row["round"] for row in rows}):
            spent = [sum(r["seconds"] for r in rows if r["round"] == number and r["part"] == part) for part in parts]
            name = "untuned baseline" if number == 0 else f"round {number}"
            lines.append(f"| {name} | " + " | ".join(f"{seconds:.1f}" for seconds in spent) + " |")
        return "\n".join(lines) + f"\n\nPeak memory of the main process: {peak_memory() / 1e9:.2f} GB."


def peak_memory() -> int:
    """Most bytes this process has held in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
