"""A MoD model as a Hugging Face directory: the key `mod` of config.json, and the routers.

This module is the only reader of routers outside of GGUF files: those of a directory and those of
an adapter. It imports neither torch nor transformers.

    config = read_config(Path("mod"))
    routers = read_routers(tensor_files(Path("mod")), config)
    stored_type(Path("mod"))                     # "bf16"
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import schema
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.schema import Routers

CONFIG_JSON = "config.json"
VOCABULARY = "tokenizer.gguf"  # of a model that came from a GGUF file: its keys tokenizer.*
DRAFTS = "drafts.gguf"  # of such a model too: its layers for drafts (drafts.py)
OF_ITSELF = tuple(f"general.{name}" for name in "name basename finetune version size_label".split())
CONVERT = "make one with `mod-export convert`"
CONVERT_AGAIN = "convert the model again"
WEIGHTS_INDEX = "model.safetensors.index.json"
GET_MISSING = "get the files that are missing"


def is_mod(path: str | Path) -> bool:
    """Whether it is a MoD directory; where that cannot be told, loading tells what is wrong."""
    try:
        config = json.loads((Path(path) / CONFIG_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "mod" in config


def read_json(path: Path, cure: str) -> dict:
    """The object in a file. Raises UserError, with `cure` where there is no such file."""
    if not path.parent.exists():
        raise UserError(f"no such directory: {path.parent}", cure)
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}", cure)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UserError(f"{path} cannot be read ({exc.strerror})", "check its permissions") from exc
    except ValueError as exc:
        raise UserError(f"{path} is no JSON: {exc}", CONVERT_AGAIN) from exc
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object", CONVERT_AGAIN)
    return data


def read_config(directory: Path) -> MoDConfig:
    """The configuration of a MoD directory, checked except for the base model's number of layers.

    Raises UserError for another directory, for an unknown or missing key, and for a value that
    breaks a rule.
    """
    if directory.is_file():
        raise UserError(f"{directory} is a file", f"give a MoD directory; {CONVERT}")
    data = read_json(directory / CONFIG_JSON, CONVERT)
    if "mod" not in data:
        raise UserError(f"{directory} is no MoD model: its config.json has no key mod", CONVERT)
    config = MoDConfig.from_dict(data["mod"])
    if config.units:
        # base models name their number of layers in many ways; who loads the base checks it
        config.validate(max(units.n_layer for units in config.units.values()))
    return config


def read_routers(files: list[Path], config: MoDConfig) -> Routers:
    """The routers of a configuration's units, all of them float32 and of one width.

    Raises UserError for a router that is missing, damaged or not finite, and for one too many.
    """
    index = tensor_index(files)
    names = [schema.hf_tensor_names(unit.layer, unit.kind) for unit in config.by_layer()]

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = _read_tensor(files[0].parent, index, name)
        if value.shape != shape:
            raise UserError(
                f"{index[name]}: tensor {name} is not of shape {list(shape)}", CONVERT_AGAIN
            )
        return value

    # The first router tells the width, which no key of ours does.
    first = _read_tensor(files[0].parent, index, names[0][0]).shape if names else ()
    width = first[-1] if first else 0
    routers = schema.from_tensors(config, read, width, schema.hf_tensor_names)
    expected = {name for pair in names for name in pair}
    for name, path in index.items():
        if schema.HF_ROUTER_TENSOR.fullmatch(name) and name not in expected:
            raise UserError(f"{path}: tensor {name} belongs to no routed unit", CONVERT_AGAIN)
    return routers


def _read_tensor(directory: Path, index: dict[str, Path], name: str) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    if name not in index:
        raise UserError(f"tensor {name} is missing in {directory}", CONVERT_AGAIN)
    path = index[name]
    try:
        with safe_open(path, framework="numpy") as file:
            if file.get_slice(name).get_dtype() != "F32":
                raise UserError(f"{path}: tensor {name} is not f32", CONVERT_AGAIN)
            value = file.get_tensor(name)
    except SafetensorError as exc:
        raise UserError(f"{path} is damaged or truncated", CONVERT_AGAIN) from exc
    if not np.isfinite(value).all():
        raise UserError(f"{path}: tensor {name} holds a value that is not finite", CONVERT_AGAIN)
    return value


def write_vocabulary(source: GGUFFile, path: Path) -> None:
    """Write the keys of a GGUF file that describe its tokenizer to a GGUF file of their own.

    What the file says of itself, and the sampling that it recommends, are among them: a directory
    has no other place for it.
    """
    kept = ("tokenizer.", "general.sampling.", "general.architecture", *OF_ITSELF)
    with path.open("wb") as file:
        rewrite(
            source,
            file,
            dropped_keys=[name for name in source.keys if not name.startswith(kept)],
            kept_tensors={},
        )


def stored_type(directory: Path) -> str:
    """The widest float type among the matrices of the directory's model: f32, bf16 or f16."""
    types = set()
    for path in tensor_files(directory):
        for name, tensor in safetensors_header(path).items():
            if len(tensor["shape"]) > 1 and not schema.HF_ROUTER_TENSOR.fullmatch(name):
                types.add(tensor["dtype"])
    for name in ("f32", "bf16", "f16"):
        if name.upper() in types:
            return name
    return "f32"


def shapes(directory: Path) -> list[list[int]]:
    """The shapes of the tensors of the directory's model, routers apart."""
    found = [
        tensor["shape"]
        for path in tensor_files(directory)
        for name, tensor in safetensors_header(path).items()
        if not schema.HF_ROUTER_TENSOR.fullmatch(name)
    ]
    if (directory / DRAFTS).is_file():
        drafts = GGUFFile.open(directory / DRAFTS).tensors.values()
        found += [list(tensor.shape) for tensor in drafts]
    return found


def check_weights(directory: Path) -> None:
    """Raise UserError where a file is missing that the index of the weights names."""
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        return
    weight_map = read_json(index, GET_MISSING).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    # A link of the hub's cache may lead nowhere.
    missing = sorted(str(name) for name in names if not (directory / str(name)).is_file())
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of its {len(names)} files of weights: {missing[0]}",
            GET_MISSING,
        )


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, of which it must have one, and none may be missing."""
    check_weights(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no safetensors file", CONVERT_AGAIN)
    return files


def tensor_index(files: list[Path]) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the files' headers."""
    return {name: path for path in files for name in safetensors_header(path)}


def safetensors_header(path: Path) -> dict[str, dict]:
    """Tensor name -> {dtype, shape, data_offsets}."""
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
        raise UserError(f"{path} is damaged or truncated", CONVERT_AGAIN) from exc
    return header


def data_start(path: Path) -> int:
    """Where the values begin in a safetensors file, whose header has been read before."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
    return 8 + size
