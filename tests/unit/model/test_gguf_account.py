"""What a GGUF file says of a configuration, and what it leaves out."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mod_export.errors import UserError
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.rotary import FREQS, LONG, SHORT, file_rotary
from mod_export.model.gguf_account import KEYS, TENSORS, account, check_base
from tests.support.tiny_gguf import Tiny

SCALING = "llama.rope.scaling."
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BROKEN_YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}
BROKEN_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": 3.0,
        "long_factor": "many",
    }
}
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
        ({}, {"hidden_act": "gelu"}, "hidden_act 'gelu', where llama.cpp computes silu"),
        ({}, {"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06, and plain.gguf attention.layer_norm"),
        ({}, {"num_key_value_heads": 4}, "num_key_value_heads 4, and"),
        ({}, {"intermediate_size": 1048576}, "size 1048576, and plain.gguf .* 192;"),
        ({"rope_type": "spiral", "factor": 2.0}, {}, "'spiral', which transformers does not know"),
        ({}, BROKEN_YARN, "check the parameters of the rotary embedding 'yarn'"),
        ({}, BROKEN_LONGROPE, "check the parameters of the rotary embedding 'longrope'"),
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


def test_dynamic_scaling_changes_nothing_within_the_context(file, tmp_path, caplog):
    folder = directory(tmp_path, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    told = "embedding dynamic (factor 4), which a GGUF file cannot say: up to 256 tokens this"
    for compare in (account, check_base):
        caplog.clear()
        assert not compare(folder, GGUFFile.open(file))
        (line,) = caplog.messages
        assert told in line
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500000.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has another rotary embedding than"):
        check_base(folder, GGUFFile.open(file))


def windowed(**fields):
    return {"model_type": "mistral", "sliding_window": 100} | fields


def qwen(**fields):
    return windowed(model_type="qwen2", use_sliding_window=True, **fields)


MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "fields",
    [
        windowed(),
        qwen(max_window_layers=0),
        qwen(max_window_layers=1),
        qwen(max_window_layers=2, layer_types=MIXED),
    ],
)
def test_a_window_shortens_the_context(file, tmp_path, caplog, fields):
    folder, plain = directory(tmp_path, **fields), GGUFFile.open(file)
    added = account(folder, plain)
    assert added.keys == [("llama.context_length", "u32", 100)] and not added.tensors
    (line,) = caplog.messages
    assert "sliding attention of 100 tokens, where llama.cpp attends to all: the file's" in line
    caplog.clear()
    check_base(folder, plain)
    (line,) = caplog.messages
    assert line.endswith("up to 100 tokens both are the same")


@pytest.mark.parametrize(
    "fields",
    [
        windowed(sliding_window=256),
        windowed(sliding_window=None),
        windowed(model_type="llama"),
        windowed(model_type="qwen3", max_window_layers=0),
        qwen(),
        qwen(max_window_layers=2),
        qwen(max_window_layers=0, layer_types=MIXED[:1] * 2),
        qwen(max_window_layers=0) | {"use_sliding_window": False},
    ],
)
def test_no_layer_slides_within_the_context(file, tmp_path, caplog, fields):
    folder = directory(tmp_path, **fields)
    assert not account(folder, GGUFFile.open(file))
    check_base(folder, GGUFFile.open(file))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("kinds", "window", "told"),
    [
        ("sf", 4096, None),
        (
            "sf",
            100,
            "layer 0 of .* attends to 100 tokens, where llama.cpp's gemma2 attends to 4096",
        ),
        (
            "ff",
            4096,
            "layer 0 of .* attends to all tokens, where llama.cpp's gemma2 attends to 4096",
        ),
        ("ss", 4096, "4096 tokens"),
        ("ss", 9000, None),  # beyond the context
    ],
)
def test_windows_of_an_architecture_that_slides(tmp_path, caplog, kinds, window, told):
    """llama.cpp takes every second layer of gemma2 for a sliding one, the first one included."""
    n_ctx = 8192 if window < 9000 else 4096
    made = Tiny(n_layer=2, n_embd=128, n_head=4, n_ctx=n_ctx, arch="gemma2")
    file = GGUFFile.open(made.write(tmp_path / "gemma2.gguf"))
    types = [MIXED[kind == "s"] for kind in kinds]
    fields = {"model_type": "gemma2", "hidden_act": "gelu_new", "max_position_embeddings": n_ctx}
    folder = directory(tmp_path, sliding_window=window, layer_types=types, **fields)
    if told and told.startswith("layer"):
        for compare in (account, check_base):
            with pytest.raises(UserError, match=told):
                compare(folder, file)
        return
    added = account(folder, file)
    assert added.keys == ([("gemma2.context_length", "u32", window)] if told else [])
    assert [told in line for line in caplog.messages] == ([True] if told else [])


def test_an_architecture_without_the_tensors(tmp_path):
    path = Tiny(n_layer=2, n_embd=128, n_head=4, n_ctx=256, arch="qwen2").write(tmp_path / "q.gguf")
    with pytest.raises(UserError, match=r"yarn \(beta_fast 16, factor 4.*qwen2 has no keys"):
        account(directory(tmp_path, YARN | {"beta_fast": 16.0}), GGUFFile.open(path))


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_every_field_that_a_model_reads_is_accounted_for(kind, file, tmp_path, monkeypatch):
    """The fields are those that transformers asks for while it builds and runs the model.

    Those that are compared are the ones that the comparison asks the configuration for.
    """
    seen = set()

    class Watched(kind):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    small = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 96, "pad_token_id": 0}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-5, "sliding_window": 100}
    if kind in (Qwen2Config, Qwen3Config):
        small["use_sliding_window"] = True
    if kind is Qwen3Config:
        small["head_dim"] = 32
    model = type(AutoModelForCausalLM.from_config(kind(**small)))
    config = Watched(**small)
    seen.clear()
    model(config)(torch.tensor([[1, 2, 3]]))
    compared = fields_compared(kind(**small), file, tmp_path, monkeypatch)
    assert {*KEYS, *TENSORS} <= compared
    assert seen & set(kind(**small).to_dict()) - compared - NO_EFFECT == set()


def fields_compared(config, file, folder, monkeypatch) -> set[str]:
    """The fields that `account` asks a configuration for."""
    asked = set()

    class Watched(dict):
        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

        def __ror__(self, other):
            return Watched(other | dict(self))

    read_json = hf_directory.read_json
    config.save_pretrained(folder)
    monkeypatch.setattr(hf_directory, "read_json", lambda *args: Watched(read_json(*args)))
    account(folder, GGUFFile.open(file))
    return asked


def test_layers_of_a_hybrid_that_attend_elsewhere_are_named(tmp_path):
    path = Tiny(n_layer=4, n_embd=64, n_head=4, arch="qwen35").write(tmp_path / "hybrid.gguf")
    linear, full = "linear_attention", "full_attention"
    for types, told in (
        ([linear, linear, full, full], "layer 2 of .* type full_attention, that .* does not att"),
        ([linear] * 4, "layer 3 of .* type linear_attention, that .* attends"),
        ([linear, linear, linear, full], None),
    ):
        config = {"model_type": "qwen3_5_text", "layer_types": types, "head_dim": 16}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if told is None:
            check_base(tmp_path, GGUFFile.open(path))
        else:
            with pytest.raises(UserError, match=told):
                check_base(tmp_path, GGUFFile.open(path))
