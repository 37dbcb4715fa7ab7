"""Routers in a GGUF file of their own, which the runtime puts beside the file of a model.

    write(Path("routers.gguf"), adapter_files.read(directory), directory)
    found = read("routers.gguf")             # a GGUFAdapter, all checked
    locate("smollm2-kv")                     # a file of it in the cache, made where it is missing
    with_routers("base.gguf", "smollm2-kv")  # the model's file, as if the routers were in it

The keys and tensors are those that the routers have in a model's file (schema.py); the keys
`adapter.mod.base.*` tell which model they are for. docs/reference/gguf-schema.md has the names.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mod_export.common.files import atomic_file
from mod_export.common.paths import SET_CACHE, cache_dir
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import (
    adapter_files,
    architectures,
    base_identity,
    gguf,
    hub,
    metadata,
    schema,
)
from mod_export.formats.adapter_files import AdapterFiles
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.model_checks import check_model
from mod_export.formats.schema import Routers
from mod_export.units import KV

TYPE_KEY, TYPE = "adapter.type", "mod"
BASE = "adapter.mod.base."  # and a name: of the keys about the model that the routers are for
# key without the architecture -> the same in an identity (base_identity.py)
NUMBERS = {"block_count": "n_layer", "embedding_length": "n_embd", "vocab_size": "n_vocab"}
TEXTS = ("name", "tokenizer")
SAMPLES = ("embedding", "ffn")
MAKE_ONE = "give what `mod-export export ADAPTER -o routers.gguf` writes, or an adapter"


@dataclass(frozen=True)
class GGUFAdapter:
    """A file of routers. base: the identity of the model that they are for (base_identity.py)."""

    file: GGUFFile
    config: MoDConfig
    routers: Routers
    base: dict


def is_adapter(file: GGUFFile) -> bool:
    """Whether a file says that it holds routers alone."""
    return file.get("general.type") == "adapter" and file.get(TYPE_KEY) == TYPE


def write(target: Path, adapter: AdapterFiles, directory: Path) -> None:
    """Write the routers of an adapter, which lies in `directory`, to the file `target`.

    Raises UserError for an adapter with LoRA, one that chooses by top-k, and one for a model that
    llama.cpp does not know or that cannot have its units.
    """
    target.write_bytes(_content(adapter, directory))


def _content(adapter: AdapterFiles, directory: Path) -> bytes:
    """The bytes of the file."""
    if adapter.lora:
        raise UserError(
            f"{directory} holds LoRA weights, which go into the weights of the model",
            f"make one file of both: mod-export export {directory.name} --base MODEL -o FILE.gguf",
        )
    if adapter.config.top_k:
        raise UserError(
            f"{directory} chooses by top-k, which looks at later tokens",
            "use --method threshold to train",
        )
    architecture = architectures.of_model_type(adapter.base["model_type"])
    if architecture is None:
        raise UserError(
            f"llama.cpp knows no architecture for {adapter.base['model_type']}, which {directory} "
            "is for",
            "use it in torch, or give a GGUF file of the model as --base",
        )
    architectures.check(architecture, adapter.config.units)
    keys = [
        ("general.type", "string", "adapter"),
        *metadata.about_keys(metadata.describe(directory, adapter.config), architecture),
        (TYPE_KEY, "string", TYPE),
        *_base_keys(architecture, adapter.base, adapter.config),
        *schema.to_keys(architecture, adapter.config),
    ]
    content = io.BytesIO()
    gguf.write(content, keys, schema.to_tensors(adapter.config, adapter.routers))
    return content.getvalue()


def _base_keys(
    architecture: str, base: dict, config: MoDConfig
) -> Iterator[tuple[str, str, object]]:
    """The keys about the model; K/V heads only where they decide apart, else nobody needs them."""
    for name, field in NUMBERS.items():
        yield f"{architecture}.{name}", "u32", base[field]
    if (heads := config.heads(KV)) > 1:
        yield f"{architecture}.attention.head_count_kv", "u32", heads
    for name in TEXTS:
        yield BASE + name, "string", base[name]
    for name in SAMPLES:
        if name in base["weights"]:
            yield BASE + name, "f32[]", base["weights"][name]


def read(path: str | Path) -> GGUFAdapter:
    """Read and check a file of routers.

    Raises UserError for another file, naming the key or tensor that is wrong or too many.
    """
    file = GGUFFile.open(path)
    if not is_adapter(file):
        raise UserError(f"{path} holds no routers to be put beside a model", MAKE_ONE)
    for name in file.tensors:
        if not schema.ROUTER_TENSOR.fullmatch(name):
            raise UserError(f"{path}: tensor {name} is no router's", schema.EXPORT_AGAIN)
    config, routers = schema.read_routers(file)
    if config is None:
        raise UserError(f"{path} has no keys of routers", schema.EXPORT_AGAIN)
    weights = {name: file.get(BASE + name) for name in SAMPLES if BASE + name in file.keys}
    base = {
        "model_type": file.architecture,
        **{field: file.model_number(name) for name, field in NUMBERS.items()},
        **{name: file.get(BASE + name) for name in TEXTS},
        "weights": {name: list(map(float, values)) for name, values in weights.items()},
    }
    return GGUFAdapter(file, config, routers, base_identity.check(base, str(path)))


def locate(mod: str | os.PathLike) -> Path:
    """Return the path of a file of routers, which is checked: `mod`, or one in the cache.

    mod: such a file, or an adapter: a directory, the name of a packaged one, or of one on the
    Hugging Face hub. Raises UserError for anything else, and as `read` and `write` do.
    """
    return located(mod).file.path


def located(mod: str | os.PathLike) -> GGUFAdapter:
    """Return what `locate` finds, read and checked."""
    path = hub.locate(mod)
    if path.is_file() or path.suffix == ".gguf":
        return read(path)
    directory = adapter_files.resolve(path)
    content = _content(adapter_files.read(directory), directory)
    name = hashlib.sha256(content).hexdigest()[:16]
    target = cache_dir("routers") / f"{name}.gguf"
    if not target.is_file():
        with atomic_file(target, force=True, cure=SET_CACHE) as tmp:
            tmp.write_bytes(content)
    return read(target)


def with_routers(path: str | Path, mod: str | os.PathLike | None) -> GGUFFile:
    """Open a model's file, with the keys and tensors of routers beside it as if they were its own.

    mod: as `locate` takes it, or None for the file alone. Raises UserError for a file of no model,
    where the routers are for another model, and where the file has some already.
    """
    file = GGUFFile.open(path)
    check_model(file)
    if mod is None:
        return file
    adapter = located(mod)
    if adapter.file.architecture != file.architecture:
        raise UserError(
            f"{mod} is for {adapter.base['name']} of architecture '{adapter.file.architecture}', "
            f"{path} has '{file.architecture}'",
            base_identity.RIGHT_MODEL,
        )
    base_identity.compare(adapter.base, base_identity.gguf_identity(file))
    schema.check_base(file, adapter.config, adapter.routers)
    architectures.check_units(file, adapter.config)
    start = schema.prefix(file.architecture)
    added = {name: key for name, key in adapter.file.keys.items() if name.startswith(start)}
    return replace(file, keys=file.keys | added, tensors=file.tensors | adapter.file.tensors)
