"""kv units of single K/V heads: both forms, a slow reference, the cells, and what is refused."""

import pytest
import torch

from mod_export.errors import UserError
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.head_reference import reference
from tests.support.tiny_torch import BATCH, IDS, UNITS, assert_close, in_pieces

KV = {"kv": [2, 3, 5]}
WINDOWS = {(2, "kv", 1): 3, (3, "kv", 0): 13}
CASES = {
    "kv": (KV, {}),
    "without sinks": (KV, {"sink_tokens": 0}),
    "own windows": (KV, {"windows": WINDOWS, "kv_window": 13}),
    "a head keeps all": (KV, {"left_out": [(2, "kv", 0), (5, "kv", 1)]}),
    "multi-head attention": (KV, {"n_head_kv": 4, "heads": 4}),
    "scaled": (UNITS["kv+attn+ffn"], {"scale_output": True}),
    "with block": (UNITS["kv+block"], {"windows": {(4, "kv", 0): 2}}),
    "all": (UNITS["all"], {"left_out": [(3, "kv", 1)], "scale_output": True}),
}


def made(case: str) -> MoDModel:
    units, options = CASES[case]
    return tiny.mod_model(units, IDS, **{"heads": 2, **options})


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_both_forms_are_the_slow_reference(case):
    model = made(case)
    logits, trace = model(IDS, trace=True)
    expected, active = reference(model, IDS[0].tolist())
    assert_close(logits[0].double(), torch.from_numpy(expected))
    for index, unit in enumerate(model.config.routed()):
        assert trace.active[0, :, index].tolist() == active[tuple(unit)].tolist()
    for size in (48, 13, 1):
        sparse, decisions, _ = in_pieces(model, IDS, size)
        assert torch.equal(decisions, trace.active)
        assert_close(sparse, logits)
    model.base.set_attn_implementation("eager")
    assert_close(model(IDS), logits)
    assert_close(in_pieces(model, IDS, 7)[0], logits)


@torch.inference_mode()
def test_heads_that_decide_alike_are_the_layer():
    """The routers of both heads are the layer's: the same to the bit, and as many cells."""
    layers = tiny.mod_model(KV, IDS)
    routers = {
        (layer, kind, head): pair
        for (layer, kind), pair in layers.router_tensors().items()
        for head in range(2)
    }
    expected, _, cache = in_pieces(layers, IDS, 7)
    dense = layers(IDS)
    heads = MoDModel.from_base(layers.base, None, tiny.config(KV, heads=2), routers)
    assert torch.equal(heads(IDS), dense)
    logits, _, own = in_pieces(heads, IDS, 7)
    assert_close(logits, expected)
    counts = zip(own.counts(), cache.counts(), strict=True)
    assert all(n == of_layer * len(n) for n, of_layer in counts)


@torch.inference_mode()
def test_each_head_stores_its_own_cells():
    model = tiny.mod_model(UNITS["all"], IDS, heads=2, windows={(3, "kv", 1): 2})
    _, trace = model(IDS, trace=True)
    decided = dict(zip(model.config.routed(), trace.active[0].T, strict=True))
    for size in (48, 5, 1):
        cache = in_pieces(model, IDS, size)[2]
        for layer, heads in enumerate(cache.cells):
            assert len(heads) == (2 if layer in UNITS["all"]["kv"] else 1)
            for head, cells in enumerate(heads):
                visible = torch.ones(48, dtype=torch.bool)
                for kind in ("block", "attn"):
                    visible &= decided.get((layer, kind), visible)
                if (unit := (layer, "kv", head)) in decided:
                    recent = 48 - torch.arange(48) < model.config.window(unit)
                    visible &= decided[unit] | recent
                assert cells.position.tolist() == visible.nonzero()[:, 0].tolist()
                assert cells.key.shape[1] == (1 if len(heads) > 1 else 2)


@torch.inference_mode()
def test_a_sequence_in_a_batch_with_padding_is_the_sequence_alone():
    model = tiny.mod_model(KV, BATCH, heads=2, windows={(2, "kv", 0): 3})
    mask = torch.ones_like(BATCH)
    mask[1, :7] = 0
    logits = model(BATCH, attention_mask=mask)
    assert_close(logits[1, 7:], model(BATCH[1:2, 7:])[0])
    assert_close(logits[2], model(BATCH[2:])[0])


@torch.inference_mode()
def test_given_decisions_of_heads():
    keep = torch.rand(1, 48, generator=torch.Generator().manual_seed(3)) < 0.4
    model = MoDModel.from_base(tiny.base(), None)
    dense = model(IDS)
    layers = model(IDS, decisions={(2, "kv"): keep}, kv_window=6)
    both = {(2, "kv", head): keep for head in range(2)}
    assert torch.equal(model(IDS, decisions=both, kv_window=6), layers)
    one = model(IDS, decisions={(2, "kv", 1): keep}, kv_window=6)
    assert (one - layers).abs().max() > 1e-3 < (one - dense).abs().max()


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (
            (2, "kv", 2),
            "head 2 of layer 2 of llama cannot decide for a unit kv: it has 2 K/V heads",
        ),
        (
            (2, "attn", 0),
            "head 0 of layer 2 of llama cannot decide for a unit attn: only kv units can",
        ),
    ],
)
def test_units_that_a_head_cannot_have(unit, words):
    model = MoDModel.from_base(tiny.base(), None)
    with pytest.raises(UserError, match=words):
        model(IDS, decisions={unit: torch.ones_like(IDS)})


def test_a_layer_and_its_heads_do_not_both_decide():
    model = tiny.mod_model(KV, heads=2)
    with pytest.raises(UserError, match="layer 2 has a kv unit, and others of its heads"):
        model(IDS, decisions={(2, "kv"): torch.ones_like(IDS)})


@pytest.mark.parametrize("n_head_kv", [1, 4])
def test_a_model_with_other_heads_is_refused(n_head_kv):
    base = tiny.base(n_head_kv=n_head_kv)
    with pytest.raises(UserError, match=f"of 2 heads, llama can decide for {n_head_kv}"):
        tiny.wrap(base, tiny.config(KV, heads=2))


@torch.inference_mode()
def test_a_directory_holds_routers_by_head(tmp_path):
    options = {"heads": 2, "windows": {(2, "kv", 0): 3}, "left_out": [(3, "kv", 1)]}
    model = tiny.save_small(tmp_path / "mod", KV, **options)
    found = MoDModel.load(tmp_path / "mod")
    assert found.config == model.config
    assert torch.equal(found(IDS), model(IDS))
