"""Layers with a recurrent state: the forms agree, batches, forks, refusals, conversion."""

import pytest
import torch

from mod_export.adapter import base_identity
from mod_export.calibration.calibrate import calibrate
from mod_export.calibration.measuring import CalibrationPlan
from mod_export.errors import UserError
from mod_export.formats import hf_directory
from mod_export.model import architectures, loading
from mod_export.model.lora import inject_lora
from mod_export.model.mod_model import MoDModel
from mod_export.model.role_check import check_roles
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer
from tests.support.gguf_models import random_model
from tests.support.model_types import HYBRIDS, units

IDS = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(7))
NAMES = ("qwen3_next", "lfm2_moe", "granitemoehybrid", "falcon_h1", "nemotron_h")


@pytest.fixture(scope="module", params=NAMES)
def hybrid(request):
    """A model with units of all kinds that its layers can have, FFNs of recurrent layers too."""
    base = random_model(*HYBRIDS[request.param])
    config = tiny.config(units(base, "kv+attn+ffn"), base.config.num_hidden_layers)
    return tiny.wrap(base, config, IDS)


@torch.inference_mode()
def test_a_state_goes_on_where_the_tokens_before_ended(hybrid):
    dense, trace = hybrid(IDS, trace=True)
    assert (dense - tiny.dense_logits(hybrid, IDS)).abs().max() > 1e-2
    for size in (40, 7, 1):
        logits, active, cache = tiny.in_pieces(hybrid, IDS, size)
        assert torch.equal(active, trace.active)
        torch.testing.assert_close(logits, dense, atol=1e-4, rtol=0)
    attends = architectures.layer_windows(hybrid.base)
    assert [layer for layer, counts in enumerate(cache.counts()) if sum(counts)] == list(attends)


@torch.inference_mode()
def test_forks_and_generation_go_on_by_themselves(hybrid):
    """A state is written to in place."""
    cache = hybrid.new_cache()
    hybrid.step(IDS[:, :20], cache)
    for tokens in (IDS[:, 20:], IDS[:, :9], IDS[:, 20:]):
        whole = hybrid(torch.cat((IDS[:, :20], tokens), 1))[:, 20:]
        torch.testing.assert_close(hybrid.step(tokens, cache.fork()), whole, atol=1e-4, rtol=0)
    with pytest.raises(NotImplementedError, match="fork it"):
        cache.crop(-1)
    found = hybrid.generate(IDS[:, :20], 5, stop_ids=(), chunk=7)
    for end in range(20, 25):
        assert found[0, end] == hybrid(found[:, :end])[0, -1].argmax()


@torch.inference_mode()
def test_a_padded_batch_is_its_sequences(hybrid):
    """Padding on the left goes through the recurrent layers and leaves nothing in their state."""
    lengths = (40, 23)
    ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 40 - n :], mask[row, 40 - n :] = IDS[0, :n], 1
    together = hybrid(ids, mask)
    for row, n in enumerate(lengths):
        alone = hybrid(IDS[:, :n])[0]
        torch.testing.assert_close(together[row, 40 - n :], alone, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_directory_keeps_the_routers(hybrid, tmp_path):
    """Transformers saves the weights of Nemotron-H under other names."""
    hybrid.tokenizer = byte_tokenizer()
    hybrid.save(tmp_path / "mod")
    again = MoDModel.load(tmp_path / "mod")
    assert torch.equal(again(IDS), hybrid(IDS))
    names = hf_directory.tensor_index(hf_directory.tensor_files(tmp_path / "mod"))
    routed = {unit[:2] for unit in hybrid.config.routed()}
    assert {f"model.layers.{layer}.mod_{kind}.weight" for layer, kind in routed} < set(names)


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h_moe"])
def test_layers_of_one_module(name):
    """What test_architectures.py does for types whose layers are as it needs them."""
    base = random_model(*HYBRIDS[name])
    check_roles(base)
    assert architectures.decoder_layers(base)[4].ffn is None  # the layer in the middle
    assert set(base_identity(base, None, "tiny")["weights"]) == {"embedding"}
    assert inject_lora(base, rank=2, alpha=4)


@pytest.mark.parametrize(
    ("name", "unit", "reason"),
    [
        ("qwen3_next", (0, "kv"), "it has a recurrent state"),
        ("qwen3_next", (2, "block"), "it has a recurrent state"),
        ("lfm2", (2, "attn"), "it has a recurrent state"),
        ("falcon_h1", (1, "attn"), "it has a recurrent state beside its attention"),
        ("falcon_h1", (1, "block"), "it has a recurrent state beside its attention"),
        ("nemotron_h", (6, "kv"), "it has a recurrent state"),
        ("nemotron_h", (6, "ffn"), "it has no FFN"),
        ("nemotron_h", (1, "ffn"), "it has no FFN"),
        ("nemotron_h", (3, "attn"), "it has no attention"),
        ("nemotron_h", (1, "attn"), "its attention is all that it has, which a block unit skips"),
    ],
)
def test_units_that_a_layer_cannot_have_are_named(name, unit, reason):
    base, (layer, kind) = random_model(*HYBRIDS[name]), unit
    n_layer, model_type = base.config.num_hidden_layers, base.config.model_type
    config = tiny.config({kind: [layer]}, n_layer)
    with pytest.raises(UserError, match=f"layer {layer} of {model_type} cannot have .*: {reason};"):
        tiny.wrap(base, config)
    model = MoDModel.from_base(base, None)
    with pytest.raises(UserError, match=reason):
        model(IDS, decisions={unit: torch.ones_like(IDS)})
    with pytest.raises(UserError, match=f"layer {layer} of .* takes no {kind} unit: {reason};"):
        architectures.unit_layers(base, kind, [layer])


def test_a_kind_that_no_layer_can_have_is_explained_by_a_layer_that_attends():
    base = random_model(*HYBRIDS["nemotron_h"])
    reason = "takes no attn unit: its attention is all that it has.*; use kv or block or ffn"
    with pytest.raises(UserError, match=reason):
        architectures.unit_layers(base, "attn", None)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "granitemoehybrid", "nemotron_h_moe"])
def test_conversion_layer_by_layer_gives_the_same_routers(name, tmp_path):
    random_model(*HYBRIDS[name]).save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path)
    found = []
    for opened in (loading.load, loading.open_streamed):
        base, tokenizer = opened(tmp_path)
        chosen = {kind: architectures.unit_layers(base, kind, None) for kind in ("kv", "ffn")}
        scores = {"kv": "max_relative", "ffn": "size"}  # which take no backward pass
        plan = CalibrationPlan(chosen, 0.5, 16, text=TEXT, scores=scores, tokens=1024, rounds=1)
        found.append(calibrate(base, tokenizer, plan))
        assert torch.equal(base(IDS).logits, random_model(*HYBRIDS[name])(IDS).logits)
    (config, routers), (other, again) = found
    assert config == other and chosen["kv"] and chosen["ffn"]
    assert {unit[:2] for unit in config.routed()} == {
        (n, kind) for kind in chosen for n in chosen[kind]
    }
    for unit, tensors in routers.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, again[unit], strict=True))
