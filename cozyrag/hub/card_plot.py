"""The plot on the card of each model of a run: its loss by step and its own scores by round.

Needs Matplotlib (`cozyrag[plots]`). Left out: everything that is not in metrics.jsonl.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = {  # of each model by itself
    "generator": {"f1": "F1", "em": "EM"},
    "retriever": {"dense_recall@5": "recall@5, vectors alone", "dense_recall@1": "recall@1, vectors alone"},
    "reranker": {"reranked_recall@5": "recall@5, search with it", "reranked_recall@1": "recall@1, search with it"},
}
COLOURS = ("#3366aa", "#cc6633")


def draw_curves(rows: Sequence[Mapping], path: Path, role: str) -> bool:
    """Write a PNG of these rows of metrics.jsonl for the "generator", "retriever" or "reranker".

    Returns False without Matplotlib, and for a model that was not trained or not measured by itself.
    """
    steps = [row for row in rows if row["kind"] == "step" and row["phase"] == role]
    evaluated = [row for row in rows if row["kind"] == "evaluation" and all(name in row for name in SCORES[role])]
    if importlib.util.find_spec("matplotlib") is None or not steps or not evaluated:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    _draw_losses(losses, steps, role)
    _draw_scores(scores, evaluated, SCORES[role])
    figure.savefig(path, metadata={"Software": None})  # the same rows give the same bytes
    return True


def _draw_losses(panel: "Axes", rows: Sequence[Mapping], role: str) -> None:
    """The losses over the model's own steps, with one line per round."""
    before = 0
    for number in sorted({row["round"] for row in rows}):
        mine = [row for row in rows if row["round"] == number]
        panel.plot([before + row["step"] for row in mine], [row["loss"] for row in mine], color=COLOURS[0], marker=".")
        before += mine[-1]["step"]
        panel.axvline(before, color="#cccccc", linewidth=0.8)
    panel.set(title=f"loss of the {role}", xlabel=f"{role} steps (grey: end of a round)")


def _draw_scores(panel: "Axes", evaluated: Sequence[Mapping], scores: Mapping[str, str]) -> None:
    """The scores on the held-out questions, with the 95 % intervals that the rows carry."""
    rounds = [row["round"] for row in evaluated]
    for shift, ((name, label), colour) in enumerate(zip(scores.items(), COLOURS, strict=True)):
        places = [number + 0.04 * (shift - 0.5) for number in rounds]
        panel.plot(places, [row[name] for row in evaluated], color=colour, marker="o", label=label)
        ends = [row.get(f"{name}_interval") or (row[name], row[name]) for row in evaluated]
        panel.vlines(places, [low for low, _ in ends], [high for _, high in ends], color=colour, alpha=0.5)
    panel.set(title="held-out questions, percent", xlabel="round (0: untuned baseline)", xticks=rounds)
    panel.margins(0.15, 0.35)  # room for the legend
    panel.legend(loc="best", frameon=False)
