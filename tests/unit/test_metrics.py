"""Divergence of next-token distributions, of numpy and of torch, and the visible share of K/V."""

import numpy as np
import pytest
import torch

from mod_export.config import MoDConfig
from mod_export.metrics import compare_rows, divergence, mean_without_jumps, visible_share
from tests.support import mod_files


@pytest.fixture
def logits():
    """Of two models, float32 [300, 40] each: more rows than are compared at a time."""
    return np.random.default_rng(0).standard_normal((2, 300, 40)).astype(np.float32)


def softmax(logits):
    e = np.exp(logits.astype(np.float64))
    return e / e.sum(-1, keepdims=True)


def test_divergence_of_arrays(logits):
    dense, other = logits
    p, q = softmax(dense), softmax(other)
    kl, nll_dense, nll_other, same = divergence(dense, other)
    assert kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert nll_dense == nll_other == 0
    assert same == (dense.argmax(-1) == other.argmax(-1)).sum()
    assert divergence(dense, dense + 3) == pytest.approx([0, 0, 0, 300], abs=1e-3)


def test_divergence_counts_positions_that_a_token_follows(logits):
    dense, other = logits
    ids = np.random.default_rng(1).integers(0, 40, 300)
    p, q = softmax(dense[:-1]), softmax(other[:-1])
    expected = [
        (p * np.log(p / q)).sum(),
        -np.log(p[np.arange(299), ids[1:]]).sum(),
        -np.log(q[np.arange(299), ids[1:]]).sum(),
        (dense[:-1].argmax(-1) == other[:-1].argmax(-1)).sum(),
    ]
    assert divergence(dense, other, ids) == pytest.approx(expected, rel=1e-6)
    found = divergence(*map(torch.from_numpy, (dense, other, ids)))
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, rel=1e-5)


def test_rows(logits):
    a, b = logits
    rows = compare_rows(a, b)
    assert rows.shape == (300, 4)
    assert rows[:, 0].sum() == pytest.approx(divergence(a, b)[0])
    assert rows[:, 1].sum() == divergence(a, b)[3]
    assert rows[:, 2] == pytest.approx(np.abs(a - b).mean(-1), rel=1e-5)
    assert rows[:, 3] == pytest.approx(np.abs(a - b).max(-1), rel=1e-5)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_visible_share_counts_what_a_next_token_sees(make):
    """Cells: 10; the first token and the two that a window of 3 leaves to the next token; 1; 10."""
    active = [[True, True, True]] + [[False, False, False]] * 9

    def mod(**layers):
        return mod_files.config({kind: [layer] for kind, layer in layers.items()}, 4, window=3)

    three = mod(kv=1, attn=2, ffn=3)
    assert visible_share(three, make(active), {0: 0, 1: 0, 2: 0, 3: 0}) == 24 / 40
    # a window of 5 leaves four tokens to the next one
    windows = {0: 5, 1: 0, 2: 5, 3: 5}
    assert visible_share(three, make(active), windows) == (4 + 3 + 0 + 4) / 22
    # layers without attention have no K/V of their own
    assert visible_share(mod(kv=2, block=3), make(active)[:, :2], {2: 0}) == 0.3
    assert visible_share(MoDConfig(), make(active)[:, :0], {}) == 1


def test_visible_share_of_heads():
    """Layer 1 has 3 of 4 heads routed: one cell of a sink, and what each window leaves."""
    mod = mod_files.config({"kv": [1]}, 2, heads=4, windows={(1, "kv", 2): 5}, window=8)
    assert [unit.head for unit in mod.routed()] == [1, 2, 3]
    active = np.array([[True] * 3] + [[False] * 3] * 9)
    active[1, 0] = True
    visible = 4 * 10 + 10 + (2 + 7) + (1 + 4) + (1 + 7)
    assert visible_share(mod, active, {0: 0, 1: 0}) == visible / 80


def test_tokens_that_other_experts_computed_do_not_count():
    values = [0.01] * 95 + [3.0] * 5
    assert mean_without_jumps(values, experts=True) == pytest.approx(0.01)
    assert mean_without_jumps(values, experts=False) == pytest.approx(0.1595)
    assert np.isnan(mean_without_jumps([*values, np.nan], experts=True))
