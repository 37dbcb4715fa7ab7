"""LoRA and routers on one model: neither disturbs the other, and PEFT reads what was written."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from mod_export.adapter import apply, load, save
from mod_export.errors import UserError
from mod_export.model import architectures, loading
from mod_export.model.lora import add_lora, inject_lora, lora_of, merge_lora, without_lora
from mod_export.model.mod_model import MoDModel
from mod_export.model.safetensors_weights import CannotStream
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny_adapter import IDS, TOKENIZER, fill_lora, trained
from tests.unit.model.test_architectures import SUPPORTED, build


@pytest.mark.parametrize("order", ["LoRA first", "routers first"])
@torch.inference_mode()
def test_round_trip(tmp_path, order, caplog):
    """Saved, loaded and merged it computes what the model with LoRA in it does; so does merging in
    place.
    """
    model, identity = trained(order)
    logits, trace = model(IDS, trace=True)
    dense = MoDModel.from_base(tiny.base(), None, model.config, model.router_tensors())(IDS)
    assert (
        logits - dense
    ).abs().max() > 0.1  # LoRA does something, the routers' decisions are not all the same
    assert 0.2 < trace.active.float().mean() < 0.9
    save(tmp_path / "adapter", model.config, model.router_tensors(), model.base, identity)
    again = apply(load(tmp_path / "adapter"), tiny.base(), TOKENIZER)
    merge_lora(model.base)
    for other in (again, model):
        logits_other, trace_other = other(IDS, trace=True)
        assert (logits_other - logits).abs().max() < 1e-5 * logits.abs().max()
        assert torch.equal(trace_other.active, trace.active)
        assert other.base.state_dict().keys() == tiny.base().state_dict().keys()
    assert again.config == model.config and caplog.messages == []


@torch.inference_mode()
def test_the_sparse_form_has_lora_too():
    model, _ = trained()
    ids = IDS[:1]
    cache = model.new_cache()
    steps = torch.cat([model.step(part, cache) for part in ids.split(8, dim=1)], dim=1)
    assert (steps - model(ids)).abs().max() < 1e-4


def test_without_lora_is_the_model_before():
    base = tiny.base()
    before = base(IDS).logits
    parameters = inject_lora(base, rank=4, alpha=8)
    assert torch.equal(base(IDS).logits, before)  # nothing trained yet
    fill_lora(base)
    assert {id(p) for p in base.parameters() if p.requires_grad} == {id(p) for p in parameters}
    changed = base(IDS).logits
    with without_lora(base):
        assert torch.equal(base(IDS).logits, before)
    assert torch.equal(base(IDS).logits, changed) and not torch.allclose(changed, before, atol=0.01)
    plain = tiny.base()
    with without_lora(plain):
        assert torch.equal(plain(IDS).logits, before)


def test_a_teacher_between_forward_and_backward_leaves_gradients_as_they_are():
    grads = []
    for teacher in (False, True):
        model, _ = trained()
        loss = model(IDS).square().mean()
        if teacher:
            with torch.no_grad(), without_lora(model.base):
                model(IDS)
        loss.backward()
        grads.append({n: p.grad for n, p in model.base.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 6 * 7 * 2 and all(
        grad is not None and grad.any() for grad in grads[0].values()
    )
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_targets_and_seed():
    def injected(**kwargs):
        base = tiny.base()
        inject_lora(base, rank=2, alpha=4, **kwargs)
        return {name: value for name, value in base.named_parameters() if value.requires_grad}

    every = injected(seed=5)
    modules = {re.search(r"\.(\w+)\.lora_", name)[1] for name in every}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(name.startswith("model.layers.") for name in every)
    assert all(torch.equal(value, every[name]) for name, value in injected(seed=5).items())
    assert not all(torch.equal(value, every[name]) for name, value in injected(seed=6).items())
    some = injected(targets=["q_proj", "v_proj"])
    assert {re.search(r"\.(\w+)\.lora_", name)[1] for name in some} == {"q_proj", "v_proj"}
    with pytest.raises(
        UserError, match="no layer has a linear module c_proj; use down_proj, gate_proj"
    ):
        injected(targets=["q_proj", "c_proj"])
    with pytest.raises(UserError, match="rank of 0"):
        inject_lora(tiny.base(), rank=0, alpha=1)


def test_lora_once_at_a_time():
    base = tiny.base()
    state = torch.get_rng_state()
    inject_lora(base, 2, 4, seed=5)
    assert torch.equal(
        torch.get_rng_state(), state
    )  # a seed of its own leaves other random numbers as they were
    with pytest.raises(UserError, match="LoRA already"):
        inject_lora(base, 2, 4)
    merge_lora(base)
    inject_lora(base, 2, 4)


@torch.inference_mode()
def test_peft_alone_reads_the_files(tmp_path):
    from peft import PeftModel

    model, identity = trained()
    save(tmp_path / "adapter", model.config, model.router_tensors(), model.base, identity)
    theirs = PeftModel.from_pretrained(tiny.base(), str(tmp_path / "adapter")).eval()
    assert torch.equal(theirs(IDS).logits, model.base(IDS).logits)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_an_unmerged_model_is_no_checkpoint(tmp_path):
    """Its tensors have PEFT's names, under which nobody would find them."""
    model, _ = trained()
    with pytest.raises(UserError, match="has LoRA that is not merged"):
        model.save(tmp_path / "mod")
    assert list(tmp_path.iterdir()) == []
    merge_lora(model.base)
    model.save(tmp_path / "mod")
    assert torch.equal(MoDModel.load(tmp_path / "mod")(IDS), model(IDS))


