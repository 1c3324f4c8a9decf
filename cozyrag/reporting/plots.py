"""Plots of a run: scores by round, verdicts, losses, time, calibration, latency, and the differences of two runs.

Matplotlib draws them (`pip install "cozyrag[plots]"`), without pyplot, so nothing global is touched. As SVG they take their colours from
the page they stand in (CSS variables), so light and dark come from one drawing; as PNG they are on white. Left out: captions and pages
(html_report.py, compare.py).
"""

import importlib.util
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from scipy.stats import binomtest

from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {"em": "exact match", "f1": "F1", "recall@5": "recall@5"}
# Colours on white, and the CSS variables that stand for them in a page. Blue, orange, green and so on of Okabe and Ito, darkened a little.
INK, GRID, ON_BAR = "#1f2328", "#d0d4da", "#fefefe"
SERIES = ("#0072b2", "#c2410c", "#00795a", "#7c5a9e", "#a16207", "#5b6470", "#be185d", "#0e7490")
VARIABLES = {INK: "currentColor", GRID: "var(--grid)", ON_BAR: "var(--on-bar)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}
VERDICTS = {  # in the order of the bars; a verdict that is not here comes after them
    "correct": SERIES[2],
    "format mismatch": SERIES[7],
    "abstained": SERIES[5],
    "reader error": SERIES[0],
    "context miss": SERIES[4],
    "retrieval miss": SERIES[1],
    "answered an unanswerable question": SERIES[3],
}
STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "cozyrag",
}
WIDTH = 5.2  # inches: small enough that the letters can be read on a phone
BINS = 8


