"""Relaxed decisions: hard ones in the limit, gradients against finite differences, attention in
chunks.
"""

import copy

import pytest
import torch

from mod_export.model.router import threshold_logit
from mod_export.model.routing import TopK, among_top
from mod_export.training import relaxation
from mod_export.training.relaxation import Relaxation, RelaxedDecisions, relaxed_attention
from mod_export.training.student import LossWeights, Student
from tests.support import tiny_torch as tiny
from tests.support import tiny_types
from tests.support.tiny_torch import IDS, UNITS, assert_close

HARD = Relaxation(temperature=1e-4, noise=False)
SMOOTH = Relaxation(temperature=1.0, noise=False)


@pytest.mark.parametrize("scale_output", [False, True], ids=["hard", "scaled"])
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS.keys())
def test_without_noise_and_at_low_temperature_decisions_are_the_hard_ones(units, scale_output):
    model = tiny.mod_model(units, IDS, scale_output=scale_output)
    expected, trace = model(IDS, trace=True)
    with relaxed_attention(model.base):
        assert_close(model(IDS), expected)  # no relaxed decisions asked for
        logits, relaxed_trace = model(IDS, trace=True, strategy=RelaxedDecisions(HARD))
    assert torch.equal(relaxed_trace.active, trace.active)
    assert_close(logits, expected)
    assert_close(model(IDS), expected)  # the attention is the former one


@pytest.mark.parametrize(
    "units", [UNITS["kv"], UNITS["kv+attn+ffn"], UNITS["kv+block"]], ids=["kv", "three", "block"]
)
def test_chunks_of_queries_change_nothing(units, monkeypatch):
    model = tiny.mod_model(units, IDS)
    found = []
    with relaxed_attention(model.base):
        for chunk in (256, 7, 1):
            monkeypatch.setattr(relaxation, "CHUNK_QUERIES", chunk)
            found.append(model(IDS, strategy=RelaxedDecisions(SMOOTH)))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert (found[0] - model(IDS)).abs().max() > 1e-2  # smooth decisions are others than hard ones


def test_heads_have_keys_and_windows_of_their_own(monkeypatch):
    """Hard decisions are the limit, in chunks too; each router has a gradient, and a head that is
    not routed keeps all its keys.
    """
    windows = {(2, "kv", 0): 8, (4, "kv", 0): 3, (4, "kv", 1): 5}
    some = {"heads": 2, "left_out": [(2, "kv", 1)], "windows": windows}
    model = tiny.mod_model({"kv": [2, 4]}, IDS, **some)
    found, hard = [], model(IDS)
    with relaxed_attention(model.base):
        assert_close(model(IDS, strategy=RelaxedDecisions(HARD)), hard)
        for chunk in (256, 7):
            monkeypatch.setattr(relaxation, "CHUNK_QUERIES", chunk)
            found.append(model(IDS, strategy=RelaxedDecisions(SMOOTH)))
    assert_close(found[1], found[0])
    assert (found[0] - hard).abs().max() > 1e-2
    found[0].sum().backward()
    assert len(model.routers) == 3
    assert all(router.bias.grad.abs() > 0 for router in model.routers.values())


@pytest.mark.parametrize("name", tiny_types.FIELDS)
def test_windows_sinks_softcaps_and_shared_kv_are_kept(name, monkeypatch):
    """Where all keys weigh 1 the model is the plain one; hard decisions are the limit as well."""
    monkeypatch.setattr(relaxation, "CHUNK_QUERIES", 20)
    plain = tiny_types.base(name)
    with torch.inference_mode():
        expected = plain(IDS).logits
    model = tiny.wrap(plain, tiny.config(tiny_types.UNITS[name]), IDS)
    hard = model(IDS)
    with relaxed_attention(model.base):
        assert_close(model(IDS, strategy=RelaxedDecisions(HARD)), hard)
        soft = model(IDS, strategy=RelaxedDecisions(SMOOTH))
        assert (soft - hard).abs().max() > 1e-2
        soft.sum().backward()
        for router in model.routers.values():
            assert router.bias.grad.abs() > 0
            router.bias.data += 1e4
        all_seen = model(IDS, strategy=RelaxedDecisions(Relaxation()))
    torch.testing.assert_close(all_seen, expected, atol=1e-5, rtol=0)


