"""The report of a run: its content, that it loads nothing, and what is measured for it with a tiny pair."""

import re
import shutil

import evaluated
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from cozyrag.errors import InputError  # noqa: E402
from cozyrag.pipeline import CozyRAG  # noqa: E402
from cozyrag.reporting import extras, html_report  # noqa: E402
from cozyrag.reporting.html_report import (  # noqa: E402
    certainties,
    measure_latency,
    report,
    report_at_end,
    samples,
    write_report,
)
from cozyrag.reporting.run_reader import FinishedRun  # noqa: E402

EVIL = "<script>alert(1)</script><img src=https://example.org/x.png>"
BEFORE = [evaluated.row(number, em=0) for number in range(30)]
AFTER = [evaluated.row(number, em=number < 20, score=0.1 + 0.8 * number / 29) for number in range(30)]


def written(folder, rounds, **options):
    return write_report(FinishedRun.read(evaluated.write_run(folder, rounds)), **options).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with data for every plot."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    written(folder, [BEFORE, AFTER], seconds=np.array([0.1, 0.2, 0.3]))
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_shows_the_results(page):
    assert "More than noise: the trained pair answers better than the untuned baseline, F1 +66.7 points" in page
    assert re.search(r"exact match<b>66\.7</b>\s*<span[^>]*>\+66\.7 \(", page)
    assert "the most frequent error is: reader error (10 of 10)" in page and "rolled back" in page
    assert "30 answers; mean certainty 0.50, 0.67 correct: underconfident" in page
    assert "1.5 minutes in all" in page and "median: 0.20 s" in page


def test_all_plots_are_in_the_page_and_beside_it(folder, page):
    names = ["calibration", "latency", "losses", "scores", "times", "verdicts"]
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == names
    assert page.count("<svg") == page.count("<figure") == page.count("<figcaption") == 6


def test_the_settings_are_listed_without_the_folder_of_the_run(folder, page):
    assert "<span>generator</span><span>gpt2</span>" in page
    assert str(folder.parent) not in page and "hub_model_id" not in page


