"""The files of an adapter without LoRA, read without torch: damage is named."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mod_export.errors import UserError
from mod_export.formats import adapter_files, schema
from tests.support.mod_files import config, router_tensors, write_adapter

UNITS = {"kv": [2, 3], "attn": [3, 4], "ffn": [1]}
NAME = "model.layers.3.mod_kv.weight"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "routers", UNITS)


def test_what_was_written_is_read(adapter):
    found = adapter_files.read(adapter)
    assert found.config == config(UNITS) and not found.lora and found.base["n_embd"] == 64
    expected = router_tensors(found.config)
    for unit, pair in found.routers.items():
        for name, array in zip(schema.hf_tensor_names(*unit), pair, strict=True):
            assert np.array_equal(array, expected[name])


def test_routers_by_head(tmp_path):
    found = adapter_files.read(write_adapter(tmp_path / "heads", UNITS, heads=2))
    assert found.config == config(UNITS, heads=2)
    expected = router_tensors(found.config)
    for head in range(2):
        w, b = found.routers[2, "kv", head]
        assert np.array_equal(w, expected["model.layers.2.mod_kv.weight"][head])
        assert b == expected["model.layers.2.mod_kv.bias"][head]


def tensors(file, change):
    def damage(path):
        held = load_file(path / file)
        change(held)
        save_file(held, path / file)

    return damage


def values(file, change):
    def damage(path):
        data = json.loads((path / file).read_text())
        change(data)
        (path / file).write_text(json.dumps(data))

    return damage


def remove(file):
    return lambda path: (path / file).unlink()


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


DAMAGE = {
    "no mod.json": (remove("mod.json"), "has no mod.json"),
    "mod.json broken": (lambda path: (path / "mod.json").write_text("{"), "mod.json is no JSON"),
    "mod.json a list": (
        lambda path: (path / "mod.json").write_text("[]"),
        "mod.json holds no JSON object",
    ),
    "mod.json not text": (
        lambda path: (path / "mod.json").write_bytes(b"\xff\xfe"),
        "mod.json is no JSON",
    ),
    "no key base": (values("mod.json", lambda d: d.pop("base")), "the keys mod and base"),
    "model a number": (values("mod.json", lambda d: d.update(model=1)), "or model is no text"),
    "other version": (values("mod.json", lambda d: d["mod"].update(version=2)), "mod.version is 2"),
    "other key": (values("mod.json", lambda d: d["mod"].update(sinks=2)), "mod.sinks"),
    "no unit": (
        values("mod.json", lambda d: [d["mod"].pop(kind) for kind in UNITS]),
        "routes no unit",
    ),
    "layers": (values("mod.json", lambda d: d["base"].update(n_layer=7)), "the model has 7 layers"),
    "no layers": (values("mod.json", lambda d: d["base"].update(n_layer=0)), "base.n_layer is 0"),
    "base name": (values("mod.json", lambda d: d["base"].update(name=None)), "base.name is None"),
    "base key": (
        values("mod.json", lambda d: d["base"].pop("tokenizer")),
        "base is not an object with the keys",
    ),
    "weights": (
        values("mod.json", lambda d: d["base"]["weights"]["ffn"].pop()),
        "base.weights.ffn",
    ),
    "weights nan": (
        values("mod.json", lambda d: d["base"]["weights"].update(ffn=[float("nan")] * 128)),
        "weights.ffn",
    ),
    "width": (values("mod.json", lambda d: d["base"].update(n_embd=65)), "n_embd 64, the model 65"),
    "no routers": (remove("routers.safetensors"), "has no routers.safetensors"),
    "router missing": (tensors("routers.safetensors", lambda t: t.pop(NAME)), f"{NAME} is missing"),
    "router short": (
        tensors("routers.safetensors", lambda t: t.update({NAME: np.zeros(63, np.float32)})),
        f"{NAME} is not of",
    ),
    "router nan": (
        tensors("routers.safetensors", lambda t: t.update({NAME: t[NAME] * np.nan})),
        f"{NAME} holds a value",
    ),
    "router f16": (
        tensors("routers.safetensors", lambda t: t.update({NAME: t[NAME].astype(np.float16)})),
        f"{NAME} is not f32",
    ),
    "router too many": (
        tensors("routers.safetensors", lambda t: t.update({NAME.replace("3", "5"): t[NAME]})),
        "no routed unit",
    ),
    "routers truncated": (
        lambda p: cut(p / "routers.safetensors"),
        "routers.safetensors is damaged or truncated",
    ),
    "no config": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(b""),
        "has no adapter_config.json",
    ),
    "no weights": (
        lambda path: (path / "adapter_config.json").write_text("{}"),
        "has no adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(adapter, tmp_path, what):
    damage, words = DAMAGE[what]
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    damage(copy)
    with pytest.raises(UserError) as error:
        adapter_files.read(copy)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert error.value.cure


def test_damaged_at_random_places(adapter, tmp_path):
    """Any byte of a header or of mod.json may be wrong; there is no exception but UserError."""
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    rng = random.Random(1)
    refused = 0
    for file in ("mod.json", "routers.safetensors"):
        good = (copy / file).read_bytes()
        is_json = file.endswith("json")
        header = len(good) if is_json else 8 + int.from_bytes(good[:8], "little")
        for _ in range(60):
            damaged = bytearray(good)
            for place in rng.sample(range(header), 2):
                damaged[place] = rng.randrange(256)
            (copy / file).write_bytes(damaged)
            try:
                adapter_files.read(copy)
            except UserError:
                refused += 1
        (copy / file).write_bytes(good)
    assert refused > 50
    adapter_files.read(copy)


def test_packaged(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_files, "PACKAGED", tmp_path / "adapters")
    with pytest.raises(UserError, match="no such adapter: tiny-kv; give a directory$"):
        adapter_files.resolve("tiny-kv")
    (tmp_path / "adapters").mkdir()
    shutil.copytree(adapter, tmp_path / "adapters/tiny-kv")
    assert (
        adapter_files.packaged("tiny-kv")
        == adapter_files.resolve("tiny-kv")
        == tmp_path / "adapters/tiny-kv"
    )
    assert (
        adapter_files.packaged("../adapters/tiny-kv") is None and adapter_files.packaged("") is None
    )
    with pytest.raises(UserError, match="or one of tiny-kv"):
        adapter_files.resolve("none")
    with pytest.raises(UserError, match="is no adapter"):
        adapter_files.resolve(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, tmp_path / "tiny-kv")  # a path goes before a packaged name
    assert adapter_files.resolve("tiny-kv") == Path("tiny-kv")
