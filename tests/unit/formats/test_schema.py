"""The schema: what a MoD file has, and what breaks its rules."""

import gguf
import numpy as np
import pytest

from mod_export.config import UnitConfig
from mod_export.errors import UserError
from mod_export.export import export, read_directory
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.inspection import inspect
from tests.support.bad_gguf import SCHEMA_RULES, write
from tests.support.mod_files import keys_of, tensors_of, write_directory
from tests.support.tiny_gguf import Tiny

UNITS = {"kv": [2, 3], "attn": [3], "ffn": [4]}


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("model") / "mod", UNITS)


@pytest.fixture(scope="module")
def mod_file(tmp_path_factory, mod_dir):
    """The directory's routers on a dense file."""
    folder = tmp_path_factory.mktemp("out")
    base = Tiny(n_layer=6, n_embd=64, n_head=2, n_ff=64).write(folder / "base.gguf")
    export(mod_dir, folder / "mod.gguf", base=base)
    return folder / "mod.gguf"


def test_keys_and_types(mod_file, mod_dir):
    config, _ = read_directory(mod_dir)
    V = gguf.GGUFValueType
    keys = {
        name: value for name, value in keys_of(mod_file).items() if name.startswith("llama.mod.")
    }
    expected = {
        "llama.mod.version": ([V.UINT32], 1),
        "llama.mod.gating_func": ([V.STRING], "sigmoid"),
        "llama.mod.scale_output": ([V.BOOL], False),
        "llama.mod.sink_tokens": ([V.UINT32], config.sink_tokens),
        "llama.mod.kv_window": ([V.UINT32], config.kv_window),
    }
    for kind in UNITS:
        for name in ("threshold", "activation"):
            values = np.float32(getattr(config.units[kind], name)).tolist()
            expected[f"llama.mod.{kind}.{name}"] = ([V.ARRAY, V.FLOAT32], values)
    assert keys == expected


def test_router_tensors(mod_file, mod_dir):
    config, routers = read_directory(mod_dir)
    assert config.routed() == [(2, "kv"), (3, "kv"), (3, "attn"), (4, "ffn")]
    tensors = tensors_of(mod_file)
    for unit in config.routed():
        weight, bias = routers[unit]
        names = schema.tensor_names(*unit)
        assert tensors[names[0]] == (
            gguf.GGMLQuantizationType.F32,
            (len(weight),),
            weight.tobytes(),
        )
        assert tensors[names[1]] == (gguf.GGMLQuantizationType.F32, (1,), bias.tobytes())


def test_what_was_written_is_read(mod_file, mod_dir):
    config, routers = read_directory(mod_dir)
    found, tensors = schema.read_routers(GGUFFile.open(mod_file))
    assert found.routed() == config.routed() and found.kv_window == config.kv_window
    assert tensors.keys() == routers.keys()
    for unit, pair in routers.items():
        assert all(np.array_equal(a, b) for a, b in zip(tensors[unit], pair, strict=True))


def test_good_file_of_the_same_make(tmp_path):
    write(tmp_path / "good.gguf")
    assert inspect(tmp_path / "good.gguf")["mod"]["units"] == [
        {"layer": 2, "kind": "kv", "threshold": 0.5, "activation": 0.5}
    ]


@pytest.mark.parametrize("what", SCHEMA_RULES)
def test_schema_rules(tmp_path, what):
    options, words = SCHEMA_RULES[what]
    write(tmp_path / "bad.gguf", **options)
    with pytest.raises(UserError, match=words):
        inspect(tmp_path / "bad.gguf")


# 2 K/V heads: 2 units in layer 2, and 1 in layer 3, whose head 0 is not routed
BY_HEAD = {"heads": 2, "windows": {(2, "kv", 1): 4}}


@pytest.fixture(scope="module")
def head_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    return Tiny(n_layer=6, n_embd=64, n_head=4, n_head_kv=2, n_ff=64).write(path)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory, head_base):
    """A file of version 2: its kv units are of single heads, and one has a window of its own."""
    folder = tmp_path_factory.mktemp("heads")
    directory = write_directory(folder / "mod", UNITS, **BY_HEAD)
    export(directory, folder / "mod.gguf", base=head_base)
    return directory, folder / "mod.gguf"


def test_keys_and_tensors_of_version_2(head_file):
    directory, path = head_file
    keys, tensors = keys_of(path), tensors_of(path)
    V = gguf.GGUFValueType
    assert keys["llama.mod.version"] == ([V.UINT32], 2)
    p = [0.0] * 4 + [0.5, 0.5, 0.0, 0.5] + [0.0] * 4
    assert keys["llama.mod.kv.threshold"] == ([V.ARRAY, V.FLOAT32], p)
    assert keys["llama.mod.kv.window"] == ([V.ARRAY, V.UINT32], [8] * 5 + [4] + [8] * 6)
    assert "llama.mod.attn.window" not in keys
    assert len(keys["llama.mod.attn.threshold"][1]) == 6
    _, routers = read_directory(directory)
    for layer, heads in {2: (0, 1), 3: (1,)}.items():
        _, shape, data = tensors[f"blk.{layer}.mod_kv.weight"]
        assert shape == (64, 2)  # in the order of GGUF
        w = np.frombuffer(data, np.float32).reshape(2, 64)
        _, shape, data = tensors[f"blk.{layer}.mod_kv.bias"]
        assert shape == (2,)
        b = np.frombuffer(data, np.float32)
        for head in range(2):
            unit = (layer, "kv", head)
            expected = routers[unit] if head in heads else (np.zeros(64), np.zeros(1))
            assert np.array_equal(w[head], expected[0]) and b[head] == expected[1][0]