TARGETS = {"target_modules": r".*\.(q_proj|v_proj|down_proj|c_attn|c_fc)"}


def peft_files(base, **options) -> tuple:
    """Return a configuration of PEFT and tensors, as read_lora does, with values at random."""
    peft = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **TARGETS | options))
    state = get_peft_model_state_dict(peft, save_embedding_layers=False)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: value.float() + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }
    return peft.peft_config["default"], tensors


@pytest.mark.parametrize("name", ["llama", "bfloat16", "dora", "gpt2", "mixtral"])
@torch.no_grad()
def test_lora_goes_into_layers_when_they_are_read(tmp_path, name):
    """What is computed, and what is written, is the same as with all layers in memory."""
    path, dtype = tmp_path / "base", torch.bfloat16 if name == "bfloat16" else torch.float32
    made = build(name, SUPPORTED[name][0]) if name in ("gpt2", "mixtral") else tiny.base()
    made.to(dtype).save_pretrained(path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(path)
    base, whole = loading.open_streamed(path, dtype)[0], loading.load(path, dtype)[0]
    ids = IDS % base.config.vocab_size
    before = whole(ids).logits
    lora = peft_files(loading.load(path, dtype)[0], use_dora=name == "dora")
    for model in (base, whole):
        add_lora(model, *lora)
        assert lora_of(model) is None
    layers = [part.layer for part in architectures.decoder_layers(base)]
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    expected = whole(ids).logits
    assert torch.equal(base(ids).logits, expected) and not torch.allclose(before, expected)
    MoDModel.from_base(base, None).save(tmp_path / "mod", linked=True)
    byte_tokenizer().save_pretrained(tmp_path / "mod")
    assert torch.equal(loading.load(tmp_path / "mod", dtype)[0](ids).logits, expected)


def test_lora_that_changes_more_takes_the_whole_model(tmp_path):
    tiny.base().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"bias": "lora_only"}):
        base, lora = loading.open_streamed(tmp_path)[0], peft_files(tiny.base(), **options)
        with pytest.raises(CannotStream, match="the adapter's LoRA changes"):
            add_lora(base, *lora)
        assert lora_of(base) is None
