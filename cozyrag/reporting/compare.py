"""Two runs side by side: settings that differ, scores on the questions both examined, and what is more than noise.

The arithmetic is that of the gate: a paired bootstrap over the questions. Left out: reading the files (run_reader.py) and drawing
(plots.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cozyrag.errors import InputError
from cozyrag.evaluation.evaluation import SHOWN
from cozyrag.evaluation.metrics import paired_bootstrap
from cozyrag.hub.model_cards import public_settings
from cozyrag.reporting import plots
from cozyrag.reporting.run_reader import FinishedRun, spread
from cozyrag.reporting.templates import render, stylesheet

FLIPS_SHOWN = 10  # of each kind on the screen; the page has them all
BESIDE_THE_COURSE = {
    "output_dir", "run_name", "resume", "overwrite_output_dir", "plan", "report_to", "project_name", "logging_steps", "save_steps",
    "save_total_limit", "push_to_hub",
}  # fmt: skip
DECIDING = ("f1", "em")  # the first one that differs by more than noise makes the sentence


@dataclass(frozen=True)
class Difference:
    """One metric of two results on the same questions, in percent; `low` and `high` bound 95 % of the resampled differences."""

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
        """Whether the interval leaves no difference out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """`settings`: (name, value of A, value of B) where they differ; `pairs`: the rows of the questions both examined; `warnings`: sentences."""

    names: tuple[str, str]
    rounds: tuple[int, int]
    settings: list[tuple[str, object, object]]
    pairs: list[tuple[dict, dict]]
    differences: list[Difference]
    warnings: list[str]

    @property
    def lost(self) -> list[tuple[dict, dict]]:
        """Questions that A answers rightly and B does not."""
        return [pair for pair in self.pairs if pair[0]["em"] > pair[1]["em"]]

    @property
    def won(self) -> list[tuple[dict, dict]]:
        """Questions that B answers rightly and A does not."""
        return [pair for pair in self.pairs if pair[0]["em"] < pair[1]["em"]]

    @property
    def sentence(self) -> str:
        """Whether it is more than noise."""
        return more_than_noise(self.differences, len(self.pairs), names=("A", "B"))


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare the last rounds of two runs. Raises InputError when one is no run, or no question was examined by both."""
    a, b = FinishedRun.read(run_a), FinishedRun.read(run_b)
    rows_a, rows_b = a.evaluated[a.last], b.evaluated[b.last]
    pairs = matched(rows_a, rows_b)
    if not pairs:
        raise InputError(
            f"Expected questions that both runs examined, found none in common ({len(rows_a)} in {a.folder}, {len(rows_b)} in {b.folder}). "
            "Train or examine both with the same --eval_questions."
        )
    return Comparison(
        names=(str(run_a), str(run_b)),
        rounds=(a.last, b.last),
        settings=changed_settings(a.settings, b.settings),
        pairs=pairs,
        differences=differences(pairs),
        warnings=_warnings(pairs, len(rows_a), len(rows_b)),
    )


def matched(rows_a: Sequence[dict], rows_b: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Rows of the same question, in the order of the first: by id and question, else by a question that either has once."""
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


def differences(pairs: Sequence[tuple[dict, dict]], metrics: Sequence[str] = SHOWN) -> list[Difference]:
    """Each metric that both have, second minus first, with paired bootstrap intervals."""
    found = []
    for metric in metrics:
        if all(metric in row for pair in pairs for row in pair):
            a, b = (np.array([pair[side][metric] for pair in pairs], dtype=np.float64) for side in (0, 1))
            _, low, high, _ = paired_bootstrap(a, b)
            found.append(Difference(metric, *(100 * float(each) for each in (a.mean(), b.mean(), low, high))))
    return found


