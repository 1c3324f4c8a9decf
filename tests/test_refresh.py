"""When the index is refreshed, and the overlap of retrieved passages."""

import numpy as np
import pytest

from cozyrag.training.index_refresh import RefreshPolicy, mean_overlap


def never():
    raise AssertionError("the probe questions were encoded without need")


def due_steps(policy, total, overlap=never):
    return [done for done in range(total + 1) if policy.due(done=done, total=total, overlap=overlap)]


def test_the_policy_phase_never_refreshes_within_a_phase():
    assert due_steps(RefreshPolicy("phase", 2, 0.8), 10) == []


def test_the_policy_steps_refreshes_between_the_first_and_the_last_step():
    assert due_steps(RefreshPolicy("steps", 3, 0.8), 9) == [3, 6]
    assert due_steps(RefreshPolicy("steps", 3, 0.8), 10) == [3, 6, 9]
    assert due_steps(RefreshPolicy("steps", 20, 0.8), 10) == []


def test_the_policy_drift_refreshes_below_the_overlap():
    found = iter([0.9, 0.8, 0.79])
    assert due_steps(RefreshPolicy("drift", 2, 0.8), 8, overlap=lambda: next(found)) == [6]
    assert next(found, None) is None


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="phase, steps, drift"):
        RefreshPolicy("always", 1, 0.5)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([[1, 2], [3, 4]], [[2, 1], [4, 3]], 1.0),  # another order is the same set
        ([[1, 2], [3, 4]], [[2, 9], [8, 9]], 0.25),
        ([[1, 2, 3, 4]], [[1, 2, 3, 9]], 0.75),
    ],
)
def test_overlap_is_the_mean_share_of_unchanged_passages(before, now, expected):
    assert mean_overlap(np.array(before), np.array(now)) == pytest.approx(expected)
