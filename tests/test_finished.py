"""Reading a run's folder: its content, what is refused, and rows at even distances."""

import evaluated
import pytest

from cozyrag.errors import InputError
from cozyrag.reporting.run_reader import FinishedRun, spread
from cozyrag.runtime.json_lines import read_json_lines
from cozyrag.runtime.old_names import evaluation_files


def test_a_run_is_read_as_it_was_written(tmp_path):
    rounds = [[evaluated.row(1, em=0)], [evaluated.row(1, em=1)]]
    run = FinishedRun.read(evaluated.write_run(tmp_path / "run", rounds, seed=7))
    assert run.evaluated == dict(enumerate(rounds)) and run.last == 1
    assert run.settings["seed"] == 7 and run.metrics == evaluated.METRICS
    assert [row["seconds"] for row in run.rows("time")] == [30.0, 60.0]


def test_a_run_without_metrics_or_settings_is_read_too(tmp_path):
    folder = evaluated.write_run(tmp_path / "run", [[evaluated.row(1, em=0)]])
    (folder / "metrics.jsonl").unlink()
    (folder / "settings.json").unlink()
    run = FinishedRun.read(str(folder))
    assert (run.settings, run.metrics, run.last) == ({}, [], 0)


def test_a_folder_without_evaluations_is_refused(tmp_path):
    assert evaluation_files(tmp_path) == {}
    with pytest.raises(InputError, match="Expected evaluated questions in .*evaluations, found none"):
        FinishedRun.read(tmp_path)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: expected a JSON object"):
        read_json_lines(path)


@pytest.mark.parametrize(
    ("count", "taken"), [(3, [0, 3, 6]), (1, [0]), (10, list(range(10))), (99, list(range(10))), (0, [])]
)
def test_spread_takes_rows_at_even_distances(count, taken):
    assert spread(list(range(10)), count) == taken
