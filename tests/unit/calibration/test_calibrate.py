"""Calibration: targets are met, and bad input is named."""

from dataclasses import replace

import pytest
import torch

from mod_export.calibration.calibrate import calibrate
from mod_export.calibration.measuring import CalibrationPlan, measure
from mod_export.data.text import pack
from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize(
    ("kinds", "target"), [(["kv"], 0.5), (["kv", "ffn"], 0.35), (["attn"], 0.7), (["block"], 0.9)]
)
def test_target_activation_is_met(tokenizer, kinds, target):
    """Within 0.02 on calibration text, measured while the model skips; thresholds are ordinary
    ones.
    """
    layers = [2, 3, 4, 5]
    of_kinds = dict.fromkeys(kinds, layers)
    plan = CalibrationPlan(of_kinds, target, 16, text=TEXT, kv_granularity="head")
    config, routers = calibrate(tiny.base(), tokenizer, plan)
    for kind in kinds:
        unit = config.units[kind]
        assert config.calibration["activation"][kind] == pytest.approx(target, abs=0.02)
        heads = 2 if kind == "kv" else 1
        routed = slice(2 * heads, None)
        assert unit.heads == heads and unit.window == ()
        assert sum(unit.activation[routed]) / 4 / heads == pytest.approx(target, abs=0.02)
        assert not any(unit.threshold[: 2 * heads])
        assert all(1e-5 < p < 1 - 1e-5 for p in unit.threshold[routed])
    assert list(routers) and set(routers) == set(config.routed())
    assert all(torch.isfinite(tensor).all() for router in routers.values() for tensor in router)


def test_heads_share_the_inputs_and_have_costs_of_their_own(tokenizer):
    """One matrix for a layer, whose units are those that each head would have alone."""
    base, sequences = tiny.base(), pack(tokenizer, TEXT, 128, 3)
    plan = CalibrationPlan({"kv": [2, 4]}, kv_window=16, kv_granularity="head")
    (first, second), n = measure(base, sequences, plan), 3 * (int(0.75 * 112) - 4)
    assert first.units == [(2, "kv", 0), (2, "kv", 1)] and second.place == (4, "kv")
    assert first.ridge.n == n and first.ridge.xy.shape == (64, 2)
    assert first.ridge.y[0] != first.ridge.y[1]
    of_one_head = measure(tiny.base(n_head_kv=1), sequences, plan)[0]
    assert of_one_head.units == [(2, "kv")] and of_one_head.ridge.xy.shape == (64, 1)


def test_calibration_text_too_short(tokenizer):
    with pytest.raises(UserError, match="calibration text too short: .* tokens where"):
        calibrate(tiny.base(), tokenizer, CalibrationPlan({"kv": [2]}, text="Far too short."))
    with pytest.raises(
        UserError, match="a window of 600 is too wide for a context of 2048 .*; use --kv-window 512"
    ):
        calibrate(tiny.base(), tokenizer, CalibrationPlan({"kv": [2]}, kv_window=600))


def test_one_decision_for_each_layer(tokenizer):
    """On request, and in a model with one K/V head."""
    plan = CalibrationPlan({"kv": [2, 3]}, kv_window=16, text=TEXT, kv_granularity="layer")
    for base, some in (
        (tiny.base(), plan),
        (tiny.base(n_head_kv=1), replace(plan, kv_granularity="head")),
    ):
        config, routers = calibrate(base, tokenizer, some)
        assert set(routers) == {(2, "kv"), (3, "kv")} and config.version == 1


def test_each_unit_has_a_window_of_its_own(tokenizer, monkeypatch):
    """Of those that there are; the target is met with them."""
    monkeypatch.setattr("mod_export.calibration.measuring.OWN_WINDOWS", (4, 16))
    plan = CalibrationPlan({"kv": [2, 3, 4, 5]}, 0.4, None, text=TEXT, kv_granularity="head")
    config, _ = calibrate(tiny.base(), tokenizer, plan)
    own = {config.window(unit) for unit in config.routed()}
    assert own <= {4, 16} and config.kv_window == max(own) and config.version == 2
    assert config.calibration["activation"]["kv"] == pytest.approx(0.4, abs=0.02)