def test_what_was_written_by_head_is_read(head_file):
    directory, path = head_file
    config, routers = read_directory(directory)
    assert config.routed() == [
        (2, "kv", 0),
        (2, "kv", 1),
        (3, "kv", 1),
        (3, "attn"),
        (4, "ffn"),
    ]
    found, tensors = schema.read_routers(GGUFFile.open(path))
    assert found.version == 2 and found.routed() == config.routed()
    assert [found.window(unit) for unit in found.routed()] == [8, 4, 8, 8, 8]
    for unit, pair in routers.items():
        assert all(np.array_equal(a, b) for a, b in zip(tensors[unit], pair, strict=True))


def test_own_windows_with_one_decision_per_layer(tmp_path, head_base):
    directory = write_directory(tmp_path / "mod", UNITS, windows={(3, "kv"): 5})
    export(directory, tmp_path / "mod.gguf", base=head_base)
    keys = keys_of(tmp_path / "mod.gguf")
    assert keys["llama.mod.version"][1] == 2
    assert keys["llama.mod.kv.window"][1] == [8, 8, 8, 5, 8, 8]
    assert tensors_of(tmp_path / "mod.gguf")["blk.3.mod_kv.weight"][1] == (64,)
    found, _ = schema.read_routers(GGUFFile.open(tmp_path / "mod.gguf"))
    assert found.units["kv"] == UnitConfig(
        (0.0, 0.0, 0.5, 0.5, 0.0, 0.0), (1.0, 1.0, 0.5, 0.5, 1.0, 1.0), window=(8, 8, 8, 5, 8, 8)
    )


VERSION_2_RULES = {
    "version 1": ({"version": 1}, {}, "key llama.mod.version is 1, but the model has kv units"),
    "version 3": ({"version": 3}, {}, "key llama.mod.version is 3, known are 1 and 2"),
    "too many thresholds": (
        {"kv.threshold": [0.5] * 13},
        {},
        "mod.kv.threshold has 13 values; the model has 6 layers",
    ),
    "other heads": (
        {"kv.threshold": [0.0] * 12 + [0.5] * 6, "kv.activation": [1.0] * 18},
        {"drop": "kv.window"},
        "kv.threshold would decide for 3 K/V heads in each layer, the model can for 2",
    ),
    "windows": ({"kv.window": [8] * 11}, {}, "mod.kv.window has 11 values"),
    "a window of 0": (
        {"kv.window": [8] * 4 + [0] + [8] * 7},
        {},
        "mod.kv.window of head 0 of layer 2 is 0",
    ),
    "a window without a router": (
        {"kv.window": [4] + [8] * 11},
        {},
        "mod.kv.window of head 0 of layer 0, which is not routed, is 4",
    ),
    "a larger window": (
        {"kv_window": 9, "kv.window": [9] * 4 + [8, 4, 9, 8] + [9] * 4},
        {},
        "mod.kv_window is 9, the largest own window of a routed unit is 8",
    ),
    "a threshold of 1": (
        {"kv.threshold": [0.0] * 5 + [1.0] + [0.0] * 6},
        {},
        "mod.kv.threshold of head 1 of layer 2 is 1.0",
    ),
    "a head without threshold": (
        {"kv.threshold": [0.0] * 4 + [0.5, 0.0, 0.0, 0.5] + [0.0] * 4, "kv.window": [8] * 12},
        {},
        "tensor blk.2.mod_kv.weight has values for head 1, which is not routed",
    ),
    "a router of the layer": (
        {},
        {"blk.2.mod_kv.weight": np.ones(64, np.float32)},
        r"tensor blk.2.mod_kv.weight is not f32 of shape \[64, 2\]",
    ),
    "one bias": (
        {},
        {"blk.3.mod_kv.bias": np.ones(1, np.float32)},
        r"tensor blk.3.mod_kv.bias is not f32 of shape \[2\]",
    ),
    "windows of another kind": (
        {},
        {"add": ("attn.window", "u32[]", [8] * 6)},
        "unknown key llama.mod.attn.window",
    ),
}


@pytest.mark.parametrize("what", VERSION_2_RULES)
def test_rules_of_version_2(tmp_path, head_file, what):
    keys, tensors, words = VERSION_2_RULES[what]
    tensors = dict(tensors)
    added, dropped = tensors.pop("add", None), tensors.pop("drop", None)
    source = GGUFFile.open(head_file[1])
    bad = tmp_path / "bad.gguf"
    with bad.open("wb") as file:
        rewrite(
            source,
            file,
            changed_keys={f"llama.mod.{name}": value for name, value in keys.items()},
            dropped_keys=[f"llama.mod.{dropped}"],
            added_keys=[(f"llama.mod.{added[0]}", *added[1:])] if added else [],
            added_tensors=tensors,
            kept_tensors={name: name for name in source.tensors if name not in tensors},
        )
    with pytest.raises(UserError, match=words) as error:
        inspect(bad)
    assert "\n" not in str(error.value)


def test_routers_by_head_need_a_base_with_as_many_heads(tmp_path, head_file):
    base = Tiny(n_layer=6, n_embd=64, n_head=4, n_head_kv=4, n_ff=64).write(tmp_path / "base.gguf")
    with pytest.raises(UserError, match="the routers would decide for 2 K/V heads in each layer"):
        export(head_file[0], tmp_path / "mod.gguf", base=base)
    assert not (tmp_path / "mod.gguf").exists()
