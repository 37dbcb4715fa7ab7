"""The torch model: both forms agree, and each against a plain transformers model wherever there is
an equal one.
"""

import pytest
import torch
from torch.nn.functional import pad

from mod_export.errors import UserError
from mod_export.model.mod_model import MoDModel
from mod_export.model.routing import DecisionStrategy
from tests.support import tiny_torch as tiny
from tests.support.tiny_torch import IDS, UNITS, assert_close

BATCH = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(8))


def in_pieces(model, ids, size):
    """Logits, decisions and the cache of the sparse form, `size` tokens at a time."""
    cache = model.new_cache()
    steps = [
        model.step(ids[:, i : i + size], cache, trace=True) for i in range(0, ids.shape[1], size)
    ]
    return torch.cat([s[0] for s in steps], 1), torch.cat([s[1].active for s in steps], 1), cache


@pytest.mark.parametrize("scale_output", [False, True], ids=["hard", "scaled"])
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS.keys())
@torch.inference_mode()
def test_forms_agree_however_the_prompt_is_cut(units, scale_output):
    model = tiny.mod_model(units, IDS, scale_output=scale_output)
    dense, trace = model(IDS, trace=True)
    assert 0.1 < trace.active.float().mean() < 0.9
    model.force = "active"
    assert (model(IDS) - dense).abs().max() > 0.1  # the decisions matter to the result
    model.force = None
    for size in (48, 13, 1):
        logits, active, _ = in_pieces(model, IDS, size)
        assert torch.equal(active, trace.active)
        assert_close(logits, dense)


