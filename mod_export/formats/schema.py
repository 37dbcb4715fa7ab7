"""What a MoD model adds to a GGUF file: keys and tensors of schema versions 1 and 2.

This module is the only place that knows their names; docs/reference/gguf-schema.md describes them,
and the patched llama.cpp enforces the same rules.

    keys = to_keys("llama", config)               # [("llama.mod.version", "u32", 1), ...]
    config, routers = read_routers(file)          # checked; None and {} for a dense file
    tensor_names(5, "kv")                         # ("blk.5.mod_kv.weight", "blk.5.mod_kv.bias")
    write_routers(file, output, config, routers)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable
from typing import BinaryIO

import numpy as np

from mod_export.config import VERSIONS, MoDConfig, UnitConfig, check_version
from mod_export.errors import UserError
from mod_export.formats import kv_size
from mod_export.formats.ggml_types import F32_TYPE
from mod_export.formats.gguf import GGUFFile, Key, rewrite
from mod_export.formats.model_checks import check_model
from mod_export.formats.sliding_windows import main_layers
from mod_export.units import KV, UNIT_KINDS, Unit

# unit -> w float32 [n_embd], b float32 [1]
Routers = dict[Unit, tuple[np.ndarray, np.ndarray]]

# {architecture}.mod.NAME -> type; the names are those of config.MoDConfig
SCALARS = {
    "version": "u32",
    "gating_func": "string",
    "scale_output": "bool",
    "sink_tokens": "u32",
    "kv_window": "u32",
}
# {architecture}.mod.{kind}.NAME -> type; the names are those of config.UnitConfig
PER_UNIT = {"threshold": "f32[]", "activation": "f32[]"}
# of kv units that have windows of their own
OWN_WINDOWS = {"window": "u32[]"}
ROUTER_TENSOR = re.compile(r"blk\.(\d+)\.mod_(\w+)\.(\w+)")
HF_ROUTER_TENSOR = re.compile(r"model\.layers\.(\d+)\.mod_(\w+)\.(\w+)")
EXPORT_AGAIN = "export the model again"
OTHER_BASE = "give the base of the same model"


def prefix(architecture: str) -> str:
    """What all our keys begin with."""
    return f"{architecture}.mod."


def tensor_names(layer: int, kind: str) -> tuple[str, str]:
    """Names of w and b in a GGUF file.

    They are f32 [n_embd] and [1], or [n_head_kv, n_embd] and [n_head_kv] where the layer decides by
    head.
    """
    return f"blk.{layer}.mod_{kind}.weight", f"blk.{layer}.mod_{kind}.bias"


def hf_tensor_names(layer: int, kind: str) -> tuple[str, str]:
    """Names of w and b in a Hugging Face directory and in an adapter."""
    return f"model.layers.{layer}.mod_{kind}.weight", f"model.layers.{layer}.mod_{kind}.bias"


def to_keys(architecture: str, config: MoDConfig) -> list[tuple[str, str, object]]:
    """(key, type, value) of every key that a file with this configuration has."""
    start = prefix(architecture)
    keys = [(start + name, type, getattr(config, name)) for name, type in SCALARS.items()]
    for kind in UNIT_KINDS:
        if kind in config.units:
            units = config.units[kind]
            for name, type in (PER_UNIT | (OWN_WINDOWS if units.window else {})).items():
                keys.append((f"{start}{kind}.{name}", type, getattr(units, name)))
    return keys


def to_tensors(
    config: MoDConfig,
    routers: Routers,
    names: Callable[[int, str], tuple[str, str]] = tensor_names,
) -> dict[str, np.ndarray]:
    """Tensor name -> float32 values, of all routers; shapes as `tensor_names` says.

    The rows of heads that are not routed are zeros.
    """
    tensors: dict[str, np.ndarray] = {}
    for (layer, kind), units in config.by_layer().items():
        w, b = routers[units[0]]
        if (heads := config.heads(kind)) > 1:
            w, b = np.zeros((heads, len(w)), np.float32), np.zeros(heads, np.float32)
            for unit in units:
                w[unit.head], b[unit.head] = routers[unit][0], routers[unit][1][0]
        tensors |= zip(names(layer, kind), (w, b), strict=True)
    return tensors


def from_tensors(
    config: MoDConfig,
    read: Callable[[str, tuple[int, ...]], np.ndarray],
    n_embd: int,
    names: Callable[[int, str], tuple[str, str]] = tensor_names,
) -> Routers:
    """The routers in the tensors of a file: the inverse of `to_tensors`.

    read: returns the values of the tensor with a name, which must have this shape. Raises UserError
    where the row of a head that is not routed holds something.
    """
    routers: Routers = {}
    for (layer, kind), units in config.by_layer().items():
        weight_name, bias_name = names(layer, kind)
        if (heads := config.heads(kind)) == 1:
            routers[units[0]] = read(weight_name, (n_embd,)), read(bias_name, (1,))
            continue
        w, b = read(weight_name, (heads, n_embd)), read(bias_name, (heads,))
        for head in range(heads):
            if (unit := Unit(layer, kind, head)) in units:
                routers[unit] = w[head], b[head : head + 1]
                continue
            for name, value in ((weight_name, w), (bias_name, b)):
                if value[head].any():
                    raise UserError(
                        f"tensor {name} has values for head {head}, which is not routed",
                        EXPORT_AGAIN,
                    )
    return routers


def from_keys(file: GGUFFile) -> MoDConfig | None:
    """The configuration that a file's keys state, None where the file has none of our keys.

    The values are not checked here. Raises UserError naming a key that is missing, unknown or of
    the wrong type.
    """
    start = prefix(file.architecture)
    ours = {
        name.removeprefix(start): key for name, key in file.keys.items() if name.startswith(start)
    }
    if not ours:
        return None
    # the version comes first: the other keys of a later version may well be unknown
    version = ours.get("version")
    if version and version.type == SCALARS["version"] and version.value not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise UserError(
            f"key {start}version is {version.value}, known are {known}", "use a newer mod-export"
        )
    kinds = [kind for kind in UNIT_KINDS if any(f"{kind}.{name}" in ours for name in PER_UNIT)]
    needed = _needed_keys(kinds, ours)
    for name, type in needed.items():
        if name not in ours:
            raise UserError(f"key {start}{name} is missing", EXPORT_AGAIN)
        if ours[name].type != type:
            raise UserError(
                f"key {start}{name} has type {ours[name].type}, not {type}", EXPORT_AGAIN
            )
    if unknown := sorted(set(ours) - set(needed)):
        raise UserError(f"unknown key {start}{unknown[0]}", "use a newer mod-export")
    scalars = {name: ours[name].value for name in SCALARS if name in needed}
    version_given = scalars.pop("version")
    n_layer = main_layers(file)
    config = MoDConfig(**scalars, units={kind: _unit_config(kind, ours, n_layer) for kind in kinds})
    check_version(f"key {start}version", version_given, config)
    return config


def _needed_keys(kinds: list[str], ours: dict[str, Key]) -> dict[str, str]:
    """Name without prefix -> type of the keys that a file with these kinds of units must have."""
    needed = dict(SCALARS)
    for kind in kinds:
        for name, type in PER_UNIT.items():
            needed[f"{kind}.{name}"] = type
    if KV in kinds and "kv.window" in ours:
        needed |= {f"kv.{name}": type for name, type in OWN_WINDOWS.items()}
    if KV not in kinds and "kv_window" not in ours:
        del needed["kv_window"]
    return needed


def _unit_config(kind: str, ours: dict[str, Key], n_layer: int) -> UnitConfig:
    values = {name: tuple(map(float, ours[f"{kind}.{name}"].value)) for name in PER_UNIT}
    window = ours[f"{kind}.window"].value if kind == KV and f"{kind}.window" in ours else ()
    heads, rest = divmod(len(values["threshold"]), max(1, n_layer))
    if kind != KV or rest or not heads:
        heads = 1  # an array of another length is refused by MoDConfig.validate
    return UnitConfig(**values, heads=heads, window=tuple(map(int, window)))


def read_routers(file: GGUFFile) -> tuple[MoDConfig | None, Routers]:
    """Configuration and routers of a file, all checked; None and {} for a dense file.

    Raises UserError naming the key or tensor that is missing, damaged, not finite or too many.
    """
    n_layer = main_layers(file)
    n_embd = file.model_number("embedding_length")
    config = from_keys(file)
    units = config.validate(n_layer).by_layer() if config else {}
    if config:
        _check_heads(file, config, f"key {prefix(file.architecture)}kv.threshold")
    if config and not units:
        raise UserError(
            f"{file.path}: the keys {prefix(file.architecture)}* route no unit", EXPORT_AGAIN
        )
    routers: Routers = {}
    if config:
        routers = from_tensors(config, functools.partial(_router_tensor, file), n_embd)
    expected = {name for unit in units for name in tensor_names(unit.layer, unit.kind)}
    for name in file.tensors:
        if ROUTER_TENSOR.fullmatch(name) and name not in expected:
            raise UserError(f"{file.path}: tensor {name} belongs to no routed unit", EXPORT_AGAIN)
    return config, routers


def _router_tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise UserError(f"{file.path}: tensor {name} is missing", EXPORT_AGAIN)
    if tensor.type != F32_TYPE or tensor.shape != shape[::-1]:
        raise UserError(
            f"{file.path}: tensor {name} is not f32 of shape {list(shape[::-1])}", EXPORT_AGAIN
        )
    if not np.isfinite(tensor.array()).all():
        raise UserError(
            f"{file.path}: tensor {name} holds a value that is not finite",
            "calibrate the model again",
        )
    return tensor.array()


def write_routers(
    file: GGUFFile,
    target: BinaryIO,
    config: MoDConfig,
    routers: Routers,
    added_keys: Iterable[tuple[str, str, object]] = (),
    dropped_keys: Collection[str] = (),
    consume: bool = False,
) -> None:
    """Write the dense `file` to `target` with the keys of `config` and the routers.

    added_keys, dropped_keys, consume: as `rewrite` takes them. Raises UserError where the routers
    do not fit the file.
    """
    check_base(file, config, routers)
    rewrite(
        file,
        target,
        added_keys=(*added_keys, *to_keys(file.architecture, config)),
        dropped_keys=dropped_keys,
        added_tensors=to_tensors(config, routers),
        consume=consume,
    )


def check_base(file: GGUFFile, config: MoDConfig, routers: Routers) -> None:
    """Raise UserError unless the routers fit the model in `file` and it has no routers yet."""
    file.refuse_split()
    check_model(file)
    n_layer = main_layers(file)
    n_embd = file.model_number("embedding_length")
    if read_routers(file)[0] is not None:
        raise UserError(f"{file.path} has routers already", "give the dense file as the base")
    for units in config.units.values():
        if units.n_layer != n_layer:
            raise UserError(
                f"{file.path} has {n_layer} layers, the routers are for {units.n_layer}",
                OTHER_BASE,
            )
    config.validate(n_layer)
    _check_heads(file, config, "the routers")
    width = len(next(iter(routers.values()))[0])
    if width != n_embd:
        raise UserError(f"{file.path} has n_embd {n_embd}, the routers {width}", OTHER_BASE)


def _check_heads(file: GGUFFile, config: MoDConfig, what: str) -> None:
    """Raise UserError, about `what`, where the kv units are those of other K/V heads."""
    heads = config.heads(KV)
    if heads > 1 and heads != (possible := kv_size.kv_heads(file)):
        raise UserError(
            f"{file.path}: {what} would decide for {heads} K/V heads in each layer, "
            f"the model can for {possible}",
            OTHER_BASE,
        )