def more_than_noise(found: Sequence[Difference], questions: int, *, names: tuple[str, str]) -> str:
    """One or two sentences on the answers, from F1 and exact match: better, worse, the same, or not to be told apart."""
    deciding = [each for name in DECIDING for each in found if each.metric == name]
    certain = next((each for each in deciding if each.certain), None)
    chosen = certain or deciding[0]
    told = f"{chosen.metric.upper()} {chosen.points:+.1f} points ({chosen.low:+.1f} to {chosen.high:+.1f}) on {questions} questions"
    others = [f"{each.metric} {each.points:+.1f}" for each in found if each.certain and each.metric not in DECIDING]
    besides = f" Of the other scores these differ by more than noise: {', '.join(others)}." if others else ""
    if certain:
        better, worse = reversed(names) if chosen.points > 0 else names
        return f"More than noise: {better} answers better than {worse}, {told}. The interval covers which questions were asked, not the luck of a seed.{besides}"
    if all(each.low == each.high == 0 for each in deciding):
        return f"No difference in the answers: {names[0]} and {names[1]} score the same on every one of {questions} questions.{besides}"
    return f"Not more than noise: {told}. Whether {names[1]} answers better or worse than {names[0]} would take more questions to say.{besides}"


def changed_settings(a: dict, b: dict) -> list[tuple[str, object, object]]:
    """Settings that differ, in their order, without those that say where a run lies and what it is called."""
    shown_a, shown_b = public_settings(a), public_settings(b)
    names = [name for name in dict.fromkeys([*shown_a, *shown_b]) if name not in BESIDE_THE_COURSE]
    return [(name, shown_a.get(name), shown_b.get(name)) for name in names if shown_a.get(name) != shown_b.get(name)]


def _warnings(pairs: Sequence[tuple[dict, dict]], count_a: int, count_b: int) -> list[str]:
    found = []
    if len(pairs) < max(count_a, count_b):
        found.append(
            f"A examined {count_a} questions and B {count_b}; only the {len(pairs)} that both examined are compared."
        )
    others = sum(set(a["answers"]) != set(b["answers"]) for a, b in pairs)
    if others:
        found.append(
            f"{others} of these questions have other reference answers in B than in A, so their scores do not compare."
        )
    return found


def as_text(comparison: Comparison) -> str:
    """The comparison for the screen."""
    a, b = comparison.names
    rounds = [f"round {number}" if number else "before training" for number in comparison.rounds]
    lines = [
        f"A: {a} ({rounds[0]})",
        f"B: {b} ({rounds[1]})",
        *(f"Warning: {each}" for each in comparison.warnings),
        "",
    ]
    if comparison.settings:
        width = max(len(name) for name, _, _ in comparison.settings)
        lines.append("Settings that differ:")
        lines += [
            f"  {name:<{width}}  {_formatted(left)}  ->  {_formatted(right)}"
            for name, left, right in comparison.settings
        ]
    else:
        lines.append("The settings are the same.")
    lines += ["", "|  | A | B | difference | 95 % interval |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {each.metric} | {each.a:.1f} | {each.b:.1f} | {each.points:+.1f} | {each.low:+.1f} to {each.high:+.1f} |"
        for each in comparison.differences
    ]
    lines += ["", f"Percent of {len(comparison.pairs)} questions."]
    for title, flips in (("right -> wrong", comparison.lost), ("wrong -> right", comparison.won)):
        lines += ["", f"{title}: {len(flips)}"]
        for left, right in spread(flips, FLIPS_SHOWN):
            lines.append(
                f"  {left['question']}\n    A: {_answer(left)}   B: {_answer(right)}   reference: {_reference(left)}"
            )
        if len(flips) > FLIPS_SHOWN:
            lines.append(f"  ... and {len(flips) - FLIPS_SHOWN} more; --html FILE shows them all")
    return "\n".join([*lines, "", comparison.sentence])


def write_page(comparison: Comparison, path: str | Path) -> None:
    """The comparison as one HTML file, with a picture of the differences where Matplotlib is there.

    Raises InputError if it cannot be written.
    """
    picture = None
    if plots.plots_are_possible():
        found = [(each.metric, each.points, each.low, each.high) for each in comparison.differences]
        picture = plots.as_svg(plots.differences(found))
    groups = [("Right in A, wrong in B", comparison.lost), ("Wrong in A, right in B", comparison.won)]
    text = render(
        "comparison.html", style=stylesheet("report.css"), comparison=comparison, groups=groups, picture=picture
    )
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html: {path} cannot be written ({error}). Name a file in a folder that exists.") from error


def _formatted(value: object) -> str:
    return "not set" if value is None else str(value)


def _answer(row: dict) -> str:
    return f"{row['prediction'] or '(silent)'} [{row['verdict']}]"


def _reference(row: dict) -> str:
    return row["answers"][0] if row["answers"] else "(none)"
