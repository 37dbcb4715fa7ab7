"""The statistics of measurements that take turns."""

import numpy as np
import pytest

from mod_export.benchmark import rows as bench_rows


def test_ratio_is_free_of_drift_and_of_spikes():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 8)[:, None] * np.ones(
        (8, 5)
    )  # the machine becomes slower from repeat to repeat
    reference = drift * [1, 2, 3, 4, 5] * rng.normal(1, 0.01, (8, 5))
    times = drift * [1, 2, 3, 4, 5] * rng.normal(1, 0.01, (8, 5)) * 1.1
    times[3, 2] *= 10
    found = bench_rows.ratio(times, reference)
    assert found["median"] == pytest.approx(1.1, abs=0.01)
    assert 1.08 < found["q1"] < found["median"] < found["q3"] < 1.12
    assert found["totals"] == pytest.approx(1.1, abs=0.03)


def test_long_turns_count_for_more():
    times, reference = np.array([[1.0, 1.0, 200.0]]), np.array([[1.0, 1.0, 100.0]])
    assert bench_rows.ratio(times, reference)["median"] == pytest.approx(2, abs=0.05)
    assert bench_rows.total(np.array([[1.0, 5.0], [2.0, 5.0], [9.0, 5.0]])) == 7


def test_efficiency():
    ceiling, floor = np.full((4, 3), 10.0), np.full((4, 3), 2.0)
    a = np.tile([0.25, 0.5, 0.75], (4, 1))
    exact = bench_rows.efficiency(ceiling, 2 + 8 * a, floor, a)
    assert exact == pytest.approx({"median": 1, "q1": 1, "q3": 1, "totals": 1})
    half = bench_rows.efficiency(ceiling, 6 + 4 * a, floor, a)
    assert half == pytest.approx({"median": 0.5, "q1": 0.5, "q3": 0.5, "totals": 0.5})
    assert bench_rows.efficiency(ceiling, ceiling, floor, np.ones((4, 3))) is None
    assert bench_rows.efficiency(floor, floor, floor, a) is None
