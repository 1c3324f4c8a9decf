"""report.html: what a run did, as one file that can be looked at, printed and sent on; and its plots as PNG.

Everything is in the file: pictures as SVG, styles, no script. Left out: drawing (plots.py), the words of the page
(assets/pages/report.html), the run's own log (run_log.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from accelerate.utils import tqdm
from markupsafe import Markup

from cozyrag import __version__
from cozyrag.evaluation.evaluation import SHOWN, summarize
from cozyrag.hub.model_cards import public_settings
from cozyrag.pipeline import CozyRAG
from cozyrag.reporting import plots as pictures
from cozyrag.reporting.compare import Difference, differences, matched, more_than_noise
from cozyrag.reporting.run_reader import FinishedRun, spread
from cozyrag.reporting.templates import render, stylesheet

SAMPLES = 24  # questions of the table, as many of each verdict as there are to be had


@dataclass(frozen=True)
class Plot:
    """A picture with its caption: `about` says what is to be seen, `told` what it says here."""

    name: str
    title: str
    svg: Markup
    about: str
    told: str = ""


def report(folder: str | Path, *, latency: int = 0) -> Path:
    """Load the pair of a finished run, measure its certainty and its speed, and write the report; returns its path.

    Args:
        latency: examined questions to ask one at a time.

    Raises:
        InputError: no Matplotlib, or no finished run in that folder.
    """
    pictures.check_plots()
    run = FinishedRun.read(folder)
    seconds = measure_latency(CozyRAG.from_pretrained(folder), run.evaluated[run.last], latency) if latency else None
    return write_report(run, seconds=seconds)


def report_at_end(folder: Path) -> str:
    """Write the report when a run ends and say where it is; without Matplotlib, how to get it.

    A report that cannot be made costs the run nothing: the sentence says so.
    """
    again = f"`cozyrag report {folder}`"
    if not pictures.plots_are_possible():
        return f'With pip install "cozyrag[plots]", {again} shows this run as a page with plots.'
    try:
        path = write_report(FinishedRun.read(folder))
    except (ImportError, OSError) as error:
        return f"No report.html ({error}). {again} tries again."
    return f"{path} shows this run as a page with plots."


def certainties(rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """(certainty, right), both (n,), of the answers of a round; None for a run of a version that did not write certainties down.

    Certainty is `Answer.score`: the geometric mean of the probabilities of the answer's tokens.
    """
    if any("score" not in row for row in rows):
        return None
    return tuple(np.array([row[name] for row in rows], dtype=np.float64) for name in ("score", "em"))


def measure_latency(pair: CozyRAG, rows: Sequence[dict], count: int) -> np.ndarray:
    """Seconds that each of at most `count` examined questions takes by itself, after one that does not count."""
    questions = [row["question"] for row in spread(rows, count)]
    pair.answer(questions[0])
    seconds = []
    for question in tqdm(questions, desc="how long an answer takes", unit="question"):
        started = perf_counter()
        pair.answer(question)
        seconds.append(perf_counter() - started)
    return np.array(seconds)


def write_report(
    run: FinishedRun,
    *,
    seconds: np.ndarray | None = None,
) -> Path:
    """Write report.html and plots/ into the run's folder.

    Args:
        seconds: see `measure_latency`; None: not measured, and left out.
    """
    changes = differences(matched(run.evaluated[min(run.evaluated)], run.evaluated[run.last]))
    text = render(
        "report.html",
        style=stylesheet("report.css"),
        name=run.folder.resolve().name,
        version=__version__,
        run=run,
        conclusion=_conclusion(run, changes),
        changes={each.metric: each for each in changes},
        plots=_plots(run, certainties(run.evaluated[run.last]), seconds),
        metrics=SHOWN,
        summaries=[(pictures.round_name(each), summarize(run.evaluated[each])) for each in sorted(run.evaluated)],
        rollbacks=run.rows("rollback"),
        samples=samples(run),
        settings=public_settings(run.settings),
    )
    path = run.folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def _conclusion(run: FinishedRun, changes: Sequence[Difference]) -> str:
    questions = len(run.evaluated[run.last])
    if run.last == min(run.evaluated):
        return f"Examined on {questions} questions; nothing was trained yet."
    return more_than_noise(changes, questions, names=("the pair before training", "the trained pair"))


def samples(run: FinishedRun) -> list[dict]:
    """Rows of the last examination for the table, of each verdict some, with what the pair answered before training."""
    rows, first = run.evaluated[run.last], run.evaluated[min(run.evaluated)]
    before = {id(row): old["prediction"] for old, row in matched(first, rows)}
    verdicts = [name for name in pictures.VERDICTS if any(row["verdict"] == name for row in rows)]
    verdicts += sorted({row["verdict"] for row in rows} - set(verdicts))
    chosen = []
    for done, verdict in enumerate(verdicts):
        share = (SAMPLES - len(chosen)) // (len(verdicts) - done)
        chosen += spread([row for row in rows if row["verdict"] == verdict], share)
    return [row | {"before": before.get(id(row))} for row in chosen]


def _plots(run: FinishedRun, scores: tuple[np.ndarray, np.ndarray] | None, seconds: np.ndarray | None) -> list[Plot]:
    """The pictures of the page, in its order; each is saved as PNG on the way."""
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    plots = []
    for name, figure, words in _drawn(run, scores, seconds):
        pictures.save_png(figure, folder / f"{name}.png")
        plots.append(Plot(name, svg=pictures.as_svg(figure), **words))
    return plots


def _drawn(run: FinishedRun, scores, seconds):
    """(name, figure, words of the caption) of everything there is something to draw of."""
    questions = len(run.evaluated[run.last])
    yield (
        "scores",
        pictures.scores_by_round(run.evaluated),
        {
            "title": "Scores by round",
            "about": "Exact match and F1 say how good the answers are, recall@5 how often the right passage is among the first five. "
            "The bars are 95 % intervals: where two overlap widely, the difference may be chance.",
            "told": f"{questions} questions that were not trained on.",
        },
    )
    yield (
        "verdicts",
        pictures.verdict_bars(run.evaluated),
        {
            "title": "What became of the questions",
            "about": "Right; or where it went wrong: the passage was not found (retrieval missed), its sentence was not passed on "
            "(filter dropped it), or the generator had the answer before it and wrote something else (reader missed).",
            "told": _verdict_summary(run),
        },
    )
    if scores is not None:
        yield "calibration", pictures.calibration(*scores), _calibration_words(*scores)
    if seconds is not None:
        yield (
            "latency",
            pictures.latencies(seconds),
            {
                "title": "How long an answer takes",
                "about": "One question at a time, from the question to the answer with its sources, on the machine that wrote this page.",
                "told": f"{len(seconds)} questions; the height of a dot means nothing.",
            },
        )
    if steps := run.rows("step"):
        yield (
            "losses",
            pictures.losses(steps),
            {
                "title": "Losses",
                "about": "What each phase tries to make small, at each logged step. It should fall within a round; the examinations above "
                "say whether that helped.",
            },
        )
    if times := run.rows("time"):
        minutes = sum(row["seconds"] for row in times) / 60
        yield (
            "times",
            pictures.time_bars(times),
            {
                "title": "Where the time went",
                "about": "Seconds of each part of each round.",
                "told": f"{minutes:.1f} minutes in all.",
            },
        )


def _verdict_summary(run: FinishedRun) -> str:
    """The most frequent way to go wrong after the last round."""
    wrong = [row["verdict"] for row in run.evaluated[run.last] if row["verdict"] != "correct"]
    if not wrong:
        return "All are right."
    most = max(sorted(set(wrong)), key=wrong.count)
    return f"After the last round most of what is wrong is: {most} ({wrong.count(most)} of {len(wrong)})."


def _calibration_words(scores: np.ndarray, right: np.ndarray) -> Mapping[str, str]:
    gap = pictures.calibration_error(scores, right)
    side = "surer than right" if scores.mean() > right.mean() else "righter than sure"
    return {
        "title": "Can its certainty be trusted?",
        "about": "Answers sorted by how sure the generator was and cut into groups of equal size. On the dashed line an answer with "
        "certainty 0.7 is right in 7 of 10 cases; below it the generator is surer than right.",
        "told": f"{len(scores)} answers; on average {scores.mean():.2f} sure and {right.mean():.2f} right: {side}, off by {gap:.2f} (expected calibration error).",
    }
