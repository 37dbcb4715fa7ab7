"""Calibration: costs against what they claim to be, fits against textbook solutions, targets met,
baselines beaten.
"""

import pytest
import torch

from mod_export.calibration.calibrate import CalibrationPlan, calibrate
from mod_export.calibration.costs import KEY_SCORES, CostMeter, attention, received
from mod_export.calibration.drift import CHUNK_TOKENS, ChunkMoments
from mod_export.calibration.ridge import Ridge
from mod_export.data.text import pack, read_texts
from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def seen_of(base, ids, layer):
    """What the meter sees of one layer, and the gradients there."""
    meter = CostMeter(base, kv_window=8)
    with meter.observer.prepared(), torch.enable_grad():
        inputs, grad = meter._forward(ids)
        for index in range(len(inputs) - 1, layer - 1, -1):
            seen, grads, grad = meter._layer(index, inputs[index], grad)
    return seen, grads


def test_recomputed_attention_is_the_models_own():
    base = tiny.base()
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(1))
    seen, _ = seen_of(base, ids, layer=3)
    base.set_attn_implementation("eager")
    expected = base(ids[None], output_attentions=True).attentions[3][0]
    torch.testing.assert_close(attention(seen, slice(0, 70)), expected, atol=1e-6, rtol=1e-5)


def test_recomputed_attention_with_softcap_and_sliding_window():
    """Gemma 2 has both, and an attention function without a causal mask of its own: it was once
    given none.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    base = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=20,
            attn_logit_softcapping=2.0,
            initializer_range=0.2,
            pad_token_id=0,
            attn_implementation="eager",
        )
    ).eval()
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(1))
    for layer in (2, 3):  # one slides, one does not
        seen, _ = seen_of(base, ids, layer)
        expected = base(ids[None], output_attentions=True).attentions[layer][0]
        torch.testing.assert_close(attention(seen, slice(0, 70)), expected, atol=1e-6, rtol=1e-5)


def test_layer_by_layer_gradient_is_that_of_the_whole_graph():
    base = tiny.base()
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2))
    _, (attn_grad, ffn_grad, _) = seen_of(base, ids, layer=1)
    kept = {}

    def keep(name):
        def hook(_module, _args, out):
            value = out[0] if isinstance(out, tuple) else out
            kept[name] = value.requires_grad_(True)
            value.retain_grad()

        return hook

    layer = base.model.layers[1]
    hooks = [
        layer.self_attn.register_forward_hook(keep("attn")),
        layer.mlp.register_forward_hook(keep("ffn")),
    ]
    log_p = base(ids[None]).logits[0].log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    log_p.gather(1, drawn).sum().backward()
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(attn_grad, kept["attn"].grad[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ffn_grad, kept["ffn"].grad[0], atol=1e-4, rtol=1e-3)


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
    cost = received(seen, {"gradient": KEY_SCORES["gradient"]}, window=query - key, grads=grads)[
        "gradient"
    ][key]  # this query only is so far
    torch.testing.assert_close(cost, expected, rtol=1e-3, atol=1e-9)


def test_the_meter_leaves_the_model_as_it_was():
    base = tiny.base()
    ids = torch.randint(0, 256, (1, 50))
    before = base(ids).logits
    list(
        CostMeter(base, kv_window=8).measure(
            ids[0], {(1, "kv"): ["gradient"], (2, "ffn"): ["size"]}
        )
    )
    assert torch.equal(base(ids).logits, before)
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(UserError, match="unknown score 'cosine' for kv"):
        list(CostMeter(base, kv_window=8).measure(ids[0], {(1, "kv"): ["cosine"]}))


def test_ridge_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) * torch.linspace(
        0.1, 30, 12
    )  # dimensions of very different size
    y = x @ torch.randn(12, generator=generator) + 3 + torch.randn(400, generator=generator)
    fit = Ridge(12)
    fit.add(x[:150], y[:150])
    fit.add(x[150:], y[150:])
    weight, bias = fit.solve(penalty=0)
    ones = torch.cat((x, torch.ones(400, 1)), dim=1).double()
    expected = torch.linalg.lstsq(ones, y[:, None].double()).solution[:, 0]
    torch.testing.assert_close(torch.cat((weight, bias)).double(), expected, rtol=1e-3, atol=1e-3)
    mean, variance, explained = fit.spread(weight, bias)
    z = x @ weight + bias
    assert mean == pytest.approx(z.mean().item(), rel=1e-3) and variance == pytest.approx(
        z.var().item(), rel=1e-2
    )
    assert explained == pytest.approx(1 - ((y - z).var() / y.var()).item(), abs=1e-3)


def test_ridge_tells_less_of_what_drifts():
    """The first input moves with the chunk, and the target with it: told apart within a chunk by
    the second alone.
    """
    torch.manual_seed(0)
    fit, seen = Ridge(6), ChunkMoments()
    for _ in range(8):
        x = torch.randn(CHUNK_TOKENS, 6)
        x[:, 0] = 0.1 * x[:, 0] + torch.randn(1)
        fit.add(x, x[:, 0] + x[:, 1])
        seen.add(x)
    drift = seen.drift()
    plain, corrected = fit.solve(1e-6)[0], fit.solve(1e-6, 10**0.5 * drift)[0]
    assert torch.allclose(plain, torch.tensor([1.0, 1, 0, 0, 0, 0]), atol=1e-3)
    assert corrected[0].abs() < 0.15 and corrected[1] == pytest.approx(1.0, abs=0.1)
    assert (drift @ corrected).pow(2).sum() < 0.05 * (drift @ plain).pow(2).sum()


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


def test_texts_are_packed_whole_and_named_when_wrong(tokenizer, tmp_path):
    ids = pack(tokenizer, "ab\n\n\ncd", 8)
    assert tokenizer.decode(ids[0]) == "ab\n\ncd\n\n"
    with pytest.raises(UserError, match="text too short"):
        pack(tokenizer, "ab", 64)
    with pytest.raises(UserError, match="missing.txt"):
        read_texts([tmp_path / "missing.txt"])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.txt is not UTF-8"):
        read_texts([tmp_path / "binary.txt"])
