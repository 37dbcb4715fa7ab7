"""The only list of the router keys and tensor names in GGUF files: schema version 1 (docs/reference/gguf-schema.md).

keys = to_keys("llama", config)          # [("llama.mod.version", "u32", 1), ...]
config = from_keys(file)                 # MoDConfig, None for a dense file
tensor_names(5, "kv")                    # ("blk.5.mod_kv.weight", "blk.5.mod_kv.bias")
"""

from __future__ import annotations

import re

from mod_export.config import KINDS, MoDConfig, UnitConfig
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile

# {architecture}.mod.NAME -> type; NAMES of config.MoDConfig
SCALARS = {
    "version": "u32",
    "gating_func": "string",
    "scale_output": "bool",
    "sink_tokens": "u32",
    "kv_window": "u32",
}
# {architecture}.mod.{kind}.NAME; names of config.UnitConfig
PER_LAYER = {"threshold": "f32[]", "activation": "f32[]"}
ROUTER_TENSOR = re.compile(r"blk\.(\d+)\.mod_(\w+)\.(\w+)")
HF_ROUTER_TENSOR = re.compile(r"model\.layers\.(\d+)\.mod_(\w+)\.(\w+)")


def prefix(architecture: str) -> str:
    """What all router keys begin with."""
    return f"{architecture}.mod."


def tensor_names(layer: int, kind: str) -> tuple[str, str]:
    """Names of w, f32 [n_embd], and b, f32 [1]."""
    return f"blk.{layer}.mod_{kind}.weight", f"blk.{layer}.mod_{kind}.bias"


def hf_tensor_names(layer: int, kind: str) -> tuple[str, str]:
    """The same in a Hugging Face directory."""
    return f"model.layers.{layer}.mod_{kind}.weight", f"model.layers.{layer}.mod_{kind}.bias"


def to_keys(architecture: str, config: MoDConfig) -> list[tuple[str, str, object]]:
    """(key, type, value) of every key that a file with this configuration has."""
    start = prefix(architecture)
    keys = [(start + name, type, getattr(config, name)) for name, type in SCALARS.items()]
    for kind in KINDS:
        if kind in config.units:
            keys += [
                (f"{start}{kind}.{n}", type, getattr(config.units[kind], n))
                for n, type in PER_LAYER.items()
            ]
    return keys


def from_keys(file: GGUFFile) -> MoDConfig | None:
    """The configuration that a file's keys state, None where it has none. The values are not
    checked here.

    Raises UserError naming a key that is missing, unknown or of the wrong type.
    """
    start = prefix(file.architecture)
    here = {
        name.removeprefix(start): key for name, key in file.keys.items() if name.startswith(start)
    }
    if not here:
        return None
    if "version" in here and here["version"].value != 1:  # its other keys may well be unknown
        raise UserError(
            f"key {start}version is {here['version'].value}, known is 1", "use a newer mod-export"
        )
    kinds = [kind for kind in KINDS if f"{kind}.threshold" in here or f"{kind}.activation" in here]
    needed = SCALARS | {
        f"{kind}.{name}": type for kind in kinds for name, type in PER_LAYER.items()
    }
    if "kv" not in kinds and "kv_window" not in here:
        del needed["kv_window"]
    for name, type in needed.items():
        if name not in here:
            raise UserError(f"key {start}{name} is missing", "export the model again")
        if here[name].type != type:
            raise UserError(
                f"key {start}{name} has type {here[name].type}, not {type}",
                "export the model again",
            )
    if unknown := sorted(set(here) - set(needed)):
        raise UserError(f"unknown key {start}{unknown[0]}", "use a newer mod-export")
    units = {
        k: UnitConfig(*(tuple(map(float, here[f"{k}.{n}"].value)) for n in PER_LAYER))
        for k in kinds
    }
    return MoDConfig(**{name: here[name].value for name in SCALARS if name in needed}, units=units)