def plots_are_possible() -> bool:
    """Whether Matplotlib is there; finding out costs nothing."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plots() -> None:
    """Raise InputError if Matplotlib is not there."""
    if not plots_are_possible():
        raise InputError('Expected Matplotlib for the plots, found none. Install it with: pip install "cozyrag[plots]"')


def scores_by_round(evaluated: Mapping[int, Sequence[dict]]) -> "Figure":
    """EM, F1 and recall@5 after each round, in percent, with 95 % bootstrap intervals over the questions."""
    figure, [axes] = _figure()
    rounds = sorted(evaluated)
    for number, (metric, name) in enumerate(METRICS.items()):
        values = [np.array([row[metric] for row in evaluated[each]], dtype=np.float64) for each in rounds]
        means = 100 * np.array([column.mean() for column in values])
        ends = 100 * np.array([bootstrap_interval(column) for column in values]).T
        places = np.arange(len(rounds)) + 0.06 * (number - 1)
        axes.errorbar(
            places,
            means,
            np.abs(ends - means),
            color=SERIES[number],
            marker="os^"[number],
            capsize=3,
            linewidth=1.6,
            label=name,
        )
    axes.set_xticks(range(len(rounds)), [round_name(each) for each in rounds])
    axes.set_ylim(-2, 102)
    axes.set_ylabel("percent of questions")
    _legend(axes, len(METRICS))
    return figure


def verdict_bars(evaluated: Mapping[int, Sequence[dict]]) -> "Figure":
    """For each round a bar of what became of the questions, with counts."""
    rounds = sorted(evaluated)
    counts = [Counter(row["verdict"] for row in evaluated[each]) for each in rounds]
    seen = {name for count in counts for name in count}
    names = [name for name in VERDICTS if name in seen] + sorted(seen - set(VERDICTS))
    figure, [axes] = _figure(height=1.1 + 0.42 * len(rounds) + 0.2 * ((len(names) + 1) // 2))
    left = np.zeros(len(rounds))
    for name in names:
        shares = np.array([100 * count[name] / count.total() for count in counts])
        axes.barh(range(len(rounds)), shares, left=left, height=0.66, color=VERDICTS.get(name, SERIES[5]), label=name)
        for row, share in enumerate(shares):
            if share >= 5:
                place = (left[row] + share / 2, row)
                axes.text(*place, counts[row][name], ha="center", va="center", color=ON_BAR, fontsize=9)
        left += shares
    axes.set_yticks(range(len(rounds)), [round_name(each) for each in rounds])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("percent of questions; counts in the bars")
    _legend(axes, 2)
    return figure


def losses(steps: Sequence[dict]) -> "Figure":
    """The loss of each logged step, one panel for each phase, over all steps of the run.

    Args:
        steps: rows of metrics.jsonl with "round", "phase", "loss" and "steps_so_far".
    """
    phases = list(dict.fromkeys(row["phase"] for row in steps))
    figure, panels = _figure(height=1.0 + 1.5 * len(phases), rows=len(phases))
    for number, (axes, phase) in enumerate(zip(panels, phases, strict=True)):
        for each in dict.fromkeys(row["round"] for row in steps):
            rows = [row for row in steps if (row["phase"], row["round"]) == (phase, each)]
            places, values = [row["steps_so_far"] for row in rows], [row["loss"] for row in rows]
            axes.plot(places, values, color=SERIES[number], marker="o", markersize=3 if len(rows) < 40 else 0)
            if rows:  # at the top, over the first step, where no line runs
                axes.text(places[0], 0.98, round_name(each), transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        axes.set_title(f"{phase} phase", loc="left", fontsize=9.5)
        axes.set_ylabel("loss")
        axes.margins(0.08, 0.25)
    panels[-1].set_xlabel("optimizer steps since the run began")
    return figure


def time_bars(times: Sequence[dict]) -> "Figure":
    """Seconds of each part of each round. `times`: rows of metrics.jsonl with "round", "part" and "seconds"."""
    rounds = sorted({row["round"] for row in times})
    parts = list(dict.fromkeys(row["part"] for row in times))
    figure, [axes] = _figure(height=1.1 + 0.42 * len(rounds) + 0.2 * ((len(parts) + 1) // 2))
    left = np.zeros(len(rounds))
    for number, part in enumerate(parts):
        spent = [sum(row["seconds"] for row in times if (row["round"], row["part"]) == (each, part)) for each in rounds]
        axes.barh(range(len(rounds)), spent, left=left, height=0.66, color=SERIES[number % len(SERIES)], label=part)
        left += spent
    axes.set_yticks(range(len(rounds)), [round_name(each) for each in rounds])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    _legend(axes, 2)
    return figure


def calibration(scores: np.ndarray, right: np.ndarray) -> "Figure":
    """The generator's certainty, (n,) 0 to 1, against the share of right answers among those of like certainty, with intervals."""
    figure, [axes] = _figure(height=3.4)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle="--", label="as sure as right")
    bins = calibration_bins(scores, right)
    means, shares = (np.array([each[at] for each in bins]) for at in (0, 1))
    ends = np.array([_wilson(right[rows]) for _, _, rows in bins]).T
    label = f"groups of about {round(len(scores) / len(bins))} answers"
    axes.errorbar(means, shares, np.abs(ends - shares), color=SERIES[0], marker="o", capsize=3, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("certainty of the generator")
    axes.set_ylabel("share of right answers")
    _legend(axes, 2)
    return figure


def _wilson(right: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which is no point where a small group has none right or all."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def calibration_bins(scores: np.ndarray, right: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """Groups of like certainty and equal size, at least five answers each: (mean certainty, share right, their rows)."""
    groups = np.array_split(np.argsort(scores, kind="stable"), max(1, min(BINS, len(scores) // 5)))
    return [(float(scores[rows].mean()), float(right[rows].mean()), rows) for rows in groups]


def calibration_error(scores: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over `calibration_bins`, 0 to 1: the mean distance of certainty and share right (Guo et al. 2017)."""
    return float(
        sum(abs(mean - share) * len(rows) for mean, share, rows in calibration_bins(scores, right)) / len(scores)
    )


def latencies(seconds: np.ndarray) -> "Figure":
    """Seconds of single questions, (n,), each as a dot, with median and 95th percentile."""
    figure, [axes] = _figure(height=1.9)
    lift = np.random.default_rng(0).uniform(-0.3, 0.3, len(seconds))  # so that dots do not hide each other
    axes.plot(seconds, lift, "o", color=SERIES[0], markersize=4, alpha=0.7)
    for name, share, colour in (("median", 0.5, SERIES[2]), ("95 of 100 are faster", 0.95, SERIES[1])):
        value = float(np.quantile(seconds, share))
        axes.axvline(value, color=colour, linewidth=1.8, label=f"{name}: {value:.2f} s")
    axes.set_yticks([])
    axes.set_ylim(-0.6, 0.6)
    axes.set_xlim(0, float(seconds.max()) * 1.1)
    axes.set_xlabel("seconds for one question")
    _legend(axes, 2)
    return figure


def differences(rows: Sequence[tuple[str, float, float, float]]) -> "Figure":
    """(name, difference, low, high) of two runs, in points: a dot with its interval for each, and a line at no difference."""
    figure, [axes] = _figure(height=0.8 + 0.34 * len(rows))
    for place, (_, middle, low, high) in enumerate(rows):
        colour = SERIES[2] if low > 0 else SERIES[1] if high < 0 else SERIES[5]
        axes.plot([low, high], [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot([middle], [place], "o", color=colour)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.margins(0.08, 0.15)
    axes.set_xlabel("B minus A, in points, with 95 % interval")
    return figure


def as_svg(figure: "Figure") -> Markup:
    """The figure as an SVG element for an HTML page, in the page's colours."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r' id="[A-Za-z][\w.]*_\d+"', "", svg
    )  # names of groups repeat from figure to figure; nothing refers to them
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # that style would be the whole page's
    svg = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"<svg \1", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def save_png(figure: "Figure", path: Path) -> None:
    """The figure on white, 150 dots an inch."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def round_name(number: int) -> str:
    """What a round is called in plots and tables: round 0 only examines."""
    return "before" if number == 0 else f"round {number}"


def _figure(*, height: float = 3.0, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, one below the other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _legend(axes: "Axes", columns: int) -> None:
    """Above the panel, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, fontsize=8.5, borderaxespad=0.2, frameon=False
    )
