"""The torch model: its two forms agree, and equal a plain transformers model where one exists."""

import pytest
import torch

from mod_export.errors import UserError
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny
from tests.support.tiny_torch import IDS, UNITS, assert_close, in_pieces


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
    assert cache.counts() == [[48], [0], [48], [0], [0], [48]]


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
