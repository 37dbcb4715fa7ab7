"""A tiny MoD directory and a tiny adapter, made without torch.

    path = write_directory(tmp_path / "mod", {"kv": [2, 3], "ffn": [4]})
    edited(path, tmp_path / "copy", tensors=lambda tensors: tensors.pop(name))
    assert_same_base("mod.gguf", "base.gguf")

The module also tells what gguf-py reads in a GGUF file.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from mod_export.config import MoDConfig, UnitConfig
from mod_export.formats import adapter_files, schema
from mod_export.formats.base_identity import SAMPLE_SIZE
from mod_export.units import Unit

N_LAYER, N_EMBD = 6, 64


def config(
    units: dict[str, list[int]],
    n_layer: int = N_LAYER,
    heads: int = 1,
    windows: dict[tuple, int] | None = None,
    window: int = 8,
) -> MoDConfig:
    """Return a configuration with threshold and activation 0.5 in the routed layers.

    heads: of a layer that decide apart in kv units; with more than one, head 0 of the last routed
    layer is not routed. windows: own windows of kv units, `window` where none is given.
    """
    made = {}
    for kind, layers in units.items():
        n = heads if kind == "kv" else 1
        routed = [layer in layers for layer in range(n_layer) for _ in range(n)]
        if n > 1:
            routed[layers[-1] * n] = False
        made[kind] = UnitConfig(
            threshold=tuple(0.5 if here else 0.0 for here in routed),
            activation=tuple(0.5 if here else 1.0 for here in routed),
            heads=n,
        )
    if windows:
        kv = made["kv"]
        own = {kv.index(Unit(*unit)): of_unit for unit, of_unit in windows.items()}
        made["kv"] = replace(kv, window=tuple(own.get(i, window) for i in range(len(kv.threshold))))
    return MoDConfig(sink_tokens=2, kv_window=window, units=made)


def router_tensors(mod: MoDConfig, n_embd: int = N_EMBD) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    routers = {
        unit: tuple(rng.standard_normal(n).astype(np.float32) for n in (n_embd, 1))
        for unit in mod.routed()
    }
    return schema.to_tensors(mod, routers, schema.hf_tensor_names)


def write_directory(
    path: Path, units: dict[str, list[int]], n_layer: int = N_LAYER, **kwargs
) -> Path:
    """Write a MoD directory that holds the embedding alone of its base. kwargs: of `config`."""
    mod = config(units, n_layer, **kwargs)
    path.mkdir(parents=True)
    data = {"architectures": ["LlamaForCausalLM"], "mod": mod.to_dict()}
    (path / "config.json").write_text(json.dumps(data))
    embedding = {"model.embed_tokens.weight": np.zeros((4, N_EMBD), np.float32)}
    save_file(embedding | router_tensors(mod), path / "model.safetensors")
    return path


def write_adapter(path: Path, units: dict[str, list[int]], **kwargs) -> Path:
    """Write an adapter without LoRA, for a base with zeros where its identity samples it.

    kwargs: of `config`
    """
    mod = config(units, **kwargs)
    path.mkdir(parents=True)
    base = {
        "name": "tiny",
        "model_type": "llama",
        "n_layer": N_LAYER,
        "n_embd": N_EMBD,
        "n_vocab": 300,
        "tokenizer": "",
        "weights": {name: [0.0] * SAMPLE_SIZE for name in ("embedding", "ffn")},
    }
    data = {"mod": mod.to_dict(), "base": base}
    (path / adapter_files.MOD_JSON).write_text(json.dumps(data))
    save_file(router_tensors(mod), path / adapter_files.ROUTERS)
    return path


def edited(
    source: Path,
    target: Path,
    config: Callable[[dict], object] | None = None,
    tensors: Callable[[dict], object] | None = None,
) -> Path:
    """Write a copy of a MoD directory with a changed config.json or changed tensors."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    if config:
        data = json.loads((target / "config.json").read_text())
        config(data)
        (target / "config.json").write_text(json.dumps(data))
    if tensors:
        weights = load_file(target / "model.safetensors")
        tensors(weights)
        save_file(weights, target / "model.safetensors")
    return target


@functools.cache  # gguf-py takes seconds for a vocabulary
def reader_of(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def keys_of(path: Path) -> dict:
    """Return the types and the value of each key, or the bytes of a long array."""
    fields = [
        field for name, field in reader_of(path).fields.items() if not name.startswith("GGUF.")
    ]
    return {
        f.name: (f.types, f.contents() if len(f.data) < 100 else b"".join(map(bytes, f.parts)))
        for f in fields
    }


def tensors_of(path: Path) -> dict:
    """Return the type, shape and bytes of each tensor."""
    return {
        t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader_of(path).tensors
    }


def assert_same_base(mod: Path, base: Path, *, ignore=()) -> None:
    """Assert that `mod` is `base` with nothing added but the schema's keys and tensors, and what a
    file says of itself.
    """
    ours, theirs = keys_of(mod), keys_of(base)
    assert {name: ours.get(name) for name in theirs if name not in ignore} == {
        name: value for name, value in theirs.items() if name not in ignore
    }
    assert all(name.startswith(("llama.mod.", "general.")) for name in ours.keys() - theirs.keys())
    ours, theirs = tensors_of(mod), tensors_of(base)
    assert {name: ours.get(name) for name in theirs} == theirs
    assert all(schema.ROUTER_TENSOR.fullmatch(name) for name in ours.keys() - theirs.keys())


def export_refused(run_cli, folder, *args) -> str:
    """Run export in `folder`, and return the one line of its error.

    Before it llama.cpp's converter may have warned. The run must leave nothing behind.
    """
    before = sorted(folder.rglob("*"))
    result = run_cli("export", *args, cwd=folder)
    assert result.returncode == 2, result
    *warnings, error = result.stderr.splitlines()
    assert error.startswith("error: "), result.stderr
    told = ("llama.cpp's converter: ", " so far")  # progress, where the machine is busy
    assert all(line.startswith(told[0]) or line.endswith(told[1]) for line in warnings), warnings
    assert sorted(folder.rglob("*")) == before
    return error
