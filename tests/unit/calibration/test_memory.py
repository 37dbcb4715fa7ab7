"""The memory of a calibration: computed, held by torch's operations, told and refused."""

import logging
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mod_export.calibration import memory
from mod_export.calibration.calibrate import calibrate
from mod_export.calibration.measuring import CalibrationPlan
from mod_export.calibration.memory import TOLERANCE, CalibrationShape, cure, needed
from mod_export.data.text import default_texts
from mod_export.errors import UserError
from mod_export.model import loading
from mod_export.model.model_shape import ModelShape
from tests.support.allocations import Allocations
from tests.support.byte_tokenizer import byte_tokenizer

PARTS = ("streams", "layer", "routers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Llama whose parts are about as large to each other as in large models."""
    path = tmp_path_factory.mktemp("memory") / "base"
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=768,
        vocab_size=300,
        max_position_embeddings=4096,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("window", "granularity", "tokens"),
    [(256, "head", 4096), (64, "layer", 2048), (None, "head", 4096)],
)
def test_what_is_computed_is_what_torch_holds(directory, monkeypatch, window, granularity, tokens):
    base, tokenizer = loading.open_streamed(directory)
    text = default_texts()[0][: 8 * tokens]
    plan = CalibrationPlan(
        {"kv": [1, 2]}, 0.5, window, text=text, tokens=tokens, rounds=0, kv_granularity=granularity
    )
    seen = []
    monkeypatch.setattr(memory, "needed", lambda *args: seen.append(needed(*args)) or seen[-1])
    with Allocations() as held:
        calibrate(base, tokenizer, plan)
    assert held.peak == pytest.approx(seen[0].of(PARTS), rel=TOLERANCE)


def test_it_is_told_and_refused_where_it_is_too_much(directory, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    base, tokenizer = loading.open_streamed(directory)
    plan = CalibrationPlan({"kv": [1, 2]}, text=default_texts()[0][:30000], tokens=1024, rounds=0)
    calibrate(base, tokenizer, plan)
    (said,) = [text for text in caplog.messages if text.startswith("calibrating takes about")]
    assert re.search(
        r"about \d+ MB of memory \(a layer's weights 3 MB, .*\), and .* are left", said
    )
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="calibrating takes about .*, and 0 MB are left") as refused:
        calibrate(base, tokenizer, plan)
    assert refused.value.cure.startswith("--dtype bfloat16 would take")


def test_the_cure_is_the_mildest_that_fits(directory):
    base, _ = loading.open_streamed(directory)
    shape, plan = ModelShape.of(base), CalibrationPlan({"kv": [1, 2]}, kv_window=None)
    texts = CalibrationShape(7, 2048, joined=2, units=4, heads=2, windows=6)

    def room(**changes):
        return needed(shape, CalibrationShape(**vars(texts) | changes)).of()

    names = tuple(memory.NAMES)
    assert cure(shape, texts, plan, names, room(itemsize=2)) == "use --dtype bfloat16"
    narrow = room(itemsize=2, windows=1, length=1024, sequences=14)
    assert cure(shape, texts, plan, names, narrow) == "use --dtype bfloat16 --kv-window 256"
    few = room(itemsize=2, windows=1, length=1024, sequences=1, joined=1)
    told = "use --dtype bfloat16 --kv-window 256 --calibration-tokens 1024"
    assert cure(shape, texts, plan, names, few) == told
    assert "would take" in cure(shape, texts, plan, names, 1000)


def test_a_backward_pass_keeps_more():
    shape = ModelShape.of(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64)))
    texts = CalibrationShape(4, 1024)
    backward = CalibrationShape(4, 1024, layers=0, backward=True)
    logits = 1024 * shape.vocab * 4
    assert needed(shape, backward).layer > needed(shape, texts).layer + logits
    assert needed(shape, backward).weights == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would ask the GPU")
def test_what_lies_where():
    (place,) = memory._places(torch.device("cpu"))
    assert place[0] == "memory" and place[1] == tuple(memory.NAMES)
