"""What a GGUF file says of a configuration, and what it leaves out."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.rotary import FREQS, LONG, SHORT, file_rotary
from mod_export.model import gguf_account
from mod_export.model.gguf_account import KEYS, ROTARY, SLIDING, TENSORS, account, check_base
from tests.support.tiny_gguf import Tiny

SCALING = "llama.rope.scaling."
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# fields that a model reads, and that change no logits
NO_EFFECT = {
    *("attention_dropout", "initializer_range", "is_encoder_decoder", "output_attentions"),
    *(
        "_name_or_path",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "use_cache",
        "vocab_size",
    ),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    return Tiny(n_layer=2, n_embd=128, n_head=4, n_ctx=256).write(path)


def directory(tmp_path, rope=None, **fields):
    """The configuration of `file`, with other rotary parameters and fields."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        vocab_size=96,
        rope_parameters={"rope_theta": 10000.0} | (rope or {}),
    )
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(data))
    return tmp_path


def with_keys(file, path, *keys, tensors=None):
    with path.open("wb") as out:
        rewrite(GGUFFile.open(file), out, added_keys=keys, added_tensors=tensors)
    return GGUFFile.open(path)


def completed(file, path, added):
    """The file with what it lacked."""
    with path.open("wb") as out:
        rewrite(file, out, added_keys=added.keys, added_tensors=added.tensors)
    return GGUFFile.open(path)


def test_a_plain_file_lacks_nothing(file, tmp_path):
    assert not account(directory(tmp_path), GGUFFile.open(file))
    check_base(tmp_path, GGUFFile.open(file))


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, [("type", "linear"), ("factor", 4.0)]),
        (YARN, [("type", "yarn"), ("factor", 4.0), ("original_context_length", 64)]),
    ],
)
def test_what_the_converter_writes_is_enough(file, tmp_path, rope, keys):
    types = {str: "string", float: "f32", int: "u32"}
    entries = [(SCALING + name, types[type(value)], value) for name, value in keys]
    written = with_keys(file, tmp_path / "written.gguf", *entries)
    assert not account(directory(tmp_path, rope), written)
    # and one key less is not
    with pytest.raises(UserError, match="has another rotary embedding than"):
        check_base(tmp_path, GGUFFile.open(file))


def test_a_scale_of_cosine_and_sine_is_a_key(file, tmp_path):
    entries = [("type", "string", "yarn"), ("factor", "f32", 4.0)]
    entries += [("original_context_length", "u32", 64)]
    written = with_keys(
        file, tmp_path / "written.gguf", *((SCALING + name, *rest) for name, *rest in entries)
    )
    added = account(directory(tmp_path, YARN | {"attention_factor": 1.0}), written)
    assert not added.tensors
    ((name, _, value),) = added.keys
    assert name == SCALING + "attn_factor"
    assert value == pytest.approx(1 / (1 + 0.1 * np.log(4.0)))


@pytest.mark.parametrize(
    ("rope", "tensors"),
    [
        (YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, {FREQS}),
        (YARN | {"truncate": False}, {FREQS}),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8.0}, {FREQS}),
        ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64}, {FREQS}),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.01 * i for i in range(16)],
                "long_factor": [2.0 + 0.1 * i for i in range(16)],
                "original_max_position_embeddings": 64,
            },
            {SHORT, LONG},
        ),
    ],
)
def test_other_angles_are_a_tensor(file, tmp_path, rope, tensors):
    plain = GGUFFile.open(file)
    added = account(directory(tmp_path, rope), plain)
    assert set(added.tensors) == tensors
    whole = completed(plain, tmp_path / "whole.gguf", added)
    assert not account(tmp_path, whole)
    check_base(tmp_path, whole)
    assert file_rotary(whole).by_length == (tensors == {SHORT, LONG})


@pytest.mark.parametrize(
    ("rope", "fields", "told"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, {}, "dynamic .factor 4.*change with the length"),
        ({}, {"hidden_act": "gelu"}, "hidden_act 'gelu', where llama.cpp computes silu"),
        ({}, {"sliding_window": 100}, "sliding attention of 100 tokens.*to 100: up to there"),
        ({}, {"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06, and plain.gguf attention.layer_norm"),
        ({}, {"num_key_value_heads": 4}, "num_key_value_heads 4, and"),
        (
            {},
            {"attention_bias": True},
            "attention_bias True, and plain.gguf no tensor blk.0.attn_q",
        ),
        ({}, {"mlp_bias": True}, "mlp_bias True, and plain.gguf no tensor blk.0.ffn_up.bias"),
    ],
)
def test_what_a_file_cannot_say_is_refused(file, tmp_path, rope, fields, told):
    with pytest.raises(UserError, match=told):
        account(directory(tmp_path, rope, **fields), GGUFFile.open(file))


def test_a_window_as_long_as_the_context_is_none(file, tmp_path):
    assert not account(directory(tmp_path, sliding_window=256), GGUFFile.open(file))


def test_an_architecture_without_the_tensors(tmp_path):
    path = Tiny(n_layer=2, n_embd=128, n_head=4, n_ctx=256, arch="qwen2").write(tmp_path / "q.gguf")
    with pytest.raises(UserError, match=r"yarn \(beta_fast 16, factor 4.*qwen2 has no keys"):
        account(directory(tmp_path, YARN | {"beta_fast": 16.0}), GGUFFile.open(path))


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_every_field_that_a_model_reads_is_accounted_for(kind):
    """The fields are those that transformers asks for while it builds and runs the model."""
    seen = set()

    class Watched(kind):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    small = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 30, "pad_token_id": 0}
    small |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    model = type(AutoModelForCausalLM.from_config(kind(**small)))
    config = Watched(**small)
    seen.clear()
    model(config)(torch.tensor([[1, 2, 3]]))
    graph = gguf_account.GRAPHS["llama"]
    known = {*KEYS, *TENSORS, *ROTARY, *SLIDING, *graph.fixed, *NO_EFFECT}
    assert seen & set(kind(**small).to_dict()) - known == set()
