"""A MoD directory -> a GGUF file: base weights by llama.cpp's converter and quantiser, routers added by us.

    export(Path("mod"), Path("mod.gguf"), quant="q8_0")
    export(Path("mod"), Path("mod.gguf"), base=Path("model-Q4_K_M.gguf"))   # routers onto an existing file
    export(Path("mod"), Path("dense.gguf"), dense=True)                     # the base alone

The routers stay f32. The file with routers is written in one pass over the mapped base, so that memory use does
not depend on the model's size; temporary files lie beside the output.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np

from mod_export import gguf_keys, llama_tools
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.files import atomic_file
from mod_export.gguf_file import GGUFFile, rewrite
from mod_export.inspection import model_number, read_routers, refuse_pieces

DEFAULT_QUANT = "q8_0"
Routers = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]  # (layer, kind) -> w f32 [n_embd], b f32 [1]


def export(
    directory: Path,
    output: Path,
    quant: str | None = None,
    base: Path | None = None,
    dense: bool = False,
    force: bool = False,
) -> None:
    """Write `output`. quant: one of llama_tools.QUANTS, by default q8_0, and with `base` the base's own.

    Raises UserError for an output that exists (unless `force`), for a directory that is no MoD model or breaks the
    schema, for a base that does not fit it, and where the converter or the quantiser fails.
    """
    if quant is not None and quant not in llama_tools.QUANTS:
        raise UserError(f"unknown quantisation {quant!r}", f"known: {', '.join(llama_tools.QUANTS)}")
    config, routers = read_directory(directory)
    if base is not None:
        check_base(GGUFFile.open(base), config, routers)
    with atomic_file(output, force) as target, tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as tmp:
        plain = _base_weights(directory, base, quant, Path(tmp))
        if dense and plain != base:
            plain.replace(target)
        else:
            write_routers(plain, target, None if dense else config, routers)


def _base_weights(directory: Path, base: Path | None, quant: str | None, tmp: Path) -> Path:
    """The GGUF without routers, in the quantisation asked for."""
    plain = base
    if plain is None:
        quant = quant or DEFAULT_QUANT
        outtype = quant if quant in llama_tools.FLOATS else stored_type(directory)
        plain = tmp / "base.gguf"
        # a directory called mod says nothing; transformers notes what the model was loaded from
        name = Path(str(_json(directory / "config.json").get("_model_name_or_path", ""))).name
        llama_tools.convert_hf(directory, plain, outtype, skip=gguf_keys.HF_ROUTER_TENSOR, name=name)
    if quant is None or (base is None and quant in llama_tools.FLOATS):
        return plain
    llama_tools.quantize(plain, tmp / "quantised.gguf", quant)
    return tmp / "quantised.gguf"


def write_routers(plain: Path, target: Path, config: MoDConfig | None, routers: Routers) -> None:
    """Copy the GGUF `plain` to `target` and add the keys and tensors of schema version 1 (none without a config)."""
    file = GGUFFile.open(plain)
    keys, tensors = [], {}
    if config is not None:
        check_base(file, config, routers)
        keys = gguf_keys.to_keys(file.architecture, config)
        for unit in config.routed():
            tensors |= dict(zip(gguf_keys.tensor_names(*unit), routers[unit], strict=True))
    with open(target, "wb") as out:
        rewrite(file, out, keys, tensors)


def check_base(file: GGUFFile, config: MoDConfig, routers: Routers) -> None:
    """Raise UserError unless the routers fit the model in `file` and it has none yet."""
    refuse_pieces(file)
    n_layer, n_embd = (model_number(file, name) for name in ("block_count", "embedding_length"))
    if read_routers(file, n_layer, n_embd)[0] is not None:
        raise UserError(f"{file.path} has routers already", "give the dense file as the base")
    config.validate(n_layer)
    width = len(next(iter(routers.values()))[0])
    if width != n_embd:
        raise UserError(f"{file.path} has n_embd {n_embd}, the routers {width}", "give the base of the same model")


def read_directory(directory: Path) -> tuple[MoDConfig, Routers]:
    """Configuration and routers of a MoD directory, all checked. Needs neither torch nor transformers."""
    hf_config = _json(directory / "config.json")
    if "mod" not in hf_config:
        raise UserError(f"{directory} is no MoD model: its config.json has no key mod", "run `mod-export convert`")
    config = MoDConfig.from_dict(hf_config["mod"])
    # how many layers the base model has is not asked here, where architectures differ, but of its GGUF
    units = config.validate(max((len(unit.threshold) for unit in config.units.values()), default=0)).routed()
    if not units:
        raise UserError(f"{directory} routes no unit", "convert the model again")
    return config, _read_routers(directory, units)


def _json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}", "give a directory made by `mod-export convert`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserError(f"{path} is no JSON: {exc}", "convert the model again") from exc
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object", "convert the model again")
    return data


def _read_routers(directory: Path, units: list[tuple[int, str]]) -> Routers:
    places, routers, width = _tensor_files(directory), {}, None
    for unit in units:
        weight, bias = (_read_router(directory, places, name) for name in gguf_keys.hf_tensor_names(*unit))
        width = width or len(weight)
        for name, value, size in zip(gguf_keys.hf_tensor_names(*unit), (weight, bias), (width, 1), strict=True):
            if value.shape != (size,):
                raise UserError(f"{places[name]}: tensor {name} is not of shape [{size}]", "convert the model again")
        routers[unit] = weight, bias
    expected = {name for unit in units for name in gguf_keys.hf_tensor_names(*unit)}
    for name in places:
        if gguf_keys.HF_ROUTER_TENSOR.fullmatch(name) and name not in expected:
            raise UserError(f"{places[name]}: tensor {name} belongs to no routed unit", "convert the model again")
    return routers


def stored_type(directory: Path) -> str:
    """The widest float type among the directory's matrices: f32, f16 or bf16."""
    places = _tensor_files(directory)
    headers = {path: _safetensors_header(path) for path in set(places.values())}
    types = {headers[path][name]["dtype"] for name, path in places.items() if len(headers[path][name]["shape"]) > 1}
    return next((name for name in ("f32", "bf16", "f16") if name.upper() in types), "f32")


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the files' headers."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no safetensors file", "convert the model again")
    return {name: path for path in files for name in _safetensors_header(path)}


def _safetensors_header(path: Path) -> dict[str, dict]:
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
    except (ValueError, struct.error, AttributeError, KeyError, TypeError) as exc:
        raise UserError(f"{path} is damaged or truncated", "convert the model again") from exc
    return header


def _read_router(directory: Path, places: dict[str, Path], name: str) -> np.ndarray:
    from safetensors import safe_open

    if name not in places:
        raise UserError(f"tensor {name} is missing in {directory}", "convert the model again")
    with safe_open(places[name], framework="numpy") as file:
        if file.get_slice(name).get_dtype() != "F32":
            raise UserError(f"{places[name]}: tensor {name} is not f32", "convert the model again")
        value = file.get_tensor(name)
    if not np.isfinite(value).all():
        raise UserError(f"{places[name]}: tensor {name} holds a value that is not finite", "convert the model again")
    return value
