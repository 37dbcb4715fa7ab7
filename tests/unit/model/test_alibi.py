"""BLOOM and MPT in our forwards, against transformers' own."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mod_export.errors import UserError
from mod_export.model import alibi, architectures

IDS = torch.randint(3, 100, (2, 300), generator=torch.Generator().manual_seed(7))
PADDED = torch.ones_like(IDS)
PADDED[0, :7] = PADDED[1, -9:] = 0


def build(model_type, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "vocab_size": 100, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, initializer_range=0.15, **sizes | fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("heads", [2, 3, 6])  # of 3 and of 6 some lie between powers of two
@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
@torch.inference_mode()
def test_logits_are_those_of_transformers(model_type, heads):
    base = build(model_type, num_attention_heads=heads)
    expected, padded = base(IDS, output_hidden_states=True), base(IDS, attention_mask=PADDED).logits
    alibi.adapt(base)
    found = base(IDS, output_hidden_states=True)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    seen = PADDED.bool()
    again = base(IDS, attention_mask=PADDED).logits
    torch.testing.assert_close(again[seen], padded[seen], atol=1e-4, rtol=0)
    begun = base(IDS[:, :120], use_cache=True).past_key_values
    rest = base(IDS[:, 120:], past_key_values=begun).logits
    torch.testing.assert_close(rest, expected.logits[:, 120:], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_positions_of_16_bits_are_exact():
    """The bias of a far key would be off by half its distance in bfloat16 otherwise."""
    base = build("mpt", num_attention_heads=2, num_hidden_layers=1)
    alibi.adapt(base)
    late = torch.arange(1001, 1009)[None]
    attention = base.transformer.blocks[0].attn.bfloat16()
    h = torch.randn(1, 8, 48).bfloat16()
    at = [attention(h, position_ids=position)[0] for position in (late - 1001, late)]
    torch.testing.assert_close(*at, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "normed in every layer"),
        ("mpt", {"attn_config": {"alibi": False}}, "its configuration has none"),
    ],
)
def test_what_the_forwards_leave_out_is_refused(model_type, fields, reason):
    with pytest.raises(UserError, match=reason):
        architectures.decoder_layers(build(model_type, num_attention_heads=2, **fields))
