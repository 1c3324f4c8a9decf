"""Plots of a run: scores, verdicts, losses, time, calibration, latency, and the differences of two runs.

Matplotlib draws them (`pip install "cozyrag[plots]"`) without pyplot, so no global state changes. An SVG takes its
colours from CSS variables of its page, so one drawing serves light and dark; a PNG is on white.
Left out: captions and pages (html_report.py, compare.py).
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from scipy.stats import binomtest

from cozyrag.evaluation.calibration import calibration_bins
from cozyrag.evaluation.evaluation import BY, SEARCHES
from cozyrag.evaluation.metrics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

METRICS = {"em": "exact match", "f1": "F1", "recall@5": "recall@5"}
# Colours on white (the palette of Okabe and Ito, slightly darker), and the CSS variables for them in a page
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
STYLE: "dict[RcKeyType, object]" = {
    "font.size": 9.5, "font.family": "sans-serif", "text.parse_math": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0,
    "svg.fonttype": "none", "svg.hashsalt": "cozyrag",
}  # fmt: skip
WIDTH = 5.2  # inches: text stays readable on a phone


def scores_by_round(evaluated: Mapping[int, Sequence[dict]]) -> "Figure":
    """EM, F1 and recall@5 after each round, in percent, with 95 % bootstrap intervals over the questions."""
    figure, [axes] = _figure()
    rounds = sorted(evaluated)
    for number, (metric, name) in enumerate(METRICS.items()):
        columns = [np.array([row[metric] for row in evaluated[each]], dtype=np.float64) for each in rounds]
        _means(axes, columns, number, name)
    axes.set_xticks(range(len(rounds)), [round_name(each) for each in rounds])
    axes.set(ylim=(-2, 102), ylabel="percent of questions")
    _legend(axes, len(METRICS))
    return figure


def searches_by_round(evaluated: Mapping[int, Sequence[dict]]) -> "Figure | None":
    """recall@1 and recall@5 of each search alone after each round, a panel each; None if only one was measured.

    The axes do not begin at 0: the retriever changes by points where the hybrid search is near its ceiling.
    """
    rounds = [each for each in sorted(evaluated) if all("dense_recall@1" in row for row in evaluated[each])]
    rows = [row for each in rounds for row in evaluated[each]]
    searches = [name for name in SEARCHES if rows and all(f"{name}_recall@1" in row for row in rows)]
    if len(searches) < 2:
        return None
    figure, panels = _figure(height=4.6, rows=2)
    for axes, depth in zip(panels, (1, 5), strict=True):
        for number, search in enumerate(searches):
            columns = [np.array([row[f"{search}_recall@{depth}"] for row in evaluated[each]]) for each in rounds]
            _means(axes, columns, number, f"{search}: {BY[search]}")
        axes.set(ylabel=f"recall@{depth}, percent")
        axes.margins(0.12, 0.1)
    panels[-1].set_xticks(range(len(rounds)), [round_name(each) for each in rounds])
    _legend(panels[0], 1)
    return figure


def _means(axes: "Axes", columns: Sequence[np.ndarray], number: int, label: str) -> None:
    """A line of means in percent, one for each column (n_questions,), with 95 % intervals; lines stand side by side."""
    means = 100 * np.array([column.mean() for column in columns])
    ends = 100 * np.array([bootstrap_interval(column) for column in columns]).T
    places, errors = np.arange(len(columns)) + 0.06 * (number - 1), np.abs(ends - means)
    mark = "os^D"[number]
    axes.errorbar(places, means, errors, color=SERIES[number], marker=mark, capsize=3, linewidth=1.6, label=label)


def in_order(verdicts: Iterable[str]) -> list[str]:
    """Verdicts in the order of the bars; unknown ones come last."""
    return sorted(verdicts, key=lambda name: (list(VERDICTS).index(name) if name in VERDICTS else len(VERDICTS), name))


def verdict_bars(evaluated: Mapping[int, Sequence[dict]]) -> "Figure":
    """For each round a bar with the share of each verdict, and counts."""
    rounds = sorted(evaluated)
    counts = [Counter(row["verdict"] for row in evaluated[each]) for each in rounds]
    names = in_order({name for count in counts for name in count})
    shares = {name: np.array([100 * count[name] / count.total() for count in counts]) for name in names}
    colours = [VERDICTS.get(name, SERIES[5]) for name in names]
    figure, axes = _stacked_bars(rounds, shares, colours, "percent of questions; counts in the bars")
    for name, bars in zip(names, axes.containers, strict=True):
        for bar, count in zip(bars, counts, strict=True):
            if bar.get_width() >= 5:
                place = (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2)
                axes.text(*place, str(count[name]), ha="center", va="center", color=ON_BAR, fontsize=9)
    axes.set_xlim(0, 100)
    return figure


def losses(steps: Sequence[dict]) -> "Figure":
    """The loss of each logged step, one panel per phase.

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
            if rows:  # at the top, over the first step, where there is no line
                axes.text(places[0], 0.98, round_name(each), transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        axes.set_title(f"{phase} phase", loc="left", fontsize=9.5)
        axes.set_ylabel("loss")
        axes.margins(0.08, 0.25)
    panels[-1].set_xlabel("optimizer steps since the start of the run")
    return figure


def time_bars(times: Sequence[dict]) -> "Figure":
    """Seconds of each part of each round. `times`: rows of metrics.jsonl with "round", "part" and "seconds"."""
    rounds = sorted({row["round"] for row in times})
    spent = {row["part"]: np.zeros(len(rounds)) for row in times}
    for row in times:
        spent[row["part"]][rounds.index(row["round"])] += row["seconds"]
    return _stacked_bars(rounds, spent, [SERIES[at % len(SERIES)] for at in range(len(spent))], "seconds")[0]


def _stacked_bars(
    rounds: Sequence[int], parts: Mapping[str, np.ndarray], colours: Sequence[str], label: str
) -> tuple["Figure", "Axes"]:
    """One horizontal bar per round. `parts`: lengths (rounds,) by name."""
    figure, [axes] = _figure(height=1.1 + 0.42 * len(rounds) + 0.2 * ((len(parts) + 1) // 2))
    left = np.zeros(len(rounds))
    for (name, lengths), colour in zip(parts.items(), colours, strict=True):
        axes.barh(range(len(rounds)), lengths, left=left, height=0.66, color=colour, label=name)
        left += lengths
    axes.set_yticks(range(len(rounds)), [round_name(each) for each in rounds])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    _legend(axes, 2)
    return figure, axes


def calibration(scores: np.ndarray, correct: np.ndarray) -> "Figure":
    """The share of correct answers over the generator's certainty, both (n,) in 0 to 1, in groups with intervals."""
    figure, [axes] = _figure(height=3.4)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.9, linestyle="--", label="perfect calibration")
    bins = calibration_bins(scores, correct)
    means, shares = (np.array([each[at] for each in bins]) for at in (0, 1))
    ends = np.array([_wilson(correct[rows]) for _, _, rows in bins]).T
    label = f"groups of about {round(len(scores) / len(bins))} answers"
    axes.errorbar(means, shares, np.abs(ends - shares), color=SERIES[0], marker="o", capsize=3, label=label)
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), xlabel="certainty of the generator", ylabel="share of correct answers")
    _legend(axes, 2)
    return figure


