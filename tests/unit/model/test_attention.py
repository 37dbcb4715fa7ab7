"""Windows, sinks, softcaps, shared K/V and experts: the forms agree, and equal the plain model."""

import pytest
import torch

from mod_export.errors import UserError
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support import tiny_types
from tests.support.tiny_torch import IDS, assert_close, in_pieces


@pytest.fixture(scope="module", params=tiny_types.FIELDS)
def name(request):
    return request.param


def routed(name, scale_output=False):
    units = tiny_types.UNITS[name]
    return tiny.wrap(tiny_types.base(name), tiny.config(units, scale_output=scale_output), IDS)


@torch.inference_mode()
def test_all_active_is_the_plain_model(name):
    plain = tiny_types.base(name)
    expected = plain(IDS).logits
    model = tiny.wrap(plain, tiny.config(tiny_types.UNITS[name], scale_output=True))
    model.force = "active"
    assert torch.equal(model(IDS), expected)
    assert_close(in_pieces(model, IDS, 5)[0], expected)
    assert_close(model(IDS, logits_to_keep=3), expected[:, -3:])


@torch.inference_mode()
def test_forms_agree_however_the_prompt_is_cut(name):
    model = routed(name, scale_output=True)
    dense, trace = model(IDS, trace=True)
    assert 0.1 < trace.active.float().mean() < 0.9
    for size in (13, 1):
        logits, active, _ = in_pieces(model, IDS, size)
        assert torch.equal(active, trace.active)
        assert_close(logits, dense)
    model.force = "inactive"
    assert_close(in_pieces(model, IDS, 7)[0], model(IDS))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mistral", {"sliding_window": None}),
        ("olmo3", {"sliding_window": 100}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("llama4_text", {"attention_chunk_size": 100}),
        ("llama4_text", {"attn_temperature_tuning": False}),
    ],
)
@torch.inference_mode()
def test_what_the_forms_keep_matters(name, changed):
    difference = tiny_types.base(name)(IDS).logits - tiny_types.base(name, **changed)(IDS).logits
    assert difference.abs().max() > 0.05


@torch.inference_mode()
def test_sinks_matter():
    base = tiny_types.base("gpt_oss")
    expected = base(IDS).logits
    for layer in base.model.layers:
        layer.self_attn.sinks.fill_(-100.0)
    assert (base(IDS).logits - expected).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "unit", "reason"),
    [
        ("gemma4_text", (2, "attn"), "later layers read its keys and values"),
        ("gemma4_text", (3, "kv"), "later layers read its keys and values"),
        ("gemma4_text", (3, "block"), "later layers read its keys and values"),
        ("gemma4_text", (4, "kv"), "it reads the keys and values of layer 2"),
        ("gemma4_text", (5, "block"), "it reads the keys and values of layer 3"),
        ("gemma4_text", (1, "ffn"), "come after the FFN"),
        ("llama4_text", (1, "block"), "their row instead of their position"),
    ],
)
def test_units_that_a_layer_cannot_have_are_named(name, unit, reason):
    layer, kind = unit
    message = f"layer {layer} of {name} cannot have a {kind} unit: .*{reason}"
    with pytest.raises(UserError, match=message):
        tiny.wrap(tiny_types.base(name), tiny.config({kind: [layer]}))
    model = MoDModel.from_base(tiny_types.base(name), None)
    with pytest.raises(UserError, match=message):
        model(IDS, decisions={unit: torch.ones_like(IDS)})