@pytest.mark.parametrize("n_head_kv", [1, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.inference_mode()
def test_attention_heads_and_embeddings(n_head_kv, tied):
    model = tiny.mod_model(UNITS["all"], IDS, n_head_kv=n_head_kv, tied=tied)
    dense = model(IDS)
    assert_close(in_pieces(model, IDS, 7)[0], dense)
    model.base.set_attn_implementation("eager")
    assert_close(model(IDS), dense)
    assert_close(in_pieces(model, IDS, 7)[0], dense)


@torch.inference_mode()
def test_all_active_is_the_plain_model():
    plain = tiny.base()
    expected = plain(IDS).logits
    model = tiny.wrap(plain, tiny.config(UNITS["all"], scale_output=True))
    model.force = "active"
    assert torch.equal(model(IDS), expected)
    assert_close(in_pieces(model, IDS, 5)[0], expected)
    model.force, model.shift = None, -1e9
    model.config = tiny.config(UNITS["all"])  # hard gates
    assert torch.equal(model(IDS), expected)
    model.detach()
    assert torch.equal(plain(IDS).logits, expected)


@torch.inference_mode()
def test_inactive_block_is_the_pruned_model():
    model = tiny.wrap(tiny.base(), tiny.config({"block": [1, 3, 4]}))
    model.force = "inactive"
    pruned = tiny.base()
    pruned.model.layers = torch.nn.ModuleList(pruned.model.layers[i] for i in (0, 2, 5))
    for index, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = index
    pruned.config.num_hidden_layers = 3
    expected = pruned(IDS).logits
    assert torch.equal(model(IDS), expected)
    logits, _, cache = in_pieces(model, IDS, 5)
    assert_close(logits, expected)
    assert cache.counts() == [48, 0, 48, 0, 0, 48]


@pytest.mark.parametrize("kind, module", [("attn", "self_attn.o_proj"), ("ffn", "mlp.down_proj")])
@torch.inference_mode()
def test_inactive_sublayer_is_the_model_with_it_zeroed(kind, module):
    model = tiny.wrap(tiny.base(), tiny.config({kind: [1, 4]}))
    model.force = "inactive"
    zeroed = tiny.base()
    for layer in (1, 4):
        zeroed.get_submodule(f"model.layers.{layer}.{module}").weight.zero_()
    expected = zeroed(IDS).logits
    assert torch.equal(model(IDS), expected)
    assert_close(in_pieces(model, IDS, 5)[0], expected)


@torch.inference_mode()
def test_kv_visibility_is_the_stated_rule():
    """The same tokens forgotten in all layers is one mask for all layers, which a plain model takes
    too.
    """
    keep, window = torch.rand(1, 48, generator=torch.Generator().manual_seed(3)) < 0.4, 6
    mask = torch.zeros(1, 1, 48, 48, dtype=torch.bool)
    for query in range(48):
        for key in range(query + 1):
            mask[0, 0, query, key] = keep[0, key] or query - key < window
    plain = tiny.base()
    expected = plain(IDS, attention_mask=mask).logits
    model = MoDModel.from_base(plain, None)
    assert_close(
        model(IDS, decisions={(i, "kv"): keep for i in range(tiny.N_LAYER)}, kv_window=window),
        expected,
    )
    assert (model(IDS) - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["block", "attn"])
@torch.inference_mode()
def test_a_token_that_stores_nothing_is_seen_by_nobody(kind):
    active = torch.ones(1, 48, dtype=torch.bool)
    active[0, 20] = False
    other = IDS.clone()
    other[0, 20] = 5
    model = MoDModel.from_base(tiny.base(), None)
    decisions = {(i, kind): active for i in range(tiny.N_LAYER)}
    difference = (
        (model(IDS, decisions=decisions) - model(other, decisions=decisions)).abs().amax(-1)[0]
    )
    assert difference[20] > 0.1
    assert difference[torch.arange(48) != 20].max() == 0
    assert (model(IDS) - model(other))[0, 21:].abs().max() > 0.1


@torch.inference_mode()
def test_decisions_follow_scores_sinks_and_shift():
    model = tiny.mod_model(UNITS["all"], IDS, p=0.3, sink_tokens=5)
    _, trace = model(IDS, trace=True)
    sink = (torch.arange(48) < 5)[None, :, None]
    assert torch.equal(trace.active, (torch.sigmoid(trace.logit) >= 0.3) | sink)
    assert not torch.equal(trace.active, torch.sigmoid(trace.logit) >= 0.3)
    model.shift = 0.5
    _, shifted = model(IDS, trace=True)
    p = torch.sigmoid(torch.logit(torch.tensor(0.3)) + 0.5)
    assert torch.equal(shifted.active, (torch.sigmoid(shifted.logit) >= p) | sink)
    for force in ("active", "inactive"):
        model.force = force
        _, forced = model(IDS, trace=True)
        assert torch.equal(forced.active, torch.full_like(forced.active, force == "active"))


@pytest.mark.parametrize("kind", ["block", "attn", "ffn"])
@torch.inference_mode()
def test_scaled_gate_multiplies_what_the_unit_adds(kind):
    """In the last layer the gate can be applied by hand: what follows is the FFN (attn only), norm
    and head.
    """
    model = tiny.mod_model({kind: [5]}, IDS, scale_output=True, sink_tokens=3)
    seen = {}
    logits, trace = model(
        IDS,
        trace=True,
        strategy=DecisionStrategy(lambda unit, h, delta: seen.update({unit: (h, delta)})),
    )
    h, delta = seen[5, kind]
    s, active = torch.sigmoid(trace.logit), trace.active
    g = torch.where(s >= 0.5, s, 1.0)
    assert (active & (s < 0.5)).any()
    y = torch.where(active, h + g * delta, h)
    base = model.base
    if kind == "attn":
        last = base.model.layers[5]
        y = y + last.mlp(last.post_attention_layernorm(y))
    assert_close(logits, base.lm_head(base.model.norm(y)))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_changes_nothing(side):
    model = tiny.mod_model(UNITS["all"], BATCH)
    lengths = (24, 17, 5)
    rows = [((24 - n, 0) if side == "left" else (0, 24 - n)) for n in lengths]
    ids = torch.stack([pad(BATCH[i, :n], rows[i]) for i, n in enumerate(lengths)])
    mask = torch.stack(
        [pad(torch.ones(n, dtype=torch.long), rows[i]) for i, n in enumerate(lengths)]
    )
    logits, trace = model(ids, attention_mask=mask, trace=True)
    for i, n in enumerate(lengths):
        alone, trace_alone = model(BATCH[i : i + 1, :n], trace=True)
        assert_close(logits[i][mask[i] > 0], alone[0])
        assert torch.equal(trace.active[i][mask[i] > 0], trace_alone.active[0])


@torch.inference_mode()
def test_cells_are_what_later_queries_can_see():
    model = tiny.mod_model(UNITS["all"], IDS, kv_window=6)
    _, trace = model(IDS, trace=True)
    units = model.config.routed()
    for size in (48, 5, 1):
        cache = in_pieces(model, IDS, size)[2]
        for layer, cells in enumerate(cache.cells):
            visible = torch.ones(48, dtype=torch.bool)
            for kind in ("block", "attn"):
                if (layer, kind) in units:
                    visible &= trace.active[0, :, units.index((layer, kind))]
            if (layer, "kv") in units:
                visible &= trace.active[0, :, units.index((layer, "kv"))] | (
                    48 - torch.arange(48) < 6
                )
            assert cells.position.tolist() == visible.nonzero()[:, 0].tolist()


def test_nothing_runs_where_nothing_is_active():
    model = tiny.mod_model({"block": [1, 2], "attn": [3], "ffn": [3]}, IDS)
    model.force = "inactive"
    calls = []
    for layer in (1, 2, 3):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            module = model.base.model.layers[layer].get_submodule(name)
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    in_pieces(model, IDS, 4)
    assert calls == []
    model.force = "active"
    in_pieces(model, IDS, 48)
    assert len(calls) == 6


def test_generate_is_the_dense_form_repeated():
    model = tiny.mod_model(UNITS["all"], IDS)
    expected = IDS
    with torch.inference_mode():
        for _ in range(12):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    seen = []
    made = model.generate(IDS, 12, stop_ids=(), chunk=7, on_token=seen.append)
    assert torch.equal(made, expected)
    assert seen == expected[0, 48:].tolist()
    stop = seen[3]
    stopped = model.generate(IDS, 12, stop_ids=(stop,))
    assert stopped[0].tolist() == expected[0, : 48 + seen.index(stop) + 1].tolist()
    assert torch.equal(model.generate(IDS, 12, stop_ids=(), temperature=2.0, top_k=1), expected)


def test_sampling_follows_its_seed_and_bounds():
    model = tiny.mod_model(UNITS["kv"], IDS)
    runs = [
        model.generate(IDS, 20, stop_ids=(), temperature=1.5, seed=s)[0].tolist() for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert model.generate(IDS, 5, stop_ids=(), temperature=1.5, top_p=1e-6).tolist() == (
        model.generate(IDS, 5, stop_ids=()).tolist()
    )


def test_gradients_reach_only_active_tokens():
    model = tiny.mod_model(UNITS["all"], IDS)
    active = torch.zeros(1, 48, dtype=torch.bool)
    model(IDS, decisions={(3, "block"): active}).sum().backward()
    grads = [p.grad for p in model.base.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)
    assert model.base.model.layers[3].mlp.up_proj.weight.grad.abs().max() == 0
    assert model.base.model.layers[2].mlp.up_proj.weight.grad.abs().max() > 0


def test_gradient_checkpointing_is_refused():
    model = tiny.mod_model(UNITS["kv"])
    model.base.model.layers[1].gradient_checkpointing = True
    with pytest.raises(UserError, match="gradient checkpointing"):
        model(IDS)


def test_wrapping_again_ends_the_former_model():
    plain = tiny.base()
    expected = plain(IDS).logits
    first = tiny.wrap(plain, tiny.config({"block": [1, 2]}))
    first.force = "inactive"
    second = tiny.wrap(plain, tiny.config({"ffn": [4]}))
    second.force = "active"
    assert torch.equal(second(IDS), expected)


def test_routers_must_fit_the_config():
    config = tiny.config({"kv": [2, 3]})
    good = {
        (2, "kv"): (torch.zeros(64), torch.zeros(1)),
        (3, "kv"): (torch.zeros(64), torch.zeros(1)),
    }
    cases = {
        "mod_kv of layer 3": {(2, "kv"): good[2, "kv"]},
        "mod_ffn of layer 0": {**good, (0, "ffn"): good[2, "kv"]},
        "model.layers.3.mod_kv.weight": {**good, (3, "kv"): (torch.zeros(63), torch.zeros(1))},
        "model.layers.2.mod_kv.bias": {
            **good,
            (2, "kv"): (torch.zeros(64), torch.full((1,), torch.nan)),
        },
    }
    for named, routers in cases.items():
        with pytest.raises(UserError, match=named):
            MoDModel.from_base(tiny.base(), None, config, routers)


def test_the_form_with_a_cache_takes_one_sequence():
    model = tiny.mod_model(UNITS["kv"])
    with pytest.raises(UserError, match="3 sequences"):
        model.step(BATCH, model.new_cache())