def test_the_page_is_one_file_that_loads_nothing(page):
    assert (
        "<script" not in page and "<link" not in page and "@import" not in page and "url(" not in page.split("<body")[0]
    )
    assert set(re.findall(r'https?://[^"\s]+', page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and "@media print" in page


def test_untrusted_text_is_escaped(tmp_path):
    row = evaluated.row(0, em=0, question=EVIL, prediction=EVIL, answers=[EVIL], context=EVIL, verdict=EVIL)
    page = written(tmp_path / EVIL.replace("/", ""), [[row]])
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") >= 7


def test_what_was_not_measured_is_left_out(tmp_path):
    folder = evaluated.write_run(tmp_path / "run", [BEFORE], metrics=[])
    (folder / "plots").mkdir()
    (folder / "plots" / "latency.png").touch()  # of an earlier report
    page = write_report(FinishedRun.read(folder)).read_text(encoding="utf-8")
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == ["scores", "verdicts"]
    assert "nothing is trained yet" in page and "<h2>Rollback" not in page


def apart(row, dense):
    """A row with the scores of each search alone."""
    found = {"dense": dense, "sparse": 0.0, "hybrid": 1.0}
    return row | {f"{search}_recall@{depth}": float(value) for search, value in found.items() for depth in (1, 5)}


def test_what_the_retriever_learns_is_plotted_and_listed(tmp_path):
    rounds = [[apart(row, n < 6) for n, row in enumerate(BEFORE)], [apart(row, n < 24) for n, row in enumerate(AFTER)]]
    page = written(tmp_path / "run", rounds)
    assert (tmp_path / "run" / "plots" / "searches.png").stat().st_size > 5_000
    assert re.search(
        r"The retriever by itself: recall@1 20\.0 to 80\.0 \(\+60\.0, \+\d.*; recall@5 20\.0 to 80\.0", page
    )
    cells = re.findall(r'<td class="number">([\d.]+)', page.split("<h3>Each search by itself</h3>\n<div class")[1])
    assert cells == ["20.0", "20.0", "0.0", "0.0", "100.0", "100.0", "80.0", "80.0", "0.0", "0.0", "100.0", "100.0"]
    assert "which searches by both together." in page and "30 validation questions are few" in page


def test_a_run_whose_first_rounds_are_of_an_older_version_shows_the_searches_of_the_later_ones(tmp_path):
    page = written(tmp_path / "run", [BEFORE, [apart(row, True) for row in AFTER]])
    assert (tmp_path / "run" / "plots" / "searches.png").exists() and "The retriever by itself" not in page
    assert '<td>untuned baseline</td><td class="number"></td>' in page


def test_samples_show_each_verdict_and_the_answer_of_the_baseline(tmp_path):
    verdicts = ["retrieval miss"] * 50 + ["reader error"] * 2 + ["new"] + ["correct"] * 50
    after = [evaluated.row(n, em=verdict == "correct", verdict=verdict) for n, verdict in enumerate(verdicts)]
    before = [evaluated.row(n, em=0, prediction=f"old {n}") for n in range(len(verdicts))]
    shown = samples(FinishedRun.read(evaluated.write_run(tmp_path / "run", [before, after])))
    counts = {verdict: sum(row["verdict"] == verdict for row in shown) for verdict in dict.fromkeys(verdicts)}
    assert len(shown) <= html_report.SAMPLES and min(counts.values()) >= 1 and counts["reader error"] == 2
    assert all(row["baseline"] == f"old {row['id'].removeprefix('q')}" for row in shown)


# ---- measured with a pair


@pytest.fixture(scope="module")
def run(tmp_path_factory, pair_folder):
    """A tiny pair with an evaluation of its own answers."""
    folder = shutil.copytree(pair_folder, tmp_path_factory.mktemp("measured") / "run")
    pair = CozyRAG.from_pretrained(folder)
    asked = [f"What colour is the fox {number}?" for number in (0, 12, 24)]
    rows = [
        evaluated.row(
            number, em=0, question=question, prediction=answer.text, context=answer.context, score=answer.score
        )
        for number, (question, answer) in enumerate(zip(asked, pair.answers(asked), strict=True))
    ]
    return evaluated.write_run(folder, [rows])


def test_certainty_is_the_score_of_the_answer(run):
    pair, rows = CozyRAG.from_pretrained(run), FinishedRun.read(run).evaluated[0]
    scores, correct = certainties(rows)
    assert scores.tolist() == pytest.approx([pair.answer(row["question"]).score for row in rows], rel=1e-4)
    assert correct.tolist() == [0, 0, 0]


def test_a_run_of_an_older_version_has_no_certainties():
    assert certainties([evaluated.row(0, em=1)]) is None


def test_latency_is_measured_question_by_question(run):
    asked = []

    class Clocked:
        def answer(self, question):
            asked.append(question)

    rows = FinishedRun.read(run).evaluated[0]
    seconds = measure_latency(Clocked(), rows, 2)
    assert seconds.shape == (2,) and (seconds >= 0).all() and asked == [asked[0], asked[0], rows[1]["question"]]


def test_the_command_measures_and_writes(run):
    assert report(run, latency=2) == run / "report.html"
    assert {"calibration.png", "latency.png"} <= {path.name for path in (run / "plots").iterdir()}


def test_the_end_of_a_run_names_its_report(run):
    (run / "report.html").unlink(missing_ok=True)
    line = report_at_end(run)
    assert line == f"{run / 'report.html'} shows this run as a page with plots." and (run / "report.html").exists()
    assert (run / "plots" / "calibration.png").exists() and not (run / "plots" / "latency.png").exists()


def test_a_report_that_cannot_be_written_does_not_fail_the_run(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html_report, "write_report", full)
    line = report_at_end(run)
    assert line.startswith("No report.html ([Errno 28] No space left") and f"`cozyrag report {run}`" in line


def test_without_matplotlib_a_run_names_the_extra_and_the_command_refuses(run, monkeypatch):
    monkeypatch.setattr(extras, "plots_are_possible", lambda: False)
    assert report_at_end(run).startswith('With pip install "cozyrag[plots]"')
    with pytest.raises(InputError, match=r"cozyrag\[plots\]"):
        report(run)


# ---- in a browser


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390)])
def test_the_page_in_a_browser_fits_loads_nothing_and_is_readable(browser, folder, scheme, width):
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(f"file://{folder}/report.html")
    assert requests == [f"file://{folder}/report.html"] and complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shade = "color => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3"
    paper = page.evaluate(f"({shade})(getComputedStyle(document.body).backgroundColor)")
    letters = page.evaluate(f"({shade})(getComputedStyle(document.querySelector('figure svg text')).fill)")
    assert (paper > 200 and letters < 80) if scheme == "light" else (paper < 60 and letters > 180)
    assert all(
        box["height"] > 60 for box in [figure.bounding_box() for figure in page.query_selector_all("figure svg")]
    )
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate(f"({shade})(getComputedStyle(document.body).backgroundColor)") > 200
    page.close()
