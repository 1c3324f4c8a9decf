"""report.html: a run as one file with plots and tables that needs no other file; and its plots as PNG.

Left out: drawing (plots.py), the texts of the page (assets/pages/report.html), the run's log (run_log.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import tqdm
from markupsafe import Markup

from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.evaluation.calibration import calibration_error
from cozyrag.evaluation.evaluation import SEARCHES, SHOWN, few_questions, summarize
from cozyrag.hub.model_cards import public_settings, synthetic_sentence
from cozyrag.pipeline import CozyRAG
from cozyrag.reporting import extras, plots
from cozyrag.reporting.compare import Difference, differences, matched, more_than_noise
from cozyrag.reporting.run_reader import FinishedRun, spread
from cozyrag.reporting.templates import render, stylesheet
from cozyrag.runtime.atomic_files import replacing_file, write_text
from cozyrag.runtime.terminal import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 24  # questions in the table, about as many of each verdict


@dataclass(frozen=True)
class Plot:
    """A plot of the page: `name` selects its caption, `finding` states its result."""

    name: str
    svg: Markup
    finding: str


def report(folder: str | Path, *, latency: int = 0) -> Path:
    """Write the report of a finished run and return its path.

    Args:
        latency: evaluated questions to ask one at a time; 0: latency is not measured, and the pair is not loaded.

    Raises:
        InputError: Matplotlib is missing, or the folder holds no finished run.
    """
    extras.check_plots()
    run = FinishedRun.read(folder)
    seconds = measure_latency(CozyRAG.from_pretrained(folder), run.evaluated[run.last], latency) if latency else None
    return write_report(run, seconds=seconds)


def report_at_end(folder: Path) -> str:
    """Write the report at the end of a run; returns a sentence on where it is, or why there is none.

    A report that fails does not fail the run.
    """
    again = f"`cozyrag report {quote(str(folder))}`"
    if not extras.plots_are_possible():
        return f'With pip install "cozyrag[plots]", {again} shows this run as a page with plots.'
    try:
        path = write_report(FinishedRun.read(folder))
    except (ImportError, OSError, InputError) as error:
        return f"No report.html ({one_line(error)}). {again} tries again."
    return f"{one_line(path)} shows this run as a page with plots."


def certainties(rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray] | None:
    """(certainty, correct), both (n,), of the answers of a round; None for a run of a version that did not save them.

    Certainty is the generator's, before calibration: the geometric mean of the probabilities of the answer's tokens.
    """
    if any("score" not in row for row in rows):
        return None
    return np.array([row["score"] for row in rows]), np.array([row["em"] for row in rows], dtype=np.float64)


def measure_latency(pair: CozyRAG, rows: Sequence[dict], count: int) -> np.ndarray:
    """Seconds for each of at most `count` evaluated questions, asked one at a time after a warm-up question."""
    questions = [row["question"] for row in spread(rows, count)]
    pair.answer(questions[0])
    seconds = []
    for question in tqdm(questions, desc="measuring latency", unit="question"):
        started = perf_counter()
        pair.answer(question)
        seconds.append(perf_counter() - started)
    return np.array(seconds)


def write_report(run: FinishedRun, *, seconds: np.ndarray | None = None) -> Path:
    """Write report.html and plots/ into the run's folder. `seconds`: see `measure_latency`; None: left out."""
    rows = run.evaluated[run.last]
    summaries = [(plots.round_name(number), summarize(run.evaluated[number])) for number in sorted(run.evaluated)]
    changes = differences(matched(run.evaluated[min(run.evaluated)], rows))
    text = render(
        "report.html",
        style=stylesheet("report.css"),
        name=run.folder.resolve().name,
        version=__version__,
        run=run,
        conclusion=_conclusion(run, changes),
        synthetic=synthetic_sentence((run.rows("run") or [{}])[-1]),
        changes={each.metric: each for each in changes},
        plots=_plots(run, changes, certainties(rows), seconds),
        metrics=SHOWN,
        summaries=summaries,
        searches=[name for name in SEARCHES if any(f"{name}_recall@1" in each for _, each in summaries)],
        few=few_questions(len(rows)),
        rollbacks=run.rows("rollback"),
        samples=samples(run),
        settings=public_settings(run.settings),
    )
    path = run.folder / "report.html"
    write_text(path, text)
    return path


