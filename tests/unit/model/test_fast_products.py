"""Products by oneDNN are those of torch, and what does not suit them is left to torch."""

import pytest
import torch
import torch.nn.functional as F

from mod_export.model import fast_products
from mod_export.model.fast_products import FastProducts

T = 300  # more than one chunk of queries


def tensors(dtype, heads=4, heads_kv=2):
    torch.manual_seed(5)
    shapes = ((heads, 16), (heads_kv, 16), (heads_kv, 24))
    return [torch.randn(1, n, T, width).to(dtype) for n, width in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "causal", "heads", "later keys", "added"])
@torch.no_grad()
def test_attention(dtype, mask):
    query, key, value = tensors(dtype)
    causal = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    some = torch.rand(1, 4, T, T) > 0.5
    diagonal = torch.eye(T, dtype=torch.bool)
    more = {
        None: {},
        "causal": {"is_causal": True, "scale": 0.3},
        "heads": {"attn_mask": some & causal | diagonal},
        "later keys": {"attn_mask": some[:, :1] | diagonal},
        "added": {"attn_mask": torch.randn(1, 1, T, T).to(dtype)},
    }[mask]
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **more)
    with FastProducts():
        found = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **more)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_linear_modules(monkeypatch):
    calls = []
    if (linear := fast_products._LINEAR) is None:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(fast_products, "_LINEAR", lambda *a: calls.append(1) or linear(*a))
    for bias in (True, False):
        module, x = torch.nn.Linear(48, 32, bias=bias), torch.randn(2, 40, 48)
        with FastProducts():
            found = module(x)
        torch.testing.assert_close(found, module(x), atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    with FastProducts():
        module(x[:, :1])  # few tokens, another type, and a graph for gradients
        module.bfloat16()(x.bfloat16())
        with torch.enable_grad():
            module.float()(x).sum().backward()
    assert len(calls) == 2
