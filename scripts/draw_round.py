"""Draw the figure of the round in docs/: `python scripts/draw_round.py docs/round.svg` (or .png, for a look at it).

The figure shows the steps of a round in their order, and which model each step trains. Needs Matplotlib
(`pip install "cozyrag[plots]"`). Left out: numbers of a run.
"""

import sys

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, QUIET, GENERATOR, RETRIEVER, DATA = "#24292f", "#57606a", "#fde5c8", "#d3e6fb", "#eef1f4"
WIDTH, HEIGHT = 2.5, 1.5
BOXES = {  # name: (x, y, colour, title, lines)
    "questions": (0.2, 5.2, DATA, "questions", "with answers"),
    "passages": (0.2, 2.9, DATA, "passages", "title and text"),
    "index": (3.6, 2.9, RETRIEVER, "1  index", "retriever encodes\nall passages"),
    "contexts": (3.6, 5.2, DATA, "2  retrieve", "dense + sparse (BM25);\nbest sentences"),
    "generator": (7.0, 5.2, GENERATOR, "3  train generator", "answer tokens only;\nretriever is frozen"),
    "retriever": (10.4, 5.2, RETRIEVER, "4  train retriever", "contrastive loss;\ngenerator is frozen"),
    "index again": (10.4, 2.9, RETRIEVER, "5  index again", "with the new retriever"),
    "evaluation": (7.0, 2.9, DATA, "6  evaluate, save", "held-out questions;\nthe pair, atomically"),
}
ORDER = ("index", "contexts", "generator", "retriever", "index again", "evaluation")
ARROWS = (("questions", "contexts"), ("passages", "index"), *zip(ORDER, ORDER[1:], strict=False))
LEGEND = "orange: trains the generator    blue: runs or trains the retriever    grey: trains neither"


def main(path: str) -> None:
    """Write the figure as .svg or .png."""
    rcParams["svg.hashsalt"] = "round"  # the same file every time
    figure = Figure(figsize=(13.2, 5.9))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 13.2), ylim=(1.2, 7.1))
    axes.axis("off")
    for x, y, colour, title, lines in BOXES.values():
        box = FancyBboxPatch((x, y), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.12", fc=colour, ec=QUIET, lw=1.2)
        axes.add_patch(box)
        axes.text(x + WIDTH / 2, y + 1.12, title, ha="center", va="center", size=13, color=INK, weight="bold")
        axes.text(x + WIDTH / 2, y + 0.5, lines, ha="center", va="center", size=11, color=QUIET)
    for start, end in ARROWS:
        arrow(axes, *ends(start, end))
    axes.plot((8.25, 8.25, 4.85), (2.9, 2.1, 2.1), color=INK, lw=1.6)
    arrow(axes, (4.85, 2.1), (4.85, 2.9))
    axes.text(6.55, 2.24, "next round, with this index", ha="center", size=11, color=INK)
    axes.text(8.25, 6.87, "rollback if F1 got worse", ha="center", va="center", size=10.5, color=INK)
    axes.text(11.65, 6.87, "rollback if recall@5 got worse", ha="center", va="center", size=10.5, color=INK)
    axes.text(0.2, 1.5, LEGEND, size=10.5, color=QUIET)
    metadata = {"Date": None, "Creator": None} if path.endswith(".svg") else None
    figure.savefig(path, dpi=110, facecolor="white", metadata=metadata)


def ends(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end of an arrow between two boxes: the middles of the sides that face each other."""
    (x1, y1, *_), (x2, y2, *_) = BOXES[start], BOXES[end]
    if y1 == y2:
        right = x2 > x1
        return (x1 + WIDTH * right, y1 + HEIGHT / 2), (x2 + WIDTH * (not right), y2 + HEIGHT / 2)
    up = y2 > y1
    return (x1 + WIDTH / 2, y1 + HEIGHT * up), (x2 + WIDTH / 2, y2 + HEIGHT * (not up))


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.6, "shrinkA": 0, "shrinkB": 0})


if __name__ == "__main__":
    main(sys.argv[1])
