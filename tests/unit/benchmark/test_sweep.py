"""The search for shifts that hit targets."""

import math

import pytest

from mod_export.benchmark import sweep
from mod_export.common.progress import Progress


def test_shifts_that_hit_targets():
    asked = []

    def measure(shift: float) -> dict:
        asked.append(shift)
        return {"shift": shift, "activation": 1 / (1 + math.exp(2 * shift - 1))}

    targets = (1.0, 0.8, 0.5, 0.3, 0.0)
    points = sweep.find_shifts(measure, targets, Progress())
    assert [p["activation"] for p in points] == pytest.approx(
        targets, abs=sweep.ACTIVATION_TOLERANCE
    )
    assert len(asked) < 30


def test_a_target_between_two_steps_gets_the_nearest():
    def measure(shift: float) -> dict:
        return {"shift": shift, "activation": 1.0 if shift < 1 else 0.2}

    points = sweep.find_shifts(measure, (0.5, 0.9), Progress())
    assert [p["activation"] for p in points] == [0.2, 1.0]
