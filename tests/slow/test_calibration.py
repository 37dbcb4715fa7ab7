"""Routers that are calibrated on a real model, against windows that keep as many tokens."""

import pytest
import torch

from mod_export.calibration.calibrate import calibrate
from mod_export.calibration.measuring import CalibrationPlan
from mod_export.data.text import default_texts, pack
from mod_export.evaluation import run as eval_run
from mod_export.metrics import divergence
from mod_export.model.mod_model import MoDModel
from mod_export.units import UNIT_KINDS
from tests.support import tiny_torch as tiny


@pytest.fixture(scope="module")
def calibrated(smollm2):
    """SmolLM2 with kv units calibrated on a fifth of the packaged text, and held-out sequences [2,
    512].
    """
    base, tokenizer = smollm2
    text, held_out = default_texts()
    text = "\n\n\n".join(document[:1800] for document in text.split("\n\n\n"))
    plan = CalibrationPlan(
        {"kv": range(UNIT_KINDS["kv"].first_layer, 30)}, 0.35, kv_window=32, text=text, rounds=1
    )
    config, routers = calibrate(base, tokenizer, plan)
    model = MoDModel.from_base(base, tokenizer, config, routers)
    yield model, pack(tokenizer, held_out, 512, count=2)
    model.detach()


def test_kv_routers_beat_windows_of_equal_size_on_a_real_model(calibrated):
    """KL on held-out text, where a window has forgotten something, at the K/V that the routers need
    there.
    """
    model, sequences = calibrated
    n_token, skip = sequences.shape[1], 256
    found = eval_run.loss(model, sequences, skip)
    assert found.activation == pytest.approx(0.35, abs=0.08)
    window = round(32 + found.activation * (n_token - 32))
    alone, with_sinks = (
        windowed_kl(model, sequences, skip, window - sinks, sinks) for sinks in (0, 4)
    )
    assert found.kl < with_sinks < alone and found.kl < 0.3 * alone


@torch.inference_mode()
def windowed_kl(model, sequences, skip, window, n_sink):
    """Mean KL where every routed layer keeps the last `window` tokens and the first `n_sink`."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for ids in sequences:
        sinks = (torch.arange(len(ids)) < n_sink)[None]
        windowed = model(
            ids[None], decisions=dict.fromkeys(model.config.routed(), sinks), kv_window=window
        )[0]
        dense = tiny.dense_logits(model, ids[None])[0]
        sums += divergence(dense[skip:], windowed[skip:], ids[skip:])
        count += len(ids) - skip - 1
    return (sums[0] / count).item()
