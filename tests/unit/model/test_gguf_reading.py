"""What a GGUF file says is taken or refused by name."""

import logging
import sys

import gguf
import numpy as np
import pytest
import torch

from mod_export.convert import check_against_runtime
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.model.activation_rounding import rounded
from mod_export.model.gguf_architectures import ARCHITECTURES
from mod_export.model.gguf_reading import read_model
from mod_export.model.gguf_rope import llama3_factors, llama3_parameters
from tests.support.gguf_models import changed
from tests.support.tiny_gguf import Tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Tiny(n_layer=2, n_embd=64).write(tmp_path_factory.mktemp("gguf") / "plain.gguf")


REFUSED = {
    "llama.attention.scale": {"added_keys": [("llama.attention.scale", "f32", 0.5)]},
    "llama.logit_scale": {"added_keys": [("llama.logit_scale", "f32", 2.0)]},
    "llama.made_up": {"added_keys": [("llama.made_up", "string", "x")]},
    "llama.expert_used_count": {"added_keys": [("llama.expert_used_count", "u32", 2)]},
    "blk.0.ffn_gate_inp.weight": {"added_keys": [("llama.expert_count", "u32", 8)]},
    "llama.attention.causal": {"added_keys": [("llama.attention.causal", "bool", False)]},
    "llama.attention.value_length": {"added_keys": [("llama.attention.value_length", "u32", 8)]},
    "llama.rope.dimension_sections": {
        "added_keys": [("llama.rope.dimension_sections", "u32[]", [1, 2])]
    },
    "output.bias": {"added_tensors": {"output.bias": np.zeros(96, np.float32)}},
    "blk.1.attn_q.scale": {"added_tensors": {"blk.1.attn_q.scale": np.ones(1, np.float32)}},
    "blk.0.attn_q_norm.weight": {
        "added_tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_named(plain, tmp_path, name):
    path = changed(plain, tmp_path / "changed.gguf", **REFUSED[name])
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        read_model(GGUFFile.open(path), torch.float32)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(plain, tmp_path):
    file = GGUFFile.open(plain)
    for name in ("blk.1.ffn_up.weight", "token_embd.weight"):
        kept = {other: other for other in file.tensors if other != name}
        path = changed(plain, tmp_path / "tensor.gguf", kept_tensors=kept)
        with pytest.raises(UserError, match=f"lacks the tensor {name}"):
            read_model(GGUFFile.open(path), torch.float32)
    path = changed(plain, tmp_path / "key.gguf", dropped_keys=["llama.embedding_length"])
    with pytest.raises(UserError, match=r"lacks the key llama\.embedding_length"):
        read_model(GGUFFile.open(path), torch.float32)


def test_shapes_that_do_not_fit_are_named(plain, tmp_path):
    path = changed(plain, tmp_path / "shape.gguf", changed_keys={"llama.feed_forward_length": 100})
    with pytest.raises(UserError, match=r"blk\.0\.ffn_gate\.weight has the shape"):
        read_model(GGUFFile.open(path), torch.float32)


def test_other_architectures_are_refused(tmp_path):
    for name, told in (
        ("grovemoe", "architecture grovemoe cannot be read; .*qwen3moe"),
        ("mamba", "'mamba' cannot have routers: its layers have a recurrent state"),
    ):
        path = Tiny(n_layer=2, arch=name).write(tmp_path / f"{name}.gguf")
        with pytest.raises(UserError, match=told):
            read_model(GGUFFile.open(path), torch.float32)


def test_keys_without_effect_are_passed_over(plain, tmp_path):
    path = changed(
        plain,
        tmp_path / "more.gguf",
        added_keys=[
            ("llama.rope.scaling.finetuned", "bool", True),
            ("general.sampling.temp", "f32", 0.5),
            ("llama.attention.layer_norm_epsilon", "f32", 0.5),
        ],
    )
    one, other = (read_model(GGUFFile.open(p), torch.float32) for p in (plain, path))
    assert one.config.to_dict() == other.config.to_dict()


def test_a_tied_file_gives_a_tied_model(tmp_path):
    tied = Tiny(n_layer=2, tied=True).write(tmp_path / "tied.gguf")
    untied = Tiny(n_layer=2).write(tmp_path / "untied.gguf")
    for path, same in ((tied, True), (untied, False)):
        model = read_model(GGUFFile.open(path), torch.float32)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is same
        assert model.config.tie_word_embeddings is same


def test_the_logits_are_those_of_the_oracle(tmp_path):
    """numpy's model of the same file, which shares no code with transformers or llama.cpp."""
    tiny = Tiny(n_layer=3, n_embd=64)
    model = read_model(GGUFFile.open(tiny.write(tmp_path / "tiny.gguf")), torch.float32)
    ids = np.random.default_rng(1).integers(0, 96, 40)
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None]).logits[0]
    np.testing.assert_allclose(logits, tiny.forward(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_known_on_both_sides(name):
    from transformers import AutoConfig

    assert name in gguf.MODEL_ARCH_NAMES.values()
    assert AutoConfig.for_model(ARCHITECTURES[name].model_type)


@pytest.mark.parametrize(
    ("base", "factor", "n_pairs"), [(500000.0, 8.0, 64), (500000.0, 32.0, 32), (500000.0, 8.0, 48)]
)
def test_llama3_parameters_are_those_of_the_released_models(base, factor, n_pairs):
    factors = llama3_factors(base, n_pairs, factor, 1.0, 4.0, 8192).astype(np.float32)
    found = llama3_parameters(factors.astype(np.float64), base)
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("context", [64, 256, 1000, 5000])
@pytest.mark.parametrize("n_pairs", [2, 4, 8, 32])
def test_llama3_parameters_give_the_factors(context, n_pairs):
    """Few pairs leave one or none between the two wavelengths."""
    factors = llama3_factors(10000.0, n_pairs, 8.0, 1.0, 4.0, context)
    if factors.max() == 1.0:
        return
    found = llama3_parameters(factors, 10000.0)
    if found is None:  # All pairs are scaled in part: no pair shows the factor.
        assert factors.max() < 8.0
        return
    again = llama3_factors(
        10000.0,
        n_pairs,
        found["factor"],
        found["low_freq_factor"],
        found["high_freq_factor"],
        found["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(again, factors, rtol=2e-6)


def test_other_factors_are_no_llama3():
    assert llama3_parameters(np.array([1.0, 3, 2, 5, 1, 2, 9, 4]), 10000.0) is None
    assert llama3_parameters(np.array([8.0, 8, 4, 4, 2, 1, 1, 1]), 10000.0) is None


def test_activations_are_rounded_as_their_matrix_needs():
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    types = gguf.GGMLQuantizationType
    assert torch.equal(rounded(x, types.F32), x)
    assert torch.equal(rounded(x, types.F16), x.half().float())
    for type, block in ((types.Q8_0, 32), (types.Q4_1, 32), (types.Q4_K, 256)):
        steps = x.reshape(-1, block).abs().amax(1) / 127
        error = (rounded(x, type) - x).reshape(-1, block).abs().amax(1)
        assert (error <= steps / 2 * 1.001).all() and (error > steps / 4).all()


def test_without_the_runtime_a_line_says_that_nothing_was_compared(plain, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    caplog.set_level(logging.INFO, "mod_export")
    check_against_runtime(plain, None, None)
    assert caplog.messages == ["plain.gguf is not compared with llama.cpp, which is not installed"]
