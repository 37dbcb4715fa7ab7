"""A MoD directory -> a GGUF file: base weights by llama.cpp's converter and quantiser, routers
added by us.

    export(Path("mod"), Path("mod.gguf"), quant="q8_0")
    export(Path("mod"), Path("mod.gguf"), base=Path("model-Q4_K_M.gguf"))   # routers onto an existing file
    export(Path("adapter"), Path("mod.gguf"), base=Path("model-Q4_K_M.gguf"))   # those of an adapter
    export(Path("mod"), Path("dense.gguf"), dense=True)                     # the base alone

The routers stay f32. The file with routers is written in one pass over the mapped base, so that
memory use does not depend on the model's size; temporary files lie beside the output.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from mod_export.common.files import atomic_file
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import adapter_files, hf_directory, schema
from mod_export.formats.base_identity import compare, gguf_identity
from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.hf_directory import Routers
from mod_export.inspection import model_number, read_routers, refuse_pieces
from mod_export.llamacpp import converter

DEFAULT_QUANT = "q8_0"
_CURE = "give a directory made by `mod-export convert`"


def export(
    directory: Path,
    output: Path,
    quant: str | None = None,
    base: Path | None = None,
    dense: bool = False,
    force: bool = False,
) -> None:
    """Write `output`. quant: one of llama_tools.QUANTS, by default q8_0, and with `base` the base's
    own.

    directory: a MoD model, or with `base` an adapter without LoRA (also the name of a packaged
    one). Raises UserError for an output that exists (unless `force`), for a directory that is no
    MoD model or breaks the schema, for a base that does not fit it, and where the converter or the
    quantiser fails.
    """
    if quant is not None and quant not in converter.QUANTS:
        raise UserError(f"unknown quantisation {quant!r}", f"known: {', '.join(converter.QUANTS)}")
    if (adapter := adapter_files.find(directory)) is not None:
        config, routers = read_adapter(adapter, base)
    else:
        config, routers = read_directory(directory)
    if config.top_k():
        raise UserError(
            f"{directory} chooses by top-k, which looks at later tokens",
            "use --method threshold to train",
        )
    if base is not None:
        check_base(GGUFFile.open(base), config, routers)
    with (
        atomic_file(output, force) as target,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as tmp,
    ):
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
        outtype = quant if quant in converter.FLOATS else stored_type(directory)
        plain = tmp / "base.gguf"
        # a directory called mod says nothing; transformers notes what the model was loaded from
        name = Path(
            str(
                hf_directory.read_json(directory / "config.json", _CURE).get(
                    "_model_name_or_path", ""
                )
            )
        ).name
        converter.convert_hf(directory, plain, outtype, skip=schema.HF_ROUTER_TENSOR, name=name)
    if quant is None or (base is None and quant in converter.FLOATS):
        return plain
    converter.quantize(plain, tmp / "quantised.gguf", quant)
    return tmp / "quantised.gguf"


def write_routers(plain: Path, target: Path, config: MoDConfig | None, routers: Routers) -> None:
    """Copy the GGUF `plain` to `target` and add the keys and tensors of schema version 1 (none
    without a config).
    """
    file = GGUFFile.open(plain)
    keys, tensors = [], {}
    if config is not None:
        check_base(file, config, routers)
        keys = schema.to_keys(file.architecture, config)
        for unit in config.routed():
            tensors |= dict(zip(schema.tensor_names(*unit), routers[unit], strict=True))
    with open(target, "wb") as out:
        rewrite(file, out, keys, tensors)


def check_base(file: GGUFFile, config: MoDConfig, routers: Routers) -> None:
    """Raise UserError unless the routers fit the model in `file` and it has none yet."""
    refuse_pieces(file)
    n_layer, n_embd = (model_number(file, name) for name in ("block_count", "embedding_length"))
    if read_routers(file, n_layer, n_embd)[0] is not None:
        raise UserError(f"{file.path} has routers already", "give the dense file as the base")
    if bad := [
        len(unit.threshold) for unit in config.units.values() if len(unit.threshold) != n_layer
    ]:
        raise UserError(
            f"{file.path} has {n_layer} layers, the routers are for {bad[0]}",
            "give the base of the same model",
        )
    config.validate(n_layer)
    width = len(next(iter(routers.values()))[0])
    if width != n_embd:
        raise UserError(
            f"{file.path} has n_embd {n_embd}, the routers {width}",
            "give the base of the same model",
        )


def read_directory(directory: Path) -> tuple[MoDConfig, Routers]:
    """Configuration and routers of a MoD directory, all checked. Needs neither torch nor
    transformers.
    """
    hf_config = hf_directory.read_json(directory / "config.json", _CURE)
    if "mod" not in hf_config:
        raise UserError(
            f"{directory} is no MoD model: its config.json has no key mod",
            "run `mod-export convert`",
        )
    config = MoDConfig.from_dict(hf_config["mod"])
    # how many layers the base model has is not asked here, where architectures differ, but of its
    # GGUF
    units = config.validate(
        max((len(unit.threshold) for unit in config.units.values()), default=0)
    ).routed()
    if not units:
        raise UserError(f"{directory} routes no unit", "convert the model again")
    return config, hf_directory.read_routers(hf_directory.tensor_files(directory), units)


def read_adapter(directory: Path, base: Path | None) -> tuple[MoDConfig, Routers]:
    """The same of an adapter, which must fit the GGUF `base`, whatever its quantisation."""
    found = adapter_files.read(directory)
    if found.lora:
        raise UserError(
            f"{directory} holds LoRA weights, which a GGUF cannot take as they are",
            f"run `mod-export convert MODEL --adapter {directory}` and export what that writes",
        )
    if base is None:
        raise UserError(
            f"{directory} is an adapter, without the weights of the model",
            "give a GGUF of it as --base",
        )
    compare(found.base, gguf_identity(GGUFFile.open(base)))
    return found.config, found.routers


def stored_type(directory: Path) -> str:
    """The widest float type among the directory's matrices: f32, f16 or bf16."""
    places = hf_directory.places_of(hf_directory.tensor_files(directory))
    headers = {path: hf_directory.safetensors_header(path) for path in set(places.values())}
    types = {
        headers[path][name]["dtype"]
        for name, path in places.items()
        if len(headers[path][name]["shape"]) > 1
    }
    return next((name for name in ("f32", "bf16", "f16") if name.upper() in types), "f32")
