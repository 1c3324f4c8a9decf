"""Compare two runs: settings that differ, scores on the questions of both, and whether they differ by more than noise.

The test is that of the rollback: a paired bootstrap over the questions.
Left out: reading the files (run_reader.py), drawing (plots.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cozyrag.errors import InputError
from cozyrag.evaluation.evaluation import COMPARED
from cozyrag.evaluation.metrics import paired_bootstrap
from cozyrag.hub.model_cards import public_settings
from cozyrag.reporting import extras, plots
from cozyrag.reporting.run_reader import FinishedRun, spread
from cozyrag.reporting.templates import render, render_for_screen, stylesheet
from cozyrag.runtime.atomic_files import write_text

FLIPS_SHOWN = 10  # of each kind on the screen; the page shows them all
NO_EFFECT = {  # settings that do not change what is trained
    "output_dir", "run_name", "resume", "overwrite_output_dir", "plan", "report_to", "project_name", "logging_steps",
    "save_steps", "save_total_limit", "push_to_hub",
}  # fmt: skip
DECIDING = ("f1", "em")  # the first one that differs by more than noise decides the sentence
Pair = tuple[dict, dict]  # the rows of one question in both runs


@dataclass(frozen=True)
class Difference:
    """One metric of two runs on the same questions, in percent; `low` and `high`: 95 % interval of the difference."""

    metric: str
    a: float
    b: float
    low: float
    high: float

    @property
    def points(self) -> float:
        """b - a."""
        return self.b - self.a

    @property
    def certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """`rounds`: names of the compared rounds. `settings`: (name, value of A, value of B) of those that differ."""

    names: tuple[str, str]
    rounds: tuple[str, str]
    settings: list[tuple[str, object, object]]
    pairs: list[Pair]
    differences: list[Difference]
    warnings: list[str]

    @property
    def lost(self) -> list[Pair]:
        """Questions that A answers correctly and B does not."""
        return [pair for pair in self.pairs if pair[0]["em"] > pair[1]["em"]]

    @property
    def won(self) -> list[Pair]:
        """Questions that B answers correctly and A does not."""
        return [pair for pair in self.pairs if pair[0]["em"] < pair[1]["em"]]

    @property
    def sentence(self) -> str:
        """Whether the runs differ by more than noise."""
        return more_than_noise(self.differences, len(self.pairs), names=("A", "B"))


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare the last rounds of two runs. Raises InputError if one is not a run, or they share no question."""
    a, b = FinishedRun.read(run_a), FinishedRun.read(run_b)
    rows_a, rows_b = a.evaluated[a.last], b.evaluated[b.last]
    pairs = matched(rows_a, rows_b)
    if not pairs:
        raise InputError(
            f"Expected questions that both runs evaluated, found none in common ({len(rows_a)} in {a.folder}, "
            f"{len(rows_b)} in {b.folder}). Evaluate both with the same --eval_questions."
        )
    return Comparison(
        names=(str(run_a), str(run_b)),
        rounds=(plots.round_name(a.last), plots.round_name(b.last)),
        settings=changed_settings(a.settings, b.settings),
        pairs=pairs,
        differences=differences(pairs),
        warnings=_warnings(pairs, len(rows_a), len(rows_b)),
    )


def matched(rows_a: Sequence[dict], rows_b: Sequence[dict]) -> list[Pair]:
    """Rows of the same question, in the order of `rows_a`: by id and question, else by a unique question."""
    by_id = {(row["id"], row["question"]): row for row in rows_b}
    once_a, once_b = _asked_once(rows_a), _asked_once(rows_b)
    pairs = []
    for row in rows_a:
        other = by_id.get((row["id"], row["question"]))
        if other is None and row["question"] in once_a:
            other = once_b.get(row["question"])
        if other is not None:
            pairs.append((row, other))
    return pairs


def _asked_once(rows: Sequence[dict]) -> dict[str, dict]:
    texts = [row["question"] for row in rows]
    repeated = {text for text in texts if texts.count(text) > 1} if len(set(texts)) < len(texts) else set()
    return {row["question"]: row for row in rows if row["question"] not in repeated}


def differences(pairs: Sequence[Pair], metrics: Sequence[str] = COMPARED) -> list[Difference]:
    """Each metric that all rows have, second minus first, with paired bootstrap intervals."""
    found = []
    for metric in metrics:
        if all(metric in row for pair in pairs for row in pair):
            a, b = (np.array([pair[side][metric] for pair in pairs], dtype=np.float64) for side in (0, 1))
            _, low, high, _ = paired_bootstrap(a, b)
            found.append(Difference(metric, *(100 * float(each) for each in (a.mean(), b.mean(), low, high))))
    return found


def more_than_noise(found: Sequence[Difference], questions: int, *, names: tuple[str, str]) -> str:
    """One or two sentences on the answers, by F1 and exact match: better, worse, equal, or undecided."""
    deciding = [each for name in DECIDING for each in found if each.metric == name]
    certain = next((each for each in deciding if each.certain), None)
    best = certain or deciding[0]
    interval = f"({best.low:+.1f} to {best.high:+.1f})"
    score = f"{best.metric.upper()} {best.points:+.1f} points {interval} on {questions} questions"
    others = [f"{each.metric} {each.points:+.1f}" for each in found if each.certain and each.metric not in DECIDING]
    end = f" Other scores that differ by more than noise: {', '.join(others)}." if others else ""
    if certain:
        better, worse = reversed(names) if best.points > 0 else names
        return (
            f"More than noise: {better} answers better than {worse}, {score}. "
            f"The interval reflects the choice of questions, not the seed.{end}"
        )
    if all(each.low == each.high == 0 for each in deciding):
        return f"No difference: {names[0]} and {names[1]} score the same on every one of {questions} questions.{end}"
    return f"Not more than noise: {score}. More questions would be needed to tell {names[0]} and {names[1]} apart.{end}"


def changed_settings(a: dict, b: dict) -> list[tuple[str, object, object]]:
    """Settings that differ, in their order, without those that have no effect on training."""
    shown_a, shown_b = public_settings(a), public_settings(b)
    names = [name for name in dict.fromkeys([*shown_a, *shown_b]) if name not in NO_EFFECT]
    return [(name, shown_a.get(name), shown_b.get(name)) for name in names if shown_a.get(name) != shown_b.get(name)]


def _warnings(pairs: Sequence[Pair], count_a: int, count_b: int) -> list[str]:
    found = []
    if len(pairs) < max(count_a, count_b):
        found.append(f"A evaluated {count_a} questions and B {count_b}; only the {len(pairs)} of both are compared.")
    others = sum(set(a["answers"]) != set(b["answers"]) for a, b in pairs)
    if others:
        found.append(f"{others} of these questions have other reference answers in B, so their scores do not compare.")
    return found


def as_text(comparison: Comparison) -> str:
    """The comparison for the screen."""
    return render_for_screen("comparison.txt", comparison=comparison, spread=spread, shown=FLIPS_SHOWN)


def write_page(comparison: Comparison, path: str | Path) -> None:
    """The comparison as one HTML file, with a plot of the differences if Matplotlib is installed.

    Raises InputError if it cannot be written.
    """
    plot = None
    if extras.plots_are_possible():
        found = [(each.metric, each.points, each.low, each.high) for each in comparison.differences]
        plot = plots.as_svg(plots.difference_bars(found))
    text = render("comparison.html", style=stylesheet("report.css"), comparison=comparison, plot=plot)
    write_text(Path(path), text)