def _wilson(correct: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which has a width even if none or all of a small group are correct."""
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def latencies(seconds: np.ndarray) -> "Figure":
    """Seconds per question, (n,), each as a dot, with median and 95th percentile."""
    figure, [axes] = _figure(height=1.9)
    lift = np.random.default_rng(0).uniform(-0.3, 0.3, len(seconds))  # keeps dots apart
    axes.plot(seconds, lift, "o", color=SERIES[0], markersize=4, alpha=0.7)
    for name, share, colour in (("median", 0.5, SERIES[2]), ("95th percentile", 0.95, SERIES[1])):
        value = float(np.quantile(seconds, share))
        axes.axvline(value, color=colour, linewidth=1.8, label=f"{name}: {value:.2f} s")
    axes.set(yticks=[], ylim=(-0.6, 0.6), xlim=(0, float(seconds.max()) * 1.1), xlabel="seconds for one question")
    _legend(axes, 2)
    return figure


def difference_bars(rows: Sequence[tuple[str, float, float, float]]) -> "Figure":
    """(metric, difference, low, high) of two runs, in points: dots with intervals, and a line at 0."""
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
    """The figure as an SVG element in the colours of its HTML page."""
    from matplotlib import rc_context

    written = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)  # unused, and the same in every figure
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # the style would apply to the whole page
    svg = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"', r"<svg \1", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def save_png(figure: "Figure", path: Path) -> None:
    """The figure on white, 150 dots per inch."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def round_name(number: int) -> str:
    """The name of a round in plots and tables; round 0 only evaluates."""
    return f"round {number}" if number else "untuned baseline"


def _figure(*, height: float = 3.0, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, in one column."""
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