def loss_of(model, relaxation, direction, **kwargs):
    return (model(IDS, strategy=RelaxedDecisions(relaxation, **kwargs)) * direction).sum()


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_have_the_gradient_of_finite_differences(heads):
    model = tiny.mod_model({"kv": [2, 4]}, IDS, heads=heads)
    model.base.double()
    direction = torch.randn(
        1, IDS.shape[1], 300, generator=torch.Generator().manual_seed(1)
    ).double()
    bias, step = model.router(model.config.routed()[0]).bias, 3e-2
    with relaxed_attention(model.base):
        loss_of(model, SMOOTH, direction).backward()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                bias += sign * step
                ends.append(loss_of(model, SMOOTH, direction).item())
                bias -= sign * step
    assert bias.grad.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2)
    assert abs(bias.grad.item()) > 1e-2


def test_skipped_tokens_have_the_gradient_of_what_they_miss():
    """ffn: dL/dz of a token is <dL/d(unit's output), delta> sigmoid'(z), active or not."""
    model, seen = tiny.mod_model({"ffn": [5]}, IDS), {}

    def on_unit(unit, h, delta):
        seen["delta"] = delta
        h.register_hook(lambda gradient: seen.setdefault("residual", gradient))

    with relaxed_attention(model.base):
        logits, trace = model(IDS, trace=True, strategy=RelaxedDecisions(HARD, on_unit=on_unit))
        trace.logit.retain_grad()
        (logits[..., 7].sum()).backward()
    out_gradient = last_hidden_gradient(model, 7)
    z = trace.logit.detach()[..., 0] - threshold_logit(0.5)
    slope = torch.sigmoid(z) * (1 - torch.sigmoid(z))
    expected = (out_gradient * seen["delta"]).sum(-1) * slope
    bias = model.routers["5_ffn"].bias.grad
    assert bias.item() == pytest.approx(expected.sum().item(), rel=1e-3)
    skipped = ~trace.active[..., 0]
    assert 0 < skipped.sum() < skipped.numel() and expected[skipped].abs().sum() > 0


def last_hidden_gradient(model, column):
    """dL/d(residual stream after the last layer) for L = the sum of one column of the logits."""
    with torch.no_grad():
        hidden = model(IDS, trace=True, output_hidden_states=True)
    last = {}

    def keep(_module, args):
        last["h"] = args[0].detach().requires_grad_()
        return (last["h"],)

    handle = model.base.model.norm.register_forward_pre_hook(keep)
    model(IDS)[..., column].sum().backward(inputs=[last["h"]])
    handle.remove()
    assert len(hidden[1].hidden) == 7
    return last["h"].grad


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny.mod_model(UNITS["kv"], IDS),
        lambda: tiny.mod_model(UNITS["all"], IDS),
        lambda: tiny.wrap(
            tiny_types.base("gemma4_text"), tiny.config(tiny_types.UNITS["gemma4_text"]), IDS
        ),
    ],
    ids=["kv", "all", "shared K/V"],
)
def test_layers_computed_again_give_the_same_gradients(model):
    model, found = model(), []
    direction = torch.randn(1, IDS.shape[1], 300, generator=torch.Generator().manual_seed(1))
    with relaxed_attention(model.base):
        for recompute in (False, True):
            model.zero_grad()
            torch.manual_seed(3)  # the noise is part of what is computed again
            loss = loss_of(model, Relaxation(), direction, recompute=recompute)
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_key_is_drawn_with_the_probability_that_its_score_says():
    torch.manual_seed(0)
    z = torch.tensor([-2.0, 0.0, 1.5]).repeat(20000, 1)
    weight = Relaxation(temperature=0.3).key(z, torch.zeros_like(z, dtype=torch.bool)).exp()
    share = (weight > 0.5).float().mean(0)
    torch.testing.assert_close(share, torch.sigmoid(z[0]), atol=0.02, rtol=0)


def test_top_k_runs_as_many_tokens_of_each_sequence_as_it_says():
    model = tiny.mod_model({"attn": [2, 3]}, IDS, sink_tokens=0)
    model.strategy = TopK({"attn": 0.25})
    _, trace = model(torch.cat((IDS, IDS.flip(1))), trace=True)
    assert trace.active.sum(1).tolist() == [[12, 12], [12, 12]]
    chosen = trace.logit.masked_fill(~trace.active, torch.inf).amin(1)
    assert bool((chosen >= trace.logit.masked_fill(trace.active, -torch.inf).amax(1)).all())


