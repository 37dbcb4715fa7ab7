"""Layers for drafts: which tensors they are, what is shared, and what stays behind."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mod_export.errors import UserError
from mod_export.formats import drafts, hf_directory
from mod_export.formats.gguf import GGUFFile, write
from mod_export.formats.sliding_windows import draft_layers, main_layers

RNG = np.random.default_rng(0)
N_LAYER, WIDTH, N_VOCAB = 4, 16, 40
ARCH = "nemotron_h_moe"


def values(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mtp.fc.weight", True),
        ("mtp.layers.0.mlp.up_proj.weight", True),
        ("model.mtp.layers.1.norm.weight", True),
        ("model.mtp_block.0.norm.weight", True),
        ("model.layers.4.eh_proj.weight", True),
        ("model.language_model.layers.4.enorm.weight", True),
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.language_model.layers.3.mlp.up_proj.weight", False),
        ("model.visual.layers.9.mlp.up_proj.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_drafts_are_told_by_their_names(name, expected):
    assert drafts.is_draft(name, N_LAYER) == expected


@pytest.fixture
def model():
    """The tensors of a checkpoint of a model that also takes images, with copies in its drafts."""
    text = {
        "model.language_model.embed_tokens.weight": values(N_VOCAB, WIDTH),
        "model.language_model.layers.3.mlp.up_proj.weight": values(8, WIDTH),
        "lm_head.weight": values(N_VOCAB, WIDTH),
        "model.visual.layers.9.mlp.up_proj.weight": values(8, WIDTH),
    }
    behind = "model.language_model.layers.4."
    return text | {
        f"{behind}eh_proj.weight": values(WIDTH, 2 * WIDTH),
        f"{behind}embed_tokens.weight": text["model.language_model.embed_tokens.weight"],
        f"{behind}shared_head.head.weight": values(N_VOCAB, WIDTH),
    }


def saved(path, tensors):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def test_a_directory_gets_what_it_lacks_and_copies_follow_the_model(model, tmp_path):
    """A model all of whose weights were trained has another embedding than its drafts had."""
    source = saved(tmp_path / "source", model)
    own = {
        "model.embed_tokens.weight": values(N_VOCAB, WIDTH),
        "model.layers.3.mlp.up_proj.weight": values(8, WIDTH),
        "lm_head.weight": values(N_VOCAB, WIDTH),
    }
    target = saved(tmp_path / "target", own)
    drafts.carry(source, target, N_LAYER)
    weight_map = hf_directory.read_json(target / hf_directory.WEIGHTS_INDEX, "")["weight_map"]
    found = {name: load_file(target / file)[name] for name, file in weight_map.items()}
    behind = "model.layers.4."
    expected = own | {
        f"{behind}eh_proj.weight": model["model.language_model.layers.4.eh_proj.weight"],
        f"{behind}embed_tokens.weight": own["model.embed_tokens.weight"],
        f"{behind}shared_head.head.weight": model[
            "model.language_model.layers.4.shared_head.head.weight"  # one of its own
        ],
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    before = sorted(path.name for path in target.iterdir())
    drafts.carry(source, target, N_LAYER)  # all are there
    assert before == sorted(path.name for path in target.iterdir()) and len(before) == 3


def test_quantised_ones_stay_behind_and_a_line_says_what_to_do(model, tmp_path, caplog):
    model["model.language_model.layers.4.eh_proj.weight"] = np.ones((WIDTH, 8), np.int8)
    source, target = saved(tmp_path / "source", model), saved(tmp_path / "target", {"a": values(1)})
    drafts.carry(source, target, N_LAYER)
    (line,) = caplog.messages
    assert "of the type I8: give the model in bf16, or put an adapter on a GGUF file" in line
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]


def gguf(path, n_draft: int = 0, n_layer: int = N_LAYER, arch: str = ARCH, **more) -> GGUFFile:
    """A file of layers that have one tensor each, and of drafts that share the embedding."""
    count = n_layer + n_draft
    keys = [
        ("general.architecture", "string", arch),
        (f"{arch}.block_count", "u32", count),
        (f"{arch}.attention.head_count_kv", "u32[]", range(count)),
        (f"{arch}.rope.dimension_sections", "u32[]", range(N_LAYER)),
    ]
    tensors = {"token_embd.weight": values(N_VOCAB, WIDTH)}
    tensors |= {f"blk.{layer}.attn_q.weight": values(WIDTH, WIDTH) for layer in range(count)}
    if n_draft:
        keys.append((f"{arch}.nextn_predict_layers", "u32", n_draft))
        noise = 0.1 * values(N_VOCAB, WIDTH)  # as of another quantisation
        tensors[f"blk.{n_layer}.nextn.embed_tokens.weight"] = tensors["token_embd.weight"] + noise
        tensors[f"blk.{n_layer}.nextn.shared_head_head.weight"] = values(N_VOCAB, WIDTH)
    else:
        keys.append((f"{arch}.attention.window_pattern", "bool[]", [True] * count))
    with path.open("wb") as file:
        write(file, keys, tensors)
    return GGUFFile.open(path)


def test_those_of_a_gguf_file_go_behind_the_layers_of_another(tmp_path):
    source, plain = gguf(tmp_path / "source.gguf", n_draft=2), gguf(tmp_path / "plain.gguf")
    expected = {name: tensor.array().copy() for name, tensor in plain.tensors.items()}
    for target in (tmp_path / "mod", tmp_path / "again"):
        target.mkdir()
    drafts.carry(source.path, tmp_path / "mod", N_LAYER)
    drafts.carry(tmp_path / "mod", tmp_path / "again", N_LAYER)
    kept = GGUFFile.open(tmp_path / "again" / hf_directory.DRAFTS)
    drafts.append(plain, kept, tmp_path / "whole.gguf")
    whole = GGUFFile.open(tmp_path / "whole.gguf")
    assert draft_layers(whole) == 2 and main_layers(whole) == N_LAYER
    assert whole.get(f"{ARCH}.attention.head_count_kv").tolist() == [0, 1, 2, 3, 4, 5]
    assert whole.get(f"{ARCH}.attention.window_pattern").tolist() == [True] * 4 + [False] * 2
    assert whole.get(f"{ARCH}.rope.dimension_sections").tolist() == [0, 1, 2, 3]
    own = "blk.4.nextn.shared_head_head.weight"  # the embedding is the model's
    for name in ("blk.4.attn_q.weight", "blk.5.attn_q.weight", own):
        expected[name] = source.tensors[name].array()
    assert whole.tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(whole.tensors[name].array(), value)


@pytest.mark.parametrize("other", [{"arch": "qwen35"}, {"n_layer": 3}])
def test_layers_of_another_model_are_refused(tmp_path, other):
    plain, kept = gguf(tmp_path / "plain.gguf"), gguf(tmp_path / "a.gguf", n_draft=1, **other)
    with pytest.raises(UserError, match=r"a\.gguf has layers for drafts of a .*; remove") as error:
        drafts.append(plain, kept, tmp_path / "whole.gguf")
    assert not (tmp_path / "whole.gguf").exists(), error
