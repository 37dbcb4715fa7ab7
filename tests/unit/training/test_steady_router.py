"""Steady routers: a reparametrisation that keeps the logits, and what training can no longer reach
quickly.
"""

import pytest
import torch

from mod_export.calibration.drift import BUCKET_WEIGHT, CHUNK_TOKENS, ChunkMoments
from mod_export.model.router import Router, rms_norm
from mod_export.training.steady_router import (
    SteadyRouter,
    drift_correction,
    install,
    penalise_drift,
    remove,
)
from tests.support import tiny_torch as tiny

N = 24


@pytest.fixture
def moments():
    """Inputs whose first coordinates move from chunk to chunk."""
    torch.manual_seed(0)
    found = ChunkMoments()
    for _ in range(6):
        x = torch.randn(4 * CHUNK_TOKENS, N) + 0.5
        x[:, :3] += 2 * torch.randn(4, 3).repeat_interleave(CHUNK_TOKENS, 0)
        found.add(x)
    return found


def test_logits_stay_and_come_back_plain(moments):
    router = SteadyRouter(torch.randn(N), torch.tensor([0.3]), 0.5, 1e-5)
    h, (weight, bias) = torch.randn(50, N), router.plain()
    weight, bias, before = weight.clone(), bias.clone(), router(h)
    for steady in (0.0, 10.0, 1000.0):
        reparametrise(router, moments, steady)
        assert torch.allclose(router(h), before, atol=1e-5)
        again, offset = router.plain()
        assert torch.allclose(again, weight, atol=1e-5) and torch.allclose(offset, bias, atol=1e-5)


def test_what_is_lost_is_the_drift_and_not_the_mean(moments):
    router = SteadyRouter(torch.ones(N), torch.tensor([0.3]), 0.5, 1e-5)
    weight, bias = (x.clone() for x in router.plain())
    drift, _ = reparametrise(router, moments, 100.0, remove_drift=True)
    again, offset = router.plain()
    assert (drift @ again).norm() < 0.1 * (drift @ weight).norm()
    assert torch.allclose(
        moments.mean() @ again + offset, moments.mean() @ weight + bias, atol=1e-5
    )
    # what tells tokens apart within a chunk stays
    inside = torch.randn(400, N)
    inside[:, :3] = 0
    assert torch.corrcoef(torch.stack([inside @ again, inside @ weight]))[0, 1] > 0.95


def test_what_was_learnt_is_lost_too_and_the_parameters_stay(moments):
    """A second time, with another mean and another drift than the first; parameters may be in
    pieces then.
    """
    router = SteadyRouter(torch.ones(N), torch.tensor([0.3]), 0.5, 1e-5)
    reparametrise(router, moments, 100.0)
    with torch.no_grad():
        router.weight += 3 * torch.randn(N)
    parameters, h = [p.clone() for p in router.parameters()], torch.randn(50, N)
    weight, bias = (x.clone() for x in router.plain())
    other = ChunkMoments()
    for means in moments.means:
        other.add(means.roll(5) + 1 + torch.randn(CHUNK_TOKENS, N))
    drift, correction = reparametrise(router, other, 30.0, remove_drift=True)
    again, offset = router.plain()
    assert all(map(torch.equal, parameters, router.parameters()))
    assert torch.allclose(again, weight - (drift @ weight) @ correction, atol=1e-5)
    assert torch.allclose(other.mean() @ again + offset, other.mean() @ weight + bias, atol=1e-4)
    assert torch.allclose(router(h), rms_norm(h, 1e-5) @ again + offset, atol=1e-4)


def reparametrise(router, moments, steady, remove_drift=False):
    of_drift = drift_correction(moments.within(), moments.drift(), steady)
    parameters = (router.weight.detach().clone(), router.bias.detach().clone())
    router.reparametrise(parameters, moments.mean(), *of_drift, remove_drift)
    return of_drift