@pytest.mark.parametrize(
    "units", [UNITS["kv"], UNITS["kv+attn+ffn"], UNITS["kv+block"]], ids=["kv", "three", "block"]
)
def test_top_k_is_relaxed_around_its_own_cut(units):
    model = tiny.mod_model(units, IDS)
    for router in model.routers.values():
        router.bias.data += 20  # the threshold says nothing here
    model.strategy = TopK(dict.fromkeys(units, 0.25))
    expected, trace = model(IDS, trace=True)
    with relaxed_attention(model.base):
        # tokens may lie as close to the cut as they like
        logits, relaxed_trace = model(
            IDS,
            trace=True,
            strategy=RelaxedDecisions(Relaxation(temperature=1e-7, noise=False), model.strategy),
        )
    assert torch.equal(relaxed_trace.active, trace.active)
    assert_close(logits, expected)
    model.strategy = TopK(dict.fromkeys(units, 1.0))
    assert bool(model(IDS, trace=True)[1].active.all())


def test_the_cut_of_top_k_moves_with_the_logits_so_that_as_many_run():
    torch.manual_seed(0)
    logit, worth = torch.randn(2, 40, requires_grad=True), torch.rand(2, 40)
    cut = among_top(logit, 0.3)[1]
    (number,) = torch.autograd.grad(torch.sigmoid(logit - cut).sum(), logit)
    torch.testing.assert_close(number, torch.zeros_like(number), atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(
        (worth * torch.sigmoid(logit - among_top(logit, 0.3)[1])).sum(), logit
    )
    torch.testing.assert_close(grad.sum(-1), torch.zeros(2), atol=1e-6, rtol=0)
    assert bool(
        (grad.gather(-1, worth.argmax(-1, keepdim=True)) > 0).all()
    )  # what counts is worth above the others'
    assert bool((grad.gather(-1, worth.argmin(-1, keepdim=True)) < 0).all())


def test_relaxed_decisions_need_their_attention():
    with pytest.raises(ValueError, match="with relaxed_attention"):
        tiny.mod_model({"kv": [2]}, IDS)(IDS, strategy=RelaxedDecisions(Relaxation()))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_group_offset_has_the_gradient_of_all_logits_of_a_group(recompute):
    units = {"kv": [2, 4], "attn": [3], "ffn": [3, 5]}
    model = tiny.mod_model(units, IDS)
    teacher = copy.deepcopy(tiny.base()).requires_grad_(False)
    routed = model.config.routed()
    groups = [[i for i, unit in enumerate(routed) if unit[1] == kind] for kind in units]
    student = Student(model, teacher, groups, LossWeights(), SMOOTH, recompute)
    counts, shares = torch.ones_like(IDS, dtype=torch.bool), torch.tensor([[0.5, 0.25]] * 3)
    with relaxed_attention(model.base):
        loss, seen = student(IDS, counts, counts, torch.zeros(3), shares)
        loss.backward()
    expected = [sum(model.router(routed[i]).bias.grad.item() for i in group) for group in groups]
    assert min(map(abs, expected)) > 1e-6
    assert student.group_offset.grad.tolist() == pytest.approx(expected, rel=1e-4)
    for quantile, group in zip(seen["quantile"], groups, strict=True):
        for unit in (routed[i] for i in group):  # thresholds moved to a quantile give its share
            router = model.router(unit)
            router.threshold = torch.sigmoid(
                threshold_logit(router.threshold) + quantile[1].double()
            ).item()
    with relaxed_attention(model.base):
        # what later units see has changed with the decisions of earlier ones
        seen = student(IDS, counts, counts, torch.zeros(3), shares)[1]
        assert seen["activation"][0] == pytest.approx(0.25, abs=0.1)


def test_activation_is_that_of_fresh_tokens():
    model = tiny.mod_model({"ffn": [2]}, IDS, sink_tokens=0)
    student = Student(model, None, [[0]], LossWeights())
    everything, shares = torch.ones_like(IDS, dtype=torch.bool), torch.tensor([[0.5, 0.25]])
    fresh = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    with relaxed_attention(model.base):
        whole, some, none = (
            student(IDS, everything, mask, torch.zeros(1), shares)[1]
            for mask in (everything, fresh, ~everything)
        )
        _, trace = model(IDS, trace=True, strategy=RelaxedDecisions(Relaxation(noise=False)))
    assert some["activation"].item() == pytest.approx(trace.active[fresh].float().mean().item())
    assert (
        none["activation"] == whole["activation"] != some["activation"]
    )  # where no token is fresh, all count
    z = (trace.logit - threshold_logit(model.router((2, "ffn")).threshold))[fresh]
    for quantile, share in zip(some["quantile"][0].tolist(), shares[0].tolist(), strict=True):
        assert (z >= quantile).float().mean().item() == pytest.approx(share, abs=1 / len(z))
