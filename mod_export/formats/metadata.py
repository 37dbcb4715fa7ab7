"""The keys general.* of an exported file: what the model is called, what from, and which license.

    about = describe(Path("mod"), config)       # gguf-py's Metadata
    override(about)                              # for llama.cpp's converter
    keys(about, file)                            # for a file that exists
    file_name(about, "q8_0")                     # Qwen3-0.6B-MoD-kv-Q8_0.gguf

The meaning of the keys, and the convention of names, is that of ggml's specification of GGUF.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mod_export.config import MoDConfig
from mod_export.formats import adapter_files, ggml_types, hf_directory, model_card
from mod_export.formats.gguf import GGUFFile

if TYPE_CHECKING:
    import gguf

QUANTIZED_BY = "mod-export"
NAME_PARTS = ("name", "basename", "finetune", "version", "size_label")
BASE_MODEL = "general.base_model."


def describe(
    directory: Path, config: MoDConfig | None, base: GGUFFile | None = None
) -> gguf.Metadata:
    """Return what is known of the model in a MoD directory or adapter.

    config: None for a file without routers. base: the GGUF file whose weights are taken; what it
    says of itself comes first.
    """
    from gguf import Metadata

    card = model_card.read(directory)
    about = Metadata.apply_metadata_heuristic(
        Metadata(),
        {name: card[name] for name in (*model_card.KEPT, "base_model") if card.get(name)},
    )
    source = base or _source(directory)
    repository = card.get("base_model")
    if not isinstance(repository, str):
        repository = None
    name = repository or str(card.get("model_name", "")) or _recorded_name(directory)
    parts = Metadata.get_model_id_components(name or None, _parameters(directory, base))
    about.name, _, about.basename, about.finetune, about.version, about.size_label = parts
    if source is not None and (base is not None or repository is None):
        for part in NAME_PARTS:
            setattr(about, part, source.get(f"general.{part}") or getattr(about, part))
    if not about.base_models and about.name:
        about.base_models = [{"name": about.name}]
    about.tags = ["text-generation"]
    if config is not None:
        about.tags.append("mixture-of-depths")
        routed = "-".join(("MoD", *config.units))
        about.finetune = f"{about.finetune}-{routed}" if about.finetune else routed
    return about


def override(about: gguf.Metadata) -> dict[str, object]:
    """Return the JSON that llama.cpp's converter takes as --metadata.

    The converter has no such entry for the license, which it reads in README.md.
    """
    names = (*NAME_PARTS, "quantized_by")
    found = {f"general.{name}": getattr(about, name) for name in names}
    found |= {"general.base_models": about.base_models, "general.tags": about.tags}
    return {name: value for name, value in found.items() if value is not None}


def keys(about: gguf.Metadata, file: GGUFFile) -> tuple[list[tuple[str, str, object]], list[str]]:
    """Return the keys that a file gets with routers, as (name, type, value), and those it loses.

    It keeps what it says already, but for the model that it was made from where its repository is
    known, the fine-tuning, and who has quantised it where that was done here.
    """
    known = any("repo_url" in model for model in about.base_models or [])
    if not known and BASE_MODEL + "count" in file.keys:
        about = replace(about, base_models=None)
    size_label = about.size_label or _size_label(file)
    found = about_keys(replace(about, size_label=size_label), file.architecture)
    if (number := _file_type(file)) is not None:
        found.append(("general.file_type", "u32", number))
    changed = [BASE_MODEL] if known else []
    changed += [f"general.{name}" for name in ("finetune", "quantized_by") if getattr(about, name)]
    dropped = [name for name in file.keys if name.startswith(tuple(changed))]
    added = [key for key in found if key[0] not in file.keys or key[0] in dropped]
    return added, dropped


def about_keys(about: gguf.Metadata, architecture: str) -> list[tuple[str, str, object]]:
    """Return the keys that say all of `about`, as (name, type, value), without lists."""
    from gguf import GGUFWriter

    writer = GGUFWriter(None, architecture)
    replace(about, name=about.name or "").set_gguf_meta_model(writer)
    found = {name: entry.value for part in writer.kv_data for name, entry in part.items()}
    return [
        (name, "string" if isinstance(value, str) else "u32", value)
        for name, value in found.items()
        if isinstance(value, (str, int)) and value != ""
    ]


def file_name(about: gguf.Metadata, encoding: str | None, end: str = ".gguf") -> str:
    """Return the name of a file by the convention of GGUF: Qwen3-0.6B-MoD-kv-Q8_0.gguf."""
    from gguf import naming_convention

    parts = (about.name, about.basename, about.finetune, about.version, about.size_label)
    return naming_convention(*parts, encoding) + end


def encoding(file: GGUFFile) -> str | None:
    """Return the type of a file's weights, as names of files have it: Q4_K_M."""
    from gguf import LlamaFileType

    number = file.get("general.file_type", _file_type(file))
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return None


def _source(directory: Path) -> GGUFFile | None:
    """The keys of the GGUF file that a MoD directory was made from."""
    path = directory / hf_directory.VOCABULARY
    return GGUFFile.open(path) if path.is_file() else None


def _recorded_name(directory: Path) -> str:
    """The name that a directory notes of its original; '' where it notes none."""
    if adapter_files.is_adapter(directory):
        return adapter_files.read(directory).base["name"]
    config = hf_directory.read_json(directory / hf_directory.CONFIG_JSON, hf_directory.CONVERT)
    noted = config.get("_model_name_or_path") or config["mod"].get("calibration", {}).get("model")
    return Path(str(noted or "")).name


def _parameters(directory: Path, base: GGUFFile | None) -> int:
    """The number of the model's weights, routers apart; 0 where it is not known."""
    if base is not None:
        return sum(math.prod(tensor.shape) for tensor in base.tensors.values())
    if adapter_files.is_adapter(directory):
        return 0
    return sum(map(math.prod, hf_directory.shapes(directory)))


def _size_label(file: GGUFFile) -> str:
    """The size of a model as its name has it, by gguf-py's rule: 0.6B, or 8x7B of experts."""
    import numpy as np
    from gguf import GGUFWriter, size_label

    writer = GGUFWriter(None, file.architecture)
    for tensor in file.tensors.values():
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype("float32"), tensor.nbytes)
    return size_label(*writer.get_total_parameter_count())


def _file_type(file: GGUFFile) -> int | None:
    """The number in enum llama_ftype of the type that most matrices have."""
    sizes: dict[int, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    if not sizes:
        return None
    most = max(sizes, key=sizes.__getitem__)
    return next((f.file_type for f in ggml_types.FILE_FORMATS if f.type == most), None)