def _conclusion(run: FinishedRun, changes: Sequence[Difference]) -> str:
    questions = len(run.evaluated[run.last])
    if run.last == min(run.evaluated):
        return f"Evaluated on {questions} questions; nothing is trained yet."
    return more_than_noise(changes, questions, names=("the untuned baseline", "the trained pair"))


def samples(run: FinishedRun) -> list[dict]:
    """Rows of the last evaluation for the table, some of each verdict, with the answer of the untuned baseline."""
    rows, first = run.evaluated[run.last], run.evaluated[min(run.evaluated)]
    baseline = {id(row): old["prediction"] for old, row in matched(first, rows)}
    chosen: list[dict] = []
    verdicts = plots.in_order({row["verdict"] for row in rows})
    for done, verdict in enumerate(verdicts):
        share = (SAMPLES - len(chosen)) // (len(verdicts) - done)
        chosen += spread([row for row in rows if row["verdict"] == verdict], share)
    return [row | {"baseline": baseline.get(id(row))} for row in chosen]


def _plots(
    run: FinishedRun,
    changes: Sequence[Difference],
    scores: tuple[np.ndarray, np.ndarray] | None,
    seconds: np.ndarray | None,
) -> list[Plot]:
    """The plots of the page, in its order; each is saved as PNG too."""
    folder = run.folder / "plots"
    made = []
    for name, figure, finding in _drawn(run, changes, scores, seconds):
        with replacing_file(folder / f"{name}.png") as beside:
            plots.save_png(figure, beside)
        made.append(Plot(name, plots.as_svg(figure), finding))
    for old in folder.glob("*.png"):
        if old.stem not in {plot.name for plot in made}:
            old.unlink(missing_ok=True)
    return made


def _drawn(
    run: FinishedRun,
    changes: Sequence[Difference],
    scores: tuple[np.ndarray, np.ndarray] | None,
    seconds: np.ndarray | None,
) -> Iterator[tuple[str, "Figure", str]]:
    """(name, figure, finding) of every plot for which the run has data."""
    questions = len(run.evaluated[run.last])
    yield "scores", plots.scores_by_round(run.evaluated), f"{questions} held-out questions."
    if (searches := plots.searches_by_round(run.evaluated)) is not None:
        yield "searches", searches, _dense_finding(changes)
    yield "verdicts", plots.verdict_bars(run.evaluated), _most_frequent_error(run)
    if scores is not None:
        yield "calibration", plots.calibration(*scores), _calibration_finding(run, *scores)
    if seconds is not None:
        yield "latency", plots.latencies(seconds), f"{len(seconds)} questions; the height of a dot has no meaning."
    if steps := run.rows("step"):
        yield "losses", plots.losses(steps), ""
    if times := run.rows("time"):
        minutes = sum(row["seconds"] for row in times) / 60
        yield "times", plots.time_bars(times), f"{minutes:.1f} minutes in all."


def _dense_finding(changes: Sequence[Difference]) -> str:
    """How much better the retriever finds by itself."""
    found = [
        f"{each.metric.removeprefix('dense_')} {each.a:.1f} to {each.b:.1f} "
        f"({each.points:+.1f}, {each.low:+.1f} to {each.high:+.1f})"
        for each in changes
        if each.metric.startswith("dense_")
    ]
    return f"The retriever by itself: {'; '.join(found)}." if found else ""


def _most_frequent_error(run: FinishedRun) -> str:
    wrong = [row["verdict"] for row in run.evaluated[run.last] if row["verdict"] != "correct"]
    if not wrong:
        return "All answers are correct."
    most = max(sorted(set(wrong)), key=wrong.count)
    return f"After the last round the most frequent error is: {most} ({wrong.count(most)} of {len(wrong)})."


def _calibration_finding(run: FinishedRun, scores: np.ndarray, correct: np.ndarray) -> str:
    fitted = [row for row in run.rows("calibration") if row["calibration"] and row["round"] == run.last]
    after = f" Calibrated, as the pair answers: {fitted[-1]['after']:.2f} (cross-validated)." if fitted else ""
    side = "overconfident" if scores.mean() > correct.mean() else "underconfident"
    return (
        f"{len(scores)} answers; mean certainty {scores.mean():.2f}, {correct.mean():.2f} correct: {side}; "
        f"expected calibration error {calibration_error(scores, correct):.2f}.{after}"
    )
