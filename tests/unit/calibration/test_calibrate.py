"""Calibration: targets are met, and bad input is named."""

import pytest
import torch

from mod_export.calibration.calibrate import CalibrationPlan, calibrate
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
    plan = CalibrationPlan({kind: [2, 3, 4, 5] for kind in kinds}, target, kv_window=16, text=TEXT)
    config, routers = calibrate(tiny.base(), tokenizer, plan)
    for kind in kinds:
        unit = config.units[kind]
        assert config.calibration["activation"][kind] == pytest.approx(target, abs=0.02)
        assert sum(unit.activation[2:]) / 4 == pytest.approx(target, abs=0.02)
        assert unit.threshold[:2] == (0, 0) and all(1e-5 < p < 1 - 1e-5 for p in unit.threshold[2:])
    assert set(routers) == {(layer, kind) for kind in kinds for layer in (2, 3, 4, 5)}
    assert all(torch.isfinite(tensor).all() for router in routers.values() for tensor in router)


def test_calibration_text_too_short(tokenizer):
    with pytest.raises(UserError, match="calibration text too short: .* tokens where"):
        calibrate(tiny.base(), tokenizer, CalibrationPlan({"kv": [2]}, text="Far too short."))
    with pytest.raises(
        UserError, match="a window of 600 is too wide for a context of 2048 .*; use --kv-window 512"
    ):
        calibrate(tiny.base(), tokenizer, CalibrationPlan({"kv": [2]}, kv_window=600))
