"""Adapters through the real export.

Merged adapters agree with torch in the runtime, and routers go onto any GGUF.
"""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from mod_export.adapter import apply, base_identity, load, save
from mod_export.convert import convert_adapter
from mod_export.errors import UserError
from mod_export.evaluation.parity import report, verify
from mod_export.export import export
from mod_export.formats import adapter_files
from mod_export.formats.base_identity import UNRELATED_DISTANCE, compare, gguf_identity
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.schema import read_routers
from mod_export.inspection import inspect
from mod_export.llamacpp.converter import quantize
from mod_export.model import loading
from mod_export.model.lora import inject_lora
from mod_export.runtime import bindings
from tests.support import tiny_torch as tiny
from tests.support.routers_beside import needs_routers_beside
from tests.support.tiny_adapter import fill_lora

patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


def plain(**kwargs):
    return tiny.base(n_vocab=len(tiny.tokenizer()), **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, its adapters and its GGUF files.

    base/ is a directory, routers/ and lora/ are adapters for it; f32.gguf, q8_0.gguf and q4_0.gguf
    are made of it.
    """
    path = tmp_path_factory.mktemp("adapters")
    base = plain()
    base.save_pretrained(path / "base")
    tiny.tokenizer().save_pretrained(path / "base")
    identity = base_identity(base, tiny.tokenizer(), "tiny")
    model = tiny.wrap(base, tiny.config(UNITS), tokenizer=tiny.tokenizer())
    save(path / "routers", model.config, model.router_tensors(), base, identity)
    model.save(path / "mod")
    export(path / "mod", path / "f32.gguf", quant="f32", dense=True)
    for quant in ("q8_0", "q4_0"):
        export(
            path / "mod", path / f"{quant}.gguf", base=path / "f32.gguf", quant=quant, dense=True
        )
    inject_lora(base, rank=4, alpha=8, seed=1)
    fill_lora(base)
    save(path / "lora", model.config, model.router_tensors(), base, identity)
    return path


@patched
def test_merged_and_exported_it_agrees_with_torch(folder, tmp_path):
    convert_adapter(folder / "base", tmp_path / "mod", folder / "lora")
    export(tmp_path / "mod", tmp_path / "mod.gguf", quant="f32")
    export(folder / "lora", tmp_path / "same.gguf", quant="f32", base=folder / "base")
    for name in ("mod.gguf", "same.gguf"):
        sides = {"reference": tmp_path / "mod"}
        if name == "same.gguf":
            sides = {"reference": folder / "lora", "base": folder / "base"}
        result = verify(tmp_path / name, **sides, n_tokens=400, length=200, threads=1)
    assert result["passed"] and 0.1 < result["activation"] < 0.9, report(result)
    # LoRA is in it: the weights are not the base's
    ours, theirs = (
        GGUFFile.open(path).tensors["blk.2.ffn_up.weight"]
        for path in (tmp_path / "mod.gguf", folder / "f32.gguf")
    )
    assert not np.allclose(ours.array(), theirs.array(), atol=1e-3)


@torch.no_grad()
def test_lora_goes_into_the_layers_of_a_gguf_file_when_they_are_read(folder, tmp_path):
    """As it goes into a model that is in memory; the attention is stored in another order."""
    whole, tokenizer = loading.load(folder / "q8_0.gguf")
    apply(load(folder / "lora"), whole, tokenizer)
    convert_adapter(folder / "q8_0.gguf", tmp_path / "mod", folder / "lora")
    made, _ = loading.load(tmp_path / "mod")
    assert all(torch.equal(made.state_dict()[k], v) for k, v in whole.state_dict().items())


@patched
def test_routers_on_a_gguf_agree_with_torch(folder, tmp_path):
    """Onto the file itself, and onto the directory that it was made of, it is the same model."""
    export(folder / "routers", tmp_path / "mod.gguf", base=folder / "f32.gguf")
    reference = {"reference": folder / "routers", "base": folder / "base"}
    result = verify(tmp_path / "mod.gguf", **reference, n_tokens=400, length=200, threads=1)
    assert result["passed"] and result["weights"] == "f32", report(result)
    export(folder / "routers", tmp_path / "other.gguf", quant="f32", base=folder / "base")
    one, other = (GGUFFile.open(tmp_path / f"{name}.gguf").tensors for name in ("mod", "other"))
    assert one.keys() == other.keys()
    assert all(bytes(one[name].data) == bytes(other[name].data) for name in one)
    assert not list(tmp_path.glob(".*"))


@needs_routers_beside
def test_routers_beside_a_gguf_agree_with_torch(folder, tmp_path):
    convert_adapter(folder / "base", tmp_path / "mod", folder / "routers")
    routers = str(export(folder / "routers", tmp_path / "routers.gguf"))
    args = {"n_tokens": 400, "length": 200, "threads": 1}
    result = verify(folder / "f32.gguf", tmp_path / "mod", **args, mod=routers)
    assert result["passed"] and 0.1 < result["activation"] < 0.9, report(result)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_routers_on_a_quantised_gguf(folder, tmp_path, run_cli, quant):
    """The file is the base's, byte for byte, and the adapter's routers more."""
    base = folder / f"{quant}.gguf"
    result = run_cli("export", folder / "routers", "--base", base, "-o", tmp_path / "mod.gguf")
    assert result.returncode == 0, result.stderr
    ours, theirs = GGUFFile.open(tmp_path / "mod.gguf"), GGUFFile.open(base)
    assert all(ours.tensors[name].data == tensor.data for name, tensor in theirs.tensors.items())
    assert theirs.keys.keys() <= ours.keys.keys()
    adapter = load(folder / "routers")
    _, routers = read_routers(ours)
    assert routers.keys() == adapter.routers.keys()
    for unit, pair in adapter.routers.items():
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(routers[unit], pair, strict=True))
    assert [
        tuple(unit.values())[:2] for unit in inspect(tmp_path / "mod.gguf")["mod"]["units"]
    ] == [(layer, kind) for layer, kind in adapter.config.routed()]


def test_a_file_that_is_quantised_gives_its_room_back_meanwhile(folder, tmp_path):
    source, kept = tmp_path / "source.gguf", tmp_path / "kept.gguf"
    shutil.copyfile(folder / "f32.gguf", source)
    kept.hardlink_to(source)
    quantize(source, tmp_path / "made.gguf", "q8_0", consume=True)
    assert not source.exists() and kept.stat().st_blocks * 512 < 0.2 * kept.stat().st_size
    made, expected = GGUFFile.open(tmp_path / "made.gguf"), GGUFFile.open(folder / "q8_0.gguf")
    assert all(made.tensors[name].data == t.data for name, t in expected.tensors.items())


@pytest.mark.parametrize(
    ("model", "adapter", "options", "file_type"),
    [
        ("q8_0.gguf", "routers", [], 7),  # onto the file itself
        ("q8_0.gguf", "routers", ["--quant", "f16"], 1),
        ("q8_0.gguf", "lora", ["--quant", "f16"], 1),
        ("base", "routers", ["--base", "q4_0.gguf"], 2),
    ],
)
def test_convert_writes_a_file(folder, tmp_path, run_cli, model, adapter, options, file_type):
    args = ("--adapter", adapter, "-o", tmp_path / "mod.gguf", *options)
    done = run_cli("convert", model, *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert ".tmp" not in done.stderr
    ours, theirs = GGUFFile.open(tmp_path / "mod.gguf"), GGUFFile.open(folder / "q8_0.gguf")
    assert ours.keys["general.file_type"].value == file_type
    assert read_routers(ours)[1].keys() == load(folder / adapter).routers.keys()
    same = all(ours.tensors[name].data == tensor.data for name, tensor in theirs.tensors.items())
    assert same == (not options)
    assert [path.name for path in tmp_path.iterdir()] == ["mod.gguf"]


def test_convert_refuses_before_the_work(folder, tmp_path, run_cli):
    (tmp_path / "there.gguf").write_text("mine")
    for options, message in (
        (["-o", "there.gguf"], "there.gguf exists already; use --force"),
        (["-o", "mod", "--quant", "f16"], "--quant is for a GGUF file, and mod is a directory"),
        (["-o", "mod.gguf", "--base", "none.gguf"], "no such file: none.gguf"),
        (["-o", "mod.gguf", "--save", "full"], "--save is for a directory, and mod.gguf is a GGUF"),
        (["-o", "mod", "--adapter", folder / "lora", "--save", "adapter"], "is an adapter already"),
        (["-o", "no/mod.gguf"], "there is no directory"),
    ):
        done = run_cli("convert", folder / "base", *options, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_identity_is_that_of_the_torch_model(folder):
    identity = base_identity(plain(), tiny.tokenizer(), "tiny")
    seen = {
        name: gguf_identity(GGUFFile.open(folder / f"{name}.gguf"))
        for name in ("f32", "q8_0", "q4_0")
    }
    for key in ("n_layer", "n_embd", "n_vocab", "tokenizer"):
        assert all(other[key] == identity[key] for other in seen.values())
    assert seen["f32"]["weights"]["embedding"] == identity["weights"]["embedding"]
    distance = {name: compare(identity, other) for name, other in seen.items()}
    assert (
        distance["f32"] == 0 < distance["q8_0"] < 0.02 < distance["q4_0"] < 0.3 < UNRELATED_DISTANCE
    )


def test_packaged(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_files, "PACKAGED", tmp_path)
    shutil.copytree(folder / "routers", tmp_path / "tiny-kv")
    export(Path("tiny-kv"), tmp_path / "mod.gguf", base=folder / "f32.gguf")
    assert inspect(tmp_path / "mod.gguf")["mod"]


def changed(source, target, vocabulary=None, **numbers):
    """A copy of a GGUF's header with other numbers or another vocabulary, enough to be refused."""
    file = GGUFFile.open(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name in ("block_count", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", numbers.get(name, file.get(f"llama.{name}")))
    writer.add_array("tokenizer.ggml.tokens", vocabulary or file.get("tokenizer.ggml.tokens"))
    rows = file.tensors["token_embd.weight"].array()
    writer.add_tensor("token_embd.weight", rows[: numbers.get("n_vocab")] * numbers.get("scale", 1))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return target


def test_refusals(folder, tmp_path):
    tokens = GGUFFile.open(folder / "f32.gguf").get("tokenizer.ggml.tokens")
    f32, routers, out = folder / "f32.gguf", folder / "routers", tmp_path / "out.gguf"
    for base, words in (
        (changed(f32, tmp_path / "1", block_count=5), "with n_layer 6, .* has 5"),
        (changed(f32, tmp_path / "2", embedding_length=32), "with n_embd 64, .* has 32"),
        (changed(f32, tmp_path / "3", n_vocab=1000), "with n_vocab 49152, .* has 1000"),
        (changed(f32, tmp_path / "4", vocabulary=tokens[::-1]), "has another tokenizer"),
        (changed(f32, tmp_path / "5", scale=-1), "of the same shape has other weights"),
        (tmp_path / "none.gguf", "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            export(routers, out, base=base)
    export(routers, out, base=f32)
    with pytest.raises(UserError, match="has routers already"):
        export(routers, tmp_path / "again.gguf", base=out)
    assert not (tmp_path / "again.gguf").exists()