@torch.no_grad()
def test_routers_lose_the_drift_of_the_model_that_skips():
    """One unit never runs, so the other reads what the original model has nowhere."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (4, 4 * CHUNK_TOKENS))
    ids[:, :CHUNK_TOKENS] = torch.randint(
        3, 40, (4, CHUNK_TOKENS)
    )  # all texts begin with the same few tokens
    model = tiny.mod_model({"ffn": [2], "attn": [4]})
    never = model.router((2, "ffn"))
    never.weight.zero_()
    never.bias.fill_(-8)

    def skipping(x, **kwargs):
        return model(x, trace=True, **kwargs)

    def logits():
        return torch.cat([skipping(x[None])[1].logit[0, :, 1] for x in ids]).view(
            4, 4 * CHUNK_TOKENS
        )

    before = logits()
    install(model)
    penalise_drift(model, ids, 10.0, skipping, trained=True)
    after = logits()
    assert isinstance(model.router((4, "attn")), SteadyRouter)
    remove(model)
    assert type(model.router((4, "attn"))) is Router
    assert torch.allclose(logits(), after, atol=1e-4)
    gap, left = (
        (z[:, :CHUNK_TOKENS].mean() - z[:, CHUNK_TOKENS:].mean()).abs().item()
        for z in (before, after)
    )
    assert gap > 0.05 and left < 0.05 * gap, (gap, left)
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-4)
    assert (
        torch.corrcoef(
            torch.stack([before[:, CHUNK_TOKENS:].flatten(), after[:, CHUNK_TOKENS:].flatten()])
        )[0, 1]
        > 0.8
    )


def test_drift_correction_is_the_minimum(moments):
    v, steady = torch.randn(N, dtype=torch.float64), 10.0
    drift, correction = (
        x.double() for x in drift_correction(moments.within(), moments.drift(), steady)
    )
    w = (v - correction.T @ (drift @ v)).requires_grad_(True)
    a = moments.within().double()
    a = a + 0.01 * torch.diag(a.diagonal())
    loss = (w - v) @ a @ (w - v) + steady * (drift @ w).pow(2).sum()
    loss.backward()
    slope = (2 * steady * drift.T @ (drift @ v)).abs().max()
    assert w.grad.abs().max() < 5e-8 * slope and slope > 1e-4


def test_a_step_moves_tokens_and_not_chunks(moments):
    """The same gradient on the logits of all tokens of one chunk moves their mean little, where
    steady is large.
    """
    router = SteadyRouter(torch.randn(N), torch.zeros(1), 0.5, 1e-5)
    x = torch.zeros(N)
    x[0] = 1.0  # along what drifts

    def moved(steady):
        reparametrise(router, moments, steady)
        router.weight.grad = None
        router(x).backward()
        before = router(x)
        with torch.no_grad():
            router.weight -= 0.01 * router.weight.grad
        return (before - router(x)).item()

    assert moved(100.0) < 0.2 * moved(0.0)


def test_moments_match_the_plain_ones(moments):
    chunks = moments.drift()[: 6 * 4]  # the others are the places'
    total = moments.within() + chunks.T @ chunks
    torch.manual_seed(0)
    pieces = []
    for _ in range(6):
        x = torch.randn(4 * CHUNK_TOKENS, N) + 0.5
        x[:, :3] += 2 * torch.randn(4, 3).repeat_interleave(CHUNK_TOKENS, 0)
        pieces.append(x)
    x = torch.cat(pieces)
    assert torch.allclose(total, torch.cov(x.T, correction=0), atol=1e-3)


def test_what_all_texts_have_at_a_place_weighs_most():
    """Places are 1, 1, 2, 4, ... chunks long; what is the same in all of them leaves no weight
    along it.
    """
    torch.manual_seed(0)
    found = ChunkMoments()
    for _ in range(4):
        x = torch.randn(8 * CHUNK_TOKENS, N)
        x[CHUNK_TOKENS:, 1] += 2  # The shift begins with the second chunk, in all texts.
        found.add(x)
    assert found.position_buckets[:8] == [0, 1, 2, 2, 3, 3, 3, 3]
    places = found.drift()[4 * 8 :]
    assert len(places) == 4 and places[:, 1].pow(2).sum().item() == pytest.approx(
        BUCKET_WEIGHT * 0.75, rel=0.1
    )
    drift, correction = drift_correction(found.within(), found.drift(), 1.0)
    w = torch.ones(N) - correction.T @ (drift @ torch.ones(N))
    assert w[1].abs() < 0.1 and w[2:].min() > 0.8
    assert (places @ w).abs().max() < 0.02 * places.sum(1).abs().max()
