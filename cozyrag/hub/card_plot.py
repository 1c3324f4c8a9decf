"""The plot on the cards of a run: losses by step and scores by round. Needs Matplotlib (`cozyrag[plots]`).

Left out: everything that is not in metrics.jsonl.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("generator", "retriever")
SCORES = {"f1": "F1", "em": "EM", "recall@5": "recall@5"}
COLOURS = ("#3366aa", "#cc6633", "#338855")


def draw_curves(rows: Sequence[Mapping], path: Path) -> bool:
    """Write a PNG of these rows of metrics.jsonl. Returns False without Matplotlib or before any training step."""
    steps = [row for row in rows if row["kind"] == "step"]
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    if importlib.util.find_spec("matplotlib") is None or not steps or not evaluated:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, phase, colour in zip(panels, PHASES, COLOURS, strict=False):
        _draw_losses(panel, [row for row in steps if row["phase"] == phase], phase, colour)
    _draw_scores(panels[2], evaluated)
    figure.savefig(path, metadata={"Software": None})  # the same rows give the same bytes
    return True


def _draw_losses(panel: "Axes", rows: Sequence[Mapping], phase: str, colour: str) -> None:
    """The losses of one phase over its own steps, with one line per round."""
    before = 0
    for number in sorted({row["round"] for row in rows}):
        mine = [row for row in rows if row["round"] == number]
        panel.plot([before + row["step"] for row in mine], [row["loss"] for row in mine], color=colour, marker=".")
        before += mine[-1]["step"]
        panel.axvline(before, color="#cccccc", linewidth=0.8)
    panel.set(title=f"loss of the {phase}", xlabel=f"{phase} steps (grey: end of a round)")


def _draw_scores(panel: "Axes", evaluated: Sequence[Mapping]) -> None:
    """The scores on the held-out questions, with the 95 % intervals that the rows carry."""
    rounds = [row["round"] for row in evaluated]
    for shift, ((name, label), colour) in enumerate(zip(SCORES.items(), COLOURS, strict=True)):
        places = [number + 0.04 * (shift - 1) for number in rounds]
        panel.plot(places, [row[name] for row in evaluated], color=colour, marker="o", label=label)
        ends = [row.get(f"{name}_interval") or (row[name], row[name]) for row in evaluated]
        panel.vlines(places, [low for low, _ in ends], [high for _, high in ends], color=colour, alpha=0.5)
    panel.set(title="held-out questions, percent", xlabel="round (0: untuned baseline)", xticks=rounds, ylim=(0, 100))
    panel.legend(loc="best", frameon=False)
