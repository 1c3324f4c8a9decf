"""Draw the figure of the round in docs/: `python scripts/draw_round.py docs/round.svg` (or .png, for a look at it).

The figure says what happens in a round, in which order, and which of the two models learns when. It is drawn in code so that it can
be changed with what it shows. Needs Matplotlib (`pip install "cozyrag[plots]"`). Left out: any number of a run.
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
    "contexts": (3.6, 5.2, DATA, "2  retrieve", "vectors + words;\nbest sentences"),
    "generator": (7.0, 5.2, GENERATOR, "3  generator learns", "answer tokens only;\nretriever is frozen"),
    "retriever": (10.4, 5.2, RETRIEVER, "4  retriever learns", "positive against others;\ngenerator is frozen"),
    "again": (10.4, 2.9, RETRIEVER, "5  index again", "with the new vectors"),
    "evaluation": (7.0, 2.9, DATA, "6  examine, save", "held-out questions;\nold or new pair, whole"),
}
ARROWS = (
    ("questions", "contexts"), ("passages", "index"), ("index", "contexts"), ("contexts", "generator"), ("generator", "retriever"),
    ("retriever", "again"), ("again", "evaluation"),
)  # fmt: skip


def main(path: str) -> None:
    rcParams["svg.hashsalt"] = "round"  # the same file every time
    figure = Figure(figsize=(13.2, 5.9))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 13.2), ylim=(1.2, 7.1))
    axes.axis("off")
    for x, y, colour, title, lines in BOXES.values():
        axes.add_patch(
            FancyBboxPatch((x, y), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.12", fc=colour, ec=QUIET, lw=1.2)
        )
        axes.text(x + WIDTH / 2, y + 1.12, title, ha="center", va="center", size=13, color=INK, weight="bold")
        axes.text(x + WIDTH / 2, y + 0.5, lines, ha="center", va="center", size=11, color=QUIET)
    for start, end in ARROWS:
        arrow(axes, *ends(start, end))
    axes.plot((8.25, 8.25, 4.85), (2.9, 2.1, 2.1), color=INK, lw=1.6)
    arrow(axes, (4.85, 2.1), (4.85, 2.9))
    axes.text(6.55, 2.24, "next round, with this index", ha="center", size=11, color=INK)
    axes.text(8.25, 6.87, "gate: taken back if F1 got worse", ha="center", va="center", size=10.5, color=INK)
    axes.text(11.65, 6.87, "gate: taken back if recall@5 got worse", ha="center", va="center", size=10.5, color=INK)
    axes.text(
        0.2,
        1.5,
        "orange: the generator learns   blue: the retriever works or learns   grey: neither learns",
        size=10.5,
        color=QUIET,
    )
    metadata = {"Date": None, "Creator": None} if path.endswith(".svg") else None
    figure.savefig(path, dpi=110, facecolor="white", metadata=metadata)


def ends(start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where an arrow between two boxes leaves and arrives: in the middle of the sides that face each other."""
    (x1, y1, *_), (x2, y2, *_) = BOXES[start], BOXES[end]
    if y1 == y2:
        right = x2 > x1
        return (x1 + WIDTH * right, y1 + HEIGHT / 2), (x2 + WIDTH * (not right), y2 + HEIGHT / 2)
    up = y2 > y1
    return (x1 + WIDTH / 2, y1 + HEIGHT * up), (x2 + WIDTH / 2, y2 + HEIGHT * (not up))


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.6, "shrinkA": 0, "shrinkB": 0})


if __name__ == "__main__":
    main(sys.argv[1])
