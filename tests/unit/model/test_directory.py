"""A MoD model as a directory: the round trip is exact, damage is named, nothing is left half
written.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mod_export.errors import UserError
from mod_export.formats.hf_directory import stored_type
from mod_export.model.mod_model import MoDModel
from tests.support import tiny_torch as tiny

IDS = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(7))
UNITS = {"kv": [2, 3], "attn": [3, 4], "ffn": [1]}


@pytest.fixture
def saved(tmp_path):
    model = tiny.mod_model(UNITS, IDS, n_vocab=len(tiny.tokenizer()))
    model.tokenizer = tiny.tokenizer()
    model.save(tmp_path / "mod")
    return model, tmp_path / "mod"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["50GB", "100KB"])
@torch.inference_mode()
def test_round_trip(tmp_path, tied, shard):
    model = tiny.mod_model(UNITS, IDS, tied=tied)
    model.tokenizer = tiny.tokenizer()
    logits, trace = model(IDS, trace=True)
    model.save(tmp_path / "mod", max_shard_size=shard)
    assert len(list((tmp_path / "mod").glob("*.safetensors"))) > (shard == "100KB")
    again = MoDModel.load(tmp_path / "mod")
    logits_again, trace_again = again(IDS, trace=True)
    assert torch.equal(logits, logits_again)
    assert torch.equal(trace.logit, trace_again.logit)
    assert again.config == model.config
    text = "Two  33 apples\n\n 4"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


@torch.inference_mode()
def test_it_stays_a_directory_of_the_base_architecture(saved):
    model, path = saved
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["mod"] == model.config.to_dict()
    assert not hasattr(model.base.config, "mod")  # the base in memory stays as it was
    tensors = load_file(path / "model.safetensors")
    for layer, kind in model.config.routed():
        weight, bias = (
            tensors[f"model.layers.{layer}.mod_{kind}.{part}"] for part in ("weight", "bias")
        )
        assert (weight.shape, bias.shape, weight.dtype) == ((64,), (1,), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.force = "active"
    assert torch.equal(plain(IDS).logits, model(IDS))


def test_an_existing_directory_is_kept_without_force(saved):
    model, path = saved
    before = (path / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="--force"):
        model.save(path)
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    model.save(path, force=True)
    assert (path / "model.safetensors").stat().st_mtime_ns != before
    assert [p.name for p in path.parent.iterdir()] == ["mod"]


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["mod"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


NAME = "model.layers.3.mod_attn.weight"


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda p: change_tensors(p, lambda t: t.pop(NAME)), NAME),
        (lambda p: change_tensors(p, lambda t: t.update({NAME: torch.zeros(65)})), NAME),
        (
            lambda p: change_tensors(p, lambda t: t.update({NAME: torch.full((64,), torch.inf)})),
            NAME,
        ),
        (
            lambda p: change_tensors(p, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            "mlp.up_proj.weight",
        ),
        (lambda p: change_config(p, version=9), "mod.version"),
        (lambda p: change_config(p, kv_window=0), "mod.kv_window"),
        (lambda p: change_config(p, windows=1), "mod.windows"),
        (
            lambda p: (p / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'),
            "no key mod",
        ),
        (lambda p: (p / "config.json").write_text("{"), "config.json"),
        (lambda p: (p / "config.json").unlink(), "config.json"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 100), "model.safetensors"),
    ],
)
def test_damage_is_named(saved, damage, named):
    damage(saved[1])
    with pytest.raises(UserError) as error:
        MoDModel.load(saved[1])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_stored_type_of_what_transformers_saves(tmp_path):
    tiny.base().bfloat16().save_pretrained(tmp_path / "half")
    assert stored_type(tmp_path / "half") == "bf16"
