"""Routers in safetensors files, read and checked without torch: those of a MoD directory and those
of an adapter.

routers = read_routers([Path("mod/model.safetensors")], config.routed())
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import schema

Routers = dict[
    tuple[int, str], tuple[np.ndarray, np.ndarray]
]  # (layer, kind) -> w f32 [n_embd], b f32 [1]


def is_mod(path: str | Path) -> bool:
    """Whether it is a MoD directory; where that cannot be told, loading tells what is wrong."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "mod" in config


def read_json(path: Path, cure: str) -> dict:
    """The object in a file. Raises UserError, with `cure` where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}", cure)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserError(f"{path} is no JSON: {exc}", "convert the model again") from exc
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object", "convert the model again")
    return data


def read_routers(files: list[Path], units: list[tuple[int, str]]) -> Routers:
    """The routers of `units`. Raises UserError for one that is missing, damaged or not finite, and
    for one too many.
    """
    places, routers, width = places_of(files), {}, None
    for unit in units:
        weight, bias = (
            _read_router(files[0].parent, places, name) for name in schema.hf_tensor_names(*unit)
        )
        width = width or weight.size
        for name, value, size in zip(
            schema.hf_tensor_names(*unit), (weight, bias), (width, 1), strict=True
        ):
            if value.shape != (size,):
                raise UserError(
                    f"{places[name]}: tensor {name} is not of shape [{size}]",
                    "convert the model again",
                )
        routers[unit] = weight, bias
    expected = {name for unit in units for name in schema.hf_tensor_names(*unit)}
    for name in places:
        if schema.HF_ROUTER_TENSOR.fullmatch(name) and name not in expected:
            raise UserError(
                f"{places[name]}: tensor {name} belongs to no routed unit",
                "convert the model again",
            )
    return routers


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, of which it must have one."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no safetensors file", "convert the model again")
    return files


def places_of(files: list[Path]) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the files' headers."""
    return {name: path for path in files for name in safetensors_header(path)}


def safetensors_header(path: Path) -> dict[str, dict]:
    """Name -> {dtype, shape, data_offsets}."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("truncated")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if 8 + size + end > path.stat().st_size:
                raise ValueError("truncated")
    except (ValueError, struct.error, AttributeError, KeyError, TypeError, IndexError) as exc:
        raise UserError(f"{path} is damaged or truncated", "convert the model again") from exc
    return header


def _read_router(directory: Path, places: dict[str, Path], name: str) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    if name not in places:
        raise UserError(f"tensor {name} is missing in {directory}", "convert the model again")
    try:
        with safe_open(places[name], framework="numpy") as file:
            if file.get_slice(name).get_dtype() != "F32":
                raise UserError(
                    f"{places[name]}: tensor {name} is not f32", "convert the model again"
                )
            value = file.get_tensor(name)
    except SafetensorError as exc:
        raise UserError(
            f"{places[name]} is damaged or truncated", "convert the model again"
        ) from exc
    if not np.isfinite(value).all():
        raise UserError(
            f"{places[name]}: tensor {name} holds a value that is not finite",
            "convert the model again",
        )
    return value
