"""Costs against what they claim to be."""

import pytest
import torch

from mod_export.calibration.costs import (
    KEY_SCORES,
    CostMeter,
    attention,
    output_weight,
    received,
    value_norm,
)
from mod_export.errors import UserError
from mod_export.model import architectures
from tests.support import tiny_torch as tiny
from tests.support import tiny_types
from tests.support.gguf_models import random_model
from tests.support.model_types import HYBRIDS


def seen_of(base, ids, layer):
    """What the meter sees of one layer, and the gradients there."""
    meter = CostMeter(base, windows=(8,))
    with meter.observer.prepared(), torch.enable_grad():
        inputs, grad = meter._forward(ids)
        for index in range(len(inputs) - 1, layer - 1, -1):
            seen, grads, grad = meter._layer(index, inputs[index], grad)
    return seen, grads


@pytest.mark.parametrize("name", tiny_types.FIELDS)
def test_recomputed_attention_is_the_models_own(name):
    """With windows, chunks, softcaps and sinks."""
    base = tiny_types.base(name)
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(1))
    base.set_attn_implementation("eager")
    found = base(ids[None], output_attentions=True).attentions
    for layer in (2, 5):  # one slides where any does, one does not
        seen, _ = seen_of(base, ids, layer)
        torch.testing.assert_close(
            attention(seen, slice(0, 70)), found[layer][0], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4_text", "gemma4_text", "qwen3_next"])
def test_layer_by_layer_gradient_is_that_of_the_whole_graph(name):
    """Layer 1 of Gemma 4 also reaches the logits through the K/V that the last layers read.

    Behind layer 1 of Qwen3-Next are layers with a recurrent state.
    """
    base = random_model(*HYBRIDS[name]) if name in HYBRIDS else tiny_types.base(name)
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2))
    _, (attn_grad, ffn_grad, _) = seen_of(base, ids, layer=1)
    kept = {}

    def keep(name):
        def hook(_module, _args, out):
            value = out[0] if isinstance(out, tuple) else out
            kept[name] = value.requires_grad_(True)
            value.retain_grad()

        return hook

    part = architectures.decoder_layers(base)[1]
    hooks = [
        part.attn_out.register_forward_hook(keep("attn")),
        part.ffn_out.register_forward_hook(keep("ffn")),
    ]
    log_p = base(ids[None]).logits[0].log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    log_p.gather(1, drawn).sum().backward()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(attn_grad, kept["attn"].grad[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ffn_grad, kept["ffn"].grad.view_as(ffn_grad), atol=1e-4, rtol=1e-3)


def test_kv_gradient_is_the_effect_of_hiding_one_key():
    """Hide one key from one query for real: the attention output moves by the δ whose product with
    g is the score.
    """
    base = tiny.base()
    ids = torch.randint(0, 256, (30,), generator=torch.Generator().manual_seed(3))
    seen, grads = seen_of(base, ids, layer=2)
    key, query = 4, 29
    a = attention(seen, slice(0, 30))
    hidden = a.clone()
    hidden[:, query, key] = 0
    hidden = hidden / hidden.sum(-1, keepdim=True)
    moved = (hidden @ seen.value - a @ seen.value)[:, query]
    expected = (grads[2][:, query] * moved).sum().pow(2)
    scores = {"gradient": KEY_SCORES["gradient"]}
    costs = received(seen, scores, windows=(query - key,), grads=grads)
    cost = costs["gradient"][0, 0, key]  # this query only is so far
    torch.testing.assert_close(cost, expected, rtol=1e-3, atol=1e-9)


def test_the_meter_leaves_the_model_as_it_was():
    base = tiny.base()
    ids = torch.randint(0, 256, (1, 50))
    before = base(ids).logits
    list(
        CostMeter(base, windows=(8,)).measure(
            ids[0], {(1, "kv"): ["gradient"], (2, "ffn"): ["size"]}
        )
    )
    assert torch.equal(base(ids).logits, before)
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(UserError, match="unknown score 'cosine' for kv"):
        list(CostMeter(base, windows=(8,)).measure(ids[0], {(1, "kv"): ["cosine"]}))


@pytest.mark.parametrize("name", KEY_SCORES)
def test_costs_of_heads_and_windows_in_one_pass(name):
    """Each is what a plain loop over the keys finds in the heads that share the K/V head."""
    base = tiny.base(n_head=4, n_head_kv=2)
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5))
    windows, weight = (3, 11), output_weight(architectures.decoder_layers(base)[2].attn)
    wanted = {(2, "kv", head): [name] for head in range(2)}
    found = dict(CostMeter(base, windows).measure(ids, wanted))
    of_layer = dict(CostMeter(base, windows).measure(ids, {(2, "kv"): [name]}))[2, "kv"][1][name]
    seen, grads = seen_of(base, ids, layer=2)
    a, value = attention(seen, slice(0, 40)), value_norm(seen.value, weight)
    gap = (grads[2] * seen.mixed).sum(-1, keepdim=True) - grads[2] @ seen.value.transpose(1, 2)
    lost = a / (1 - a).clamp(min=1e-3) * gap
    for head in range(2):
        heads = slice(2 * head, 2 * head + 2)
        for number, window in enumerate(windows):
            cost = found[2, "kv", head][1][name][number]
            for key in (0, 7, 39 - window):
                far = slice(key + window, None)
                if name == "gradient":
                    expected = lost[heads, far, key].sum(0).pow(2).mean()
                else:
                    size = a[heads, far, key] * value[heads, key, None]
                    expected = (size / seen.h[far].norm(dim=-1)).max()
                torch.testing.assert_close(cost[key], expected, rtol=1e-3, atol=1e-9)
            assert (cost[40 - window :] == 0).all()  # no later query is so far
    if name == "max_relative":
        apart = torch.stack([found[2, "kv", head][1][name] for head in range(2)])
        assert torch.equal(apart.amax(0), of_layer)
