"""A GGUF file read into torch gives the logits that it gives on the runtime."""

import logging

import numpy as np
import pytest
import torch

from mod_export.convert import check_against_runtime, compare_logits
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.llamacpp.converter import quantize
from mod_export.metrics import compare_rows
from mod_export.model import loading
from mod_export.runtime.batch_logits import BatchLogitsLlama
from tests.support.gguf_models import MODELS, changed, write_models

# llama.cpp has GELU from a table of f16, which these models have in each layer.
GELU = {"softcaps", "gemma3"}
IDS = np.random.default_rng(0).integers(3, 96, 200).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("gguf"), MODELS)


def mean_kl(model, path, ids=IDS) -> float:
    llm = BatchLogitsLlama(
        path, n_ctx=len(ids), n_batch=len(ids), flash_attn=False, type_k=0, type_v=0
    )
    llm.eval(ids)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    assert logits.std() > 0.5  # a flat distribution would hide differences
    kl = float(compare_rows(llm.logits, logits.numpy())[:, 0].mean())
    llm.close()
    return kl


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_runtime(files, name):
    model, _ = loading.load(files[name])
    assert mean_kl(model, files[name]) < (1e-6 if name in GELU else 1e-9)


def test_what_the_figures_are_without_the_mending(files):
    """Each model that a file with less would give is far off, so that the bounds above judge."""
    plain, _ = loading.load(files["untied"])
    for name in ("rope_freqs", "linear", "yarn", "attention_bias", "mlp_bias"):
        assert mean_kl(plain, files[name]) > 1e-4, name


def test_llama3_is_recognised_and_saved(files, tmp_path):
    """The configuration survives saving, so that export finds it again."""
    model, _ = loading.load(files["rope_freqs"])
    assert model.config.rope_parameters["rope_type"] == "llama3"
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert mean_kl(again, files["rope_freqs"]) < 1e-9


RARE = {
    "any factors": {"tensors": {"rope_freqs.weight": np.float32([1, 3, 2, 5, 1, 2, 9, 4])}},
    "factors and linear": {
        "tensors": {"rope_freqs.weight": np.float32([1, 1, 1, 2, 4, 4, 4, 4])},
        "keys": [("llama.rope.scaling.factor", "f32", 2.0)],
    },
    "attention factor": {"keys": [("llama.rope.scaling.attn_factor", "f32", 1.3)]},
    "former key": {"keys": [("llama.rope.scale_linear", "f32", 3.0)]},
    "type none": {
        "keys": [
            ("llama.rope.scaling.type", "string", "none"),
            ("llama.rope.scaling.factor", "f32", 3.0),
        ]
    },
    "yarn with attention factor": {
        "keys": [
            ("llama.rope.scaling.type", "string", "yarn"),
            ("llama.rope.scaling.factor", "f32", 3.0),
            ("llama.rope.scaling.original_context_length", "u32", 300),
            ("llama.rope.scaling.attn_factor", "f32", 0.8),
        ]
    },
    "betas that the runtime does not read": {
        "keys": [
            ("llama.rope.scaling.type", "string", "yarn"),
            ("llama.rope.scaling.factor", "f32", 3.0),
            ("llama.rope.scaling.yarn_beta_fast", "f32", 8.0),
        ]
    },
    "one bias": {"tensors": {"blk.1.attn_k.bias": np.linspace(-2, 2, 32, dtype=np.float32)}},
}


@pytest.mark.parametrize("case", RARE)
def test_rare_keys_and_tensors(files, tmp_path, case):
    path = changed(
        files["untied"],
        tmp_path / "changed.gguf",
        added_keys=RARE[case].get("keys", ()),
        added_tensors=RARE[case].get("tensors"),
    )
    model, _ = loading.load(path)
    assert mean_kl(model, path) < 1e-9


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["untied", "qwen3moe"])
def test_rounding_explains_what_is_left(files, tmp_path, caplog, quant, name):
    path = tmp_path / "small.gguf"
    quantize(files[name], path, quant)
    base, tokenizer = loading.load(path)
    kl, rounding = compare_logits(GGUFFile.open(path), base, tokenizer)
    assert 0 < kl < 2 * rounding < 0.1
    caplog.set_level(logging.INFO, "mod_export")
    check_against_runtime(path, base, tokenizer)
    assert "same logits on the runtime" in caplog.text


def test_a_wrong_model_is_refused(files, tmp_path):
    """The weights of one file with the configuration of another, also where these are rounded."""
    for name, quant in (("linear", None), ("attention_bias", "q8_0")):
        path = files[name]
        if quant:
            path = tmp_path / "small.gguf"
            quantize(files[name], path, quant)
        base, tokenizer = loading.load(files["untied"])
        with pytest.raises(UserError, match="gives other logits on the runtime") as error:
            check_against_runtime(path, base, tokenizer)
        assert "\n" not in str(error.value)


def test_what_the_runtime_refuses_is_refused(files, tmp_path):
    """llama.cpp counts the tensors that it reads: factors for long contexts alone are not among
    them.
    """
    path = changed(
        files["untied"],
        tmp_path / "more.gguf",
        added_tensors={"rope_factors_long.weight": np.ones(8, np.float32)},
    )
    base, tokenizer = loading.load(path)
    with pytest.raises(UserError, match="wrong number of tensors") as error:
        check_against_runtime(path, base, tokenizer)
    assert "\n" not in str(error.value)
