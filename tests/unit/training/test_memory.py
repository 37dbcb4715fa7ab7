"""The memory of a training run: computed, held by torch's operations, and refused."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mod_export.errors import UserError
from mod_export.model.model_shape import ModelShape
from mod_export.training import room, steady_router
from mod_export.training.config import TrainConfig
from mod_export.training.memory import TOLERANCE, MemoryPlan, needed
from mod_export.training.prepare import trained
from mod_export.training.relaxation import relaxed_attention
from mod_export.training.run import train
from mod_export.training.student import LossWeights, Student
from tests.support import tiny_torch as tiny
from tests.support.allocations import Allocations
from tests.support.training_runs import LENGTH, config, write_files

N_LAYER = 4
PLAN = MemoryPlan(length=512, longest=512, on_cpu=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("train"))


def llama(heads_kv: int = 2, vocab: int = 2000, layers: int = N_LAYER) -> LlamaForCausalLM:
    """A Llama whose parts are about as large to each other as in large models."""
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=256,
            num_attention_heads=8,
            num_key_value_heads=heads_kv,
            intermediate_size=768,
            vocab_size=vocab,
        )
    )


def held(plan: MemoryPlan, base: LlamaForCausalLM) -> int:
    """Run two steps and an evaluation, and return the most bytes that their operations hold.

    What was there before does not count: the weights, routers and LoRA.
    """
    base.to(torch.float32 if plan.weight_bytes == 4 else torch.bfloat16)
    heads, layers = base.config.num_key_value_heads, base.config.num_hidden_layers
    units = tiny.config({"kv": list(range(1, layers))}, layers, heads=heads, kv_window=16)
    model = tiny.wrap(base, units)
    steady_router.install(model)
    run = TrainConfig((), parameters=plan.parameters, lora_rank=plan.lora_rank)
    optimizer = torch.optim.AdamW(trained(model, run))
    group = list(range(len(model.config.routed())))
    student = Student(model, None, [group], LossWeights(), recompute=plan.recompute)
    ids = torch.randint(3, 300, (plan.batch, plan.length))
    counts = torch.ones_like(ids, dtype=torch.bool)
    prices, shares = torch.full((1,), 0.03), torch.full((1, 2), 0.5)
    with relaxed_attention(base), Allocations() as allocations:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
                loss, _ = student(ids, counts, counts, prices, shares)
            loss.backward()
            del loss, _
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            student(ids[:1])
    return allocations.peak


@pytest.mark.parametrize(
    ("changes", "of_model"),
    [
        ({}, {"heads_kv": 8}),
        ({"batch": 3, "weight_bytes": 2}, {}),
        ({"autocast": True}, {"vocab": 500}),
        ({"recompute": True}, {"layers": 8, "vocab": 500}),
        ({"recompute": True, "length": 1024, "weight_bytes": 2}, {}),
        ({"parameters": "lora", "recompute": True, "autocast": True}, {"vocab": 8000}),
        ({"parameters": "lora"}, {"vocab": 500}),
    ],
)
def test_what_is_computed_is_what_torch_holds(changes, of_model):
    """Within TOLERANCE: small vectors, and gradients of a moment, are not counted one by one.

    A layer that was computed again for the backward pass stayed in memory until all were done, so
    that --recompute saved nothing.
    """
    plan, base = replace(PLAN, **changes), llama(**of_model)
    need = needed(ModelShape.of(base), plan)
    moments = 12 * plan.lora_rank * ModelShape.of(base).features
    expected = need.activations + need.logits + moments * (plan.parameters == "lora")
    assert held(plan, base) == pytest.approx(expected, rel=TOLERANCE)


def test_a_run_says_what_it_takes_and_is_refused_where_that_is_too_much(
    files, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    run = config(files, tokens=1, length=4 * LENGTH, batch=2, held_out=1)
    train(files / "mod", tmp_path / "out", run)
    (said,) = [text for text in caplog.messages if text.startswith("training takes about")]
    assert re.search(r"\(weights \d+ MB, what is trained .*\), and cpu has \d+\.\d GB left", said)
    monkeypatch.setattr(room, "room_of", lambda _: 1000)
    with pytest.raises(UserError, match="training takes about .*cpu has 0 MB left") as refused:
        train(files / "mod", tmp_path / "none", run)
    assert refused.value.cure.startswith("--recompute --dtype bfloat16 --batch 1 --accumulate 2")
    assert not (tmp_path / "none.run").exists()


def test_the_cure_is_what_costs_least_and_fits():
    shape = ModelShape.of(llama())
    plan = replace(PLAN, batch=4, length=2048)

    def total(**changes):
        return needed(shape, replace(plan, **changes)).total

    assert room.cure(shape, plan, total(recompute=True)) == "use --recompute"
    less = {"recompute": True, "weight_bytes": 2}
    assert room.cure(shape, plan, total(**less)) == "use --recompute --dtype bfloat16"
    shorter = total(**less, batch=1, length=1024)
    options = "--recompute --dtype bfloat16 --batch 1 --accumulate 4 --length 1024"
    assert room.cure(shape, plan, shorter) == f"use {options}"
    on_gpu = replace(plan, on_cpu=False)
    cure = room.cure(shape, on_gpu, 1000)
    assert "--four-bit --save adapter --length 256 would take" in cure and "FSDP" in cure


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "there is no device cuda"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "float16"}, "gradients of float16 are lost.*; use --dtype bfloat16"),
        ({"four_bit": True}, "--four-bit needs a GPU with CUDA.*; use --dtype bfloat16"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_and_types_that_are_not_there_are_refused(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(files / "mod", tmp_path / "out", config(files, **changes), save_as="adapter")


def test_weights_in_four_bits_are_not_trained_or_saved(files, tmp_path):
    run = config(files, four_bit=True)
    with pytest.raises(UserError, match="no model to save; use --save adapter"):
        train(files / "mod", tmp_path / "out", run, save_as="full")
    with pytest.raises(UserError, match="too coarse for; leave out --four-bit"):
        replace(run, parameters="full").validate(["kv", "attn"])


def test_weights_in_four_bits_hand_gradients_on(files):
    pytest.importorskip("bitsandbytes")
    from mod_export.training.four_bit import to_four_bit

    base = llama()
    whole = {name: p.detach().clone() for name, p in base.named_parameters()}
    to_four_bit(base, torch.device("cpu"))
    ids = torch.randint(3, 300, (1, 64))
    assert base(ids).logits.isfinite().all()
    h = torch.randn(1, 8, 256, requires_grad=True)
    base.model.layers[1].mlp(h).sum().backward()
    assert h.grad.abs().sum() > 0
    kept = {name for name, p in base.named_parameters() if p.shape == whole[name].shape}
    assert kept == {name for name in whole if "proj" not in name}
