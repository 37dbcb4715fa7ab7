"""Routing: which decisions scores give, and what a gate does."""

import pytest
import torch

from mod_export.model.routing import DecisionStrategy
from tests.support import tiny_torch as tiny
from tests.support.tiny_torch import IDS, UNITS, assert_close


@torch.inference_mode()
def test_decisions_follow_scores_sinks_and_shift():
    model = tiny.mod_model(UNITS["all"], IDS, p=0.3, sink_tokens=5)
    _, trace = model(IDS, trace=True)
    sink = (torch.arange(48) < 5)[None, :, None]
    assert torch.equal(trace.active, (torch.sigmoid(trace.logit) >= 0.3) | sink)
    assert not torch.equal(trace.active, torch.sigmoid(trace.logit) >= 0.3)
    model.shift = 0.5
    _, shifted = model(IDS, trace=True)
    p = torch.sigmoid(torch.logit(torch.tensor(0.3)) + 0.5)
    assert torch.equal(shifted.active, (torch.sigmoid(shifted.logit) >= p) | sink)
    for force in ("active", "inactive"):
        model.force = force
        _, forced = model(IDS, trace=True)
        assert torch.equal(forced.active, torch.full_like(forced.active, force == "active"))


@pytest.mark.parametrize("kind", ["block", "attn", "ffn"])
@torch.inference_mode()
def test_scaled_gate_multiplies_what_the_unit_adds(kind):
    """In the last layer the gate can be applied by hand: what follows is the FFN (attn only), norm
    and head.
    """
    model = tiny.mod_model({kind: [5]}, IDS, scale_output=True, sink_tokens=3)
    seen = {}
    logits, trace = model(
        IDS,
        trace=True,
        strategy=DecisionStrategy(lambda unit, h, delta: seen.update({unit: (h, delta)})),
    )
    h, delta = seen[5, kind]
    s, active = torch.sigmoid(trace.logit), trace.active
    g = torch.where(s >= 0.5, s, 1.0)
    assert (active & (s < 0.5)).any()
    y = torch.where(active, h + g * delta, h)
    base = model.base
    if kind == "attn":
        last = base.model.layers[5]
        y = y + last.mlp(last.post_attention_layernorm(y))
    assert_close(logits, base.lm_head(base.model.norm(y)))


def test_gradients_reach_only_active_tokens():
    model = tiny.mod_model(UNITS["all"], IDS)
    active = torch.zeros(1, 48, dtype=torch.bool)
    model(IDS, decisions={(3, "block"): active}).sum().backward()
    grads = [p.grad for p in model.base.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)
    assert model.base.model.layers[3].mlp.up_proj.weight.grad.abs().max() == 0
    assert model.base.model.layers[2].mlp.up_proj.weight.grad.abs().max() > 0
