"""Plots: what is drawn where, calibration worked out by hand, and SVG in the colours of its page."""

import re

import evaluated
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from cozyrag.errors import InputError  # noqa: E402
from cozyrag.evaluation.calibration import calibration_bins, calibration_error
from cozyrag.reporting import extras, plots  # noqa: E402

EVALUATED = {
    0: [evaluated.row(number, em=number < 2) for number in range(10)],
    1: [evaluated.row(number, em=number < 5, f1=0.75) for number in range(10)],
}
FIGURES = {
    "scores": lambda: plots.scores_by_round(EVALUATED),
    "verdicts": lambda: plots.verdict_bars(EVALUATED),
    "losses": lambda: plots.losses([row for row in evaluated.METRICS if row["kind"] == "step"]),
    "times": lambda: plots.time_bars([row for row in evaluated.METRICS if row["kind"] == "time"]),
    "calibration": lambda: plots.calibration(np.linspace(0.05, 0.95, 20), np.repeat([0.0, 1.0], 10)),
    "latencies": lambda: plots.latencies(np.array([0.1, 0.2, 0.4])),
    "difference_bars": lambda: plots.difference_bars([("em", 5.0, 1.0, 9.0), ("f1", 0.0, -2.0, 2.0)]),
}


def test_scores_are_drawn_at_their_heights():
    axes = plots.scores_by_round(EVALUATED).axes[0]
    heights = {
        bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in axes.containers if bars.get_label()[0] != "_"
    }
    assert heights == {"exact match": [20, 50], "F1": [20, 75], "recall@5": [100, 100]}


def test_bars_of_verdicts_are_shares_that_add_up_and_carry_counts():
    axes = plots.verdict_bars(EVALUATED).axes[0]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"correct": [20, 50], "reader error": [80, 50]}
    assert sorted(text.get_text() for text in axes.texts) == ["2", "5", "5", "8"]


def test_an_unknown_verdict_gets_a_bar_too():
    axes = plots.verdict_bars({0: [evaluated.row(1, em=0, verdict="<new> $x$"), evaluated.row(2, em=1)]}).axes[0]
    assert [bars.get_label() for bars in axes.containers] == ["correct", "<new> $x$"]


def test_seconds_of_a_part_are_summed():
    times = [{"round": 1, "part": "index", "seconds": each} for each in (2.0, 3.0)]
    [bars] = plots.time_bars(times).axes[0].containers
    assert [bar.get_width() for bar in bars] == [5.0]


def test_each_phase_has_its_panel_of_losses():
    panels = FIGURES["losses"]().axes
    assert [axes.get_title(loc="left") for axes in panels] == ["generator phase", "retriever phase"]
    assert [line.get_xydata().tolist() for line in panels[0].lines] == [[[1, 3.0], [2, 2.0]]]


def test_a_run_that_trained_one_model_has_one_panel_of_losses():
    steps = [row for row in evaluated.METRICS if row.get("phase") == "retriever"]
    assert len(plots.losses(steps).axes) == 1


def test_calibration_groups_are_equal_sorted_and_at_least_five():
    scores = np.random.default_rng(0).random(43)
    bins = calibration_bins(scores, np.ones(43))
    assert len(bins) == 8 and min(len(rows) for _, _, rows in bins) >= 5
    assert sorted(np.concatenate([rows for _, _, rows in bins])) == list(range(43))
    assert [mean for mean, _, _ in bins] == sorted(mean for mean, _, _ in bins)
    assert len(calibration_bins(scores[:3], np.ones(3))) == 1


def test_calibration_error_by_hand():
    scores, correct = np.repeat([0.2, 0.9], 5), np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0], dtype=float)
    assert calibration_error(scores, correct) == pytest.approx((0.0 + 0.3) / 2)
    assert calibration_error(np.ones(10), np.ones(10)) == 0


def test_intervals_of_small_groups_have_a_width():
    axes = plots.calibration(np.linspace(0.1, 0.2, 5), np.zeros(5)).axes[0]
    [bar] = axes.containers[0].lines[2][0].get_segments()
    assert bar[0][1] == 0 and bar[1][1] == pytest.approx(0.4345, abs=1e-3)  # 1.96**2 / (5 + 1.96**2)


def test_latency_lines_are_at_the_quantiles():
    lines = FIGURES["latencies"]().axes[0].lines
    assert [line.get_label() for line in lines[1:]] == ["median: 0.20 s", "95th percentile: 0.38 s"]


@pytest.mark.parametrize("name", FIGURES)
def test_svg_has_no_fixed_colour_no_repeated_id_and_loads_nothing(name):
    svg = plots.as_svg(FIGURES[name]())
    assert svg.startswith("<svg ") and "viewBox" in svg
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg)
    names = re.findall(r' id="([^"]+)"', svg)
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) <= set(names)
    assert not re.findall(r"<(script|image|style)", svg)
    assert set(re.findall(r'https?://[^"\s]+', svg)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_svg_is_the_same_every_time_and_escapes_its_texts():
    rows = {0: [evaluated.row(1, em=0, verdict="<script>alert(1)</script>")]}
    svg = plots.as_svg(plots.verdict_bars(rows))
    assert svg == plots.as_svg(plots.verdict_bars(rows))
    assert "<script" not in svg and "&lt;script&gt;" in svg


def test_png_is_written(tmp_path):
    plots.save_png(FIGURES["difference_bars"](), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "cozyrag\[plots\]"'):
        extras.check_plots()
