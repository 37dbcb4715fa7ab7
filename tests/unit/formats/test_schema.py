"""The schema: what a MoD file has, and what breaks its rules."""

import gguf
import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.export import export, read_directory
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile
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
