"""Routers from moments: budgets that units share, windows, and one scale."""

import pytest
import torch

from mod_export.calibration.ridge import Ridge
from mod_export.calibration.routers import LOGIT_SPREAD, LayerFit, solve
from mod_export.units import KV, Unit

HEADS = [Unit(3, KV, 0), Unit(3, KV, 1)]


def fit_of(costs, windows=(16,), units=HEADS, n=4000):
    """A layer whose log costs are linear in the inputs.

    costs: of each window, and in it of each unit, the mean and the spread of the log cost.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    y = [mean + spread * x[:, unit] for of_window in costs for unit, (mean, spread) in of_window]
    ridge = Ridge(8, len(y))
    ridge.add(x, torch.stack(y, 1))
    return LayerFit(units, windows, ridge), x


def test_heads_share_one_budget():
    """The head whose keys are dear keeps more, and both together keep the target."""
    fit, x = fit_of([enumerate([(0.0, 1.0), (-1.0, 1.0)])])
    solution = solve([fit], {KV: 0.3}, n_token=1000)
    logits = torch.stack([x @ w + b for w, b in map(solution.routers.get, HEADS)], 1)
    assert logits.std().item() == pytest.approx(LOGIT_SPREAD, rel=0.02)
    cut = logits.flatten().quantile(0.7)
    dear, cheap = (logits >= cut).float().mean(0).tolist()
    assert dear == pytest.approx(0.46, abs=0.02) and cheap == pytest.approx(0.14, abs=0.02)
    assert solution.explained == pytest.approx(dict.fromkeys(HEADS, 1.0), abs=0.01)
    assert solution.windows == dict.fromkeys(HEADS, 16)


def test_each_head_has_the_window_with_the_fewest_cells():
    """Beyond 100 tokens nobody needs the keys of head 0; those of head 1 are needed at any
    distance, so that a window is wasted on them.
    """
    short = [(0.0, 1.0), (0.0, 1.0)]
    wide = [(-6.0, 1.0), (0.0, 1.0)]
    fit, _ = fit_of([enumerate(short), enumerate(wide)], windows=(10, 100))
    solution = solve([fit], {KV: 0.25}, n_token=1000)
    assert solution.windows == {HEADS[0]: 100, HEADS[1]: 10}


def test_layers_without_heads_and_drift():
    """A router that may not follow what drifts has a smaller weight there."""
    unit = Unit(5, KV)
    fit, _ = fit_of([enumerate([(0.0, 1.0)])], units=[unit])
    drift = {unit: torch.eye(8)[:1]}
    free, held = (solve([fit], {KV: 0.5}, 1000, rows) for rows in (None, drift))
    assert held.explained[unit] < 0.6 < 0.99 < free.explained[unit]
