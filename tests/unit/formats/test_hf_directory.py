"""Directories: configuration and routers are read and checked without torch, damage is named."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.export import read_directory
from mod_export.formats import schema
from mod_export.formats.hf_directory import is_mod, read_config, stored_type
from tests.support.mod_files import N_EMBD, config, edited, router_tensors, write_directory

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("model") / "mod", UNITS)


def test_what_was_written_is_read(mod_dir):
    found, routers = read_directory(mod_dir)
    assert found == config(UNITS) == read_config(mod_dir)
    expected = router_tensors(found)
    assert list(routers) == found.routed()
    for unit, pair in routers.items():
        for name, array in zip(schema.hf_tensor_names(*unit), pair, strict=True):
            assert array.dtype == np.float32 and np.array_equal(array, expected[name])


def test_routers_by_head_are_rows(tmp_path):
    options = {"heads": 3, "windows": {(2, "kv", 1): 4}}
    path = write_directory(tmp_path / "mod", UNITS, **options)
    found, routers = read_directory(path)
    assert found == config(UNITS, **options) and found.version == 2
    stored = load_file(path / "model.safetensors")
    weight, bias = schema.hf_tensor_names(3, "kv")
    assert stored[weight].shape == (3, N_EMBD) and stored[bias].shape == (3,)
    assert not stored[weight][0].any() and not stored[bias][0].any()  # head 0 is not routed
    assert [unit.head for unit in routers if unit.layer == 3 and unit.kind == "kv"] == [1, 2]
    for head in (1, 2):
        w, b = routers[3, "kv", head]
        assert np.array_equal(w, stored[weight][head]) and b == stored[bias][head : head + 1]

    def refused(words, edit):
        with pytest.raises(UserError, match=words):
            read_directory(edited(path, tmp_path / "copy", tensors=edit))

    refused("not of shape", lambda tensors: tensors.update({weight: tensors[weight][:2]}))
    refused("not of shape", lambda tensors: tensors.update({bias: tensors[bias][:1]}))
    refused(
        "has values for head 0, which is not routed",
        lambda tensors: tensors.update({bias: tensors[bias] + 1}),
    )


def test_is_mod(mod_dir, tmp_path):
    assert is_mod(mod_dir) and not is_mod(tmp_path) and not is_mod(tmp_path / "none")
    for text, expected in {"{": False, "[]": False, "{}": False, '{"mod": 1}': True}.items():
        (tmp_path / "config.json").write_text(text)
        assert is_mod(tmp_path) == expected


def test_directories_with_bad_tensors(mod_dir, tmp_path):
    name = schema.hf_tensor_names(3, "kv")[0]
    edits = {
        "is missing": lambda weights: weights.pop(name),
        "not of shape": lambda weights: weights.update({name: weights[name][:-1]}),
        "not finite": lambda weights: weights.update({name: weights[name] * np.nan}),
        "not f32": lambda weights: weights.update({name: weights[name].astype(np.float16)}),
        "no routed unit": lambda weights: weights.update(
            {name.replace(".3.", ".5."): weights[name]}
        ),
    }
    for words, edit in edits.items():
        with pytest.raises(UserError, match=words):
            read_directory(edited(mod_dir, tmp_path / "copy", tensors=edit))
    copy = edited(mod_dir, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    for end in (3, 200, len(weights) // 2):
        (copy / "model.safetensors").write_bytes(weights[:end])
        with pytest.raises(UserError, match="truncated"):
            read_directory(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no safetensors file"):
        read_directory(copy)


def test_bad_configurations(mod_dir, tmp_path):
    def refused(words, text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words) as error:
            read_config(tmp_path)
        assert "\n" not in str(error.value)

    with pytest.raises(UserError, match="has no config.json"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="no such directory: .*none; make one with"):
        read_config(tmp_path / "none")
    with pytest.raises(UserError, match="config.json is a file; give a MoD directory"):
        read_config(mod_dir / "config.json")
    refused("is no JSON", "{")
    refused("holds no JSON object", "[1]")
    refused("is no MoD model: its config.json has no key mod", "{}")
    refused("mod is not an object", '{"mod": 1}')
    data = {"mod": config(UNITS).to_dict()}
    refused("mod.kv_window is 0", json.dumps({"mod": data["mod"] | {"kv_window": 0}}))
    refused("unknown key mod.windows", json.dumps({"mod": data["mod"] | {"windows": 1}}))


def test_a_directory_that_routes_nothing(mod_dir, tmp_path):
    """It may be opened, as a dense model, but there is nothing to export."""
    copy = edited(
        mod_dir, tmp_path / "copy", config=lambda data: data.update(mod=MoDConfig().to_dict())
    )
    assert read_config(copy).routed() == []
    with pytest.raises(UserError, match="routes no unit"):
        read_directory(copy)


def test_stored_type_is_the_widest_of_the_matrices(mod_dir, tmp_path):
    assert stored_type(mod_dir) == "f32"

    def write(**dtypes: str):
        header, at = {}, 0
        for name, dtype in dtypes.items():
            shape = [2, 2] if name.startswith("matrix") else [4]
            nbytes = 4 * (4 if dtype == "F32" else 2)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(
            struct.pack("<Q", len(text)) + text + bytes(at)
        )

    write(matrix="BF16", norm="F32")
    assert stored_type(tmp_path) == "bf16"
    write(matrix="F16", matrix2="BF16")
    assert stored_type(tmp_path) == "bf16"
    write(matrix="F16", norm="F32")
    assert stored_type(tmp_path) == "f16"
    write(matrix="BF16", matrix2="F32")
    assert stored_type(tmp_path) == "f32"
    write(norm="BF16")
    assert stored_type(tmp_path) == "f32"
