"""Save and load a MoD model as a Hugging Face directory.

The directory holds the base weights, the routers, the tokenizer, and the key `mod` in config.json.

The directory stays one of the base architecture. Routers are the tensors
model.layers.{l}.mod_{kind}.weight [n_embd] and .bias [1], float32, in the same safetensors files
([n_head_kv, n_embd] and [n_head_kv] where a layer decides by head); without them it is the plain
base model.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch

from mod_export.common.files import atomic_dir, safetensors_errors
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats import (
    drafts,
    hf_directory,
    hub,
    model_card,
    safetensors_writing,
    schema,
)
from mod_export.formats.adapter_files import ROUTERS, is_adapter
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.safetensors_writing import StoredTensor
from mod_export.model import devices, loading, streaming
from mod_export.model.lora import lora_of

# Types whose weights transformers saves under other names than those of the modules: routers
# would be renamed with them.
RENAMED = ("nemotron_h",)


def save(
    path: str | Path,
    base,
    tokenizer,
    config: MoDConfig,
    routers: dict,
    force: bool = False,
    linked: bool = False,
    **kwargs,
) -> None:
    """Write the directory, whole or not at all; kwargs go to save_pretrained (max_shard_size).

    routers: {Unit: (w [n_embd], b [1])}. linked: files of weights that stay as they are become
    links, for a directory that is read and removed. Raises UserError if `path` exists and `force`
    is not set, and where `base` has LoRA.
    """
    if lora_of(base) is not None:
        raise UserError("the model has LoRA that is not merged", "merge it, or save an adapter")
    with atomic_dir(path, force) as directory, safetensors_errors(), loading.quiet():
        base.config.mod = config.to_dict()
        added = router_state(config, routers)
        weights = streaming.source_of(base)
        try:
            if weights is not None:
                files = weights.unchanged() if linked else []
                safetensors_writing.link(files, directory)
                shards = [] if files else weights.stored()
                _save_stored(directory, base, shards, added)
            elif base.config.model_type in RENAMED:
                base.save_pretrained(directory, **kwargs)
                safetensors_writing.write_file(directory / ROUTERS, _stored(added))
            else:
                base.save_pretrained(directory, state_dict=base.state_dict() | added, **kwargs)
        finally:
            del base.config.mod
        source = origin = str(base.config.name_or_path or "")
        if tokenizer is not None:
            source = str(tokenizer.name_or_path or origin)
            _save_tokenizer(tokenizer, source, directory)
        # The configuration of a model from a GGUF file names no file, but its tokenizer does.
        if origin := origin or source:
            drafts.carry(Path(origin), directory, base.config.num_hidden_layers)
        card = model_card.origin(source)
        model_card.write(directory, card, model_card.model_text(card, config))


def _save_stored(
    directory: Path, base, shards: list[list[StoredTensor]], added: dict[str, torch.Tensor]
) -> None:
    """Write what `save_pretrained` would, tensor by tensor, in the types that the files have.

    shards: tensors of the base's files; without any the routers get a file of their own.
    """
    routers = _stored(added)
    if shards:
        safetensors_writing.write([*shards[:-1], shards[-1] + routers], directory)
    else:
        safetensors_writing.write_file(directory / ROUTERS, routers)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = devices.OF_WEIGHTS[hf_directory.stored_type(directory)]
    config.save_pretrained(directory)
    if base.can_generate():
        base.generation_config.save_pretrained(directory)


def _stored(added: dict[str, torch.Tensor]) -> list[StoredTensor]:
    """Return routers, float32, as what is written to a file."""
    arrays = {name: tensor.numpy() for name, tensor in added.items()}
    return [
        StoredTensor(name, "F32", array.shape, lambda array=array: [array.tobytes()])
        for name, array in arrays.items()
    ]


def router_state(config: MoDConfig, routers: dict) -> dict[str, torch.Tensor]:
    """The tensors that hold the routers in a directory and in an adapter, by name.

    routers: {Unit: (w [n_embd], b [1])}
    """
    arrays = {
        unit: tuple(tensor.detach().float().cpu().numpy() for tensor in pair)
        for unit, pair in routers.items()
    }
    tensors = schema.to_tensors(config, arrays, schema.hf_tensor_names)
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def load(path: str | Path, dtype: torch.dtype = torch.float32):
    """Return base, tokenizer, config and routers as `save` takes them.

    path: of the directory, or its name on the Hugging Face hub.

    Raises UserError naming what is missing or wrong.
    """
    path, config = _read_config(path)
    found = hf_directory.read_routers(hf_directory.tensor_files(path), config)
    routers = {
        unit: (torch.from_numpy(weight), torch.from_numpy(bias))
        for unit, (weight, bias) in found.items()
    }
    base, tokenizer = loading.load(path, dtype)
    del base.config.mod
    return base, tokenizer, config, routers


def open_streamed(path: str | Path, dtype: torch.dtype):
    """Return base and config as `load` does; the weights of layers are read when they run.

    Raises UserError as `load` does, and CannotStream where only the whole model can be loaded.
    """
    path, config = _read_config(path)
    return loading.open_streamed(path, dtype)[0], config


def _read_config(path: str | Path) -> tuple[Path, MoDConfig]:
    path = hub.locate(path)
    if is_adapter(path) and not (path / hf_directory.CONFIG_JSON).is_file():
        raise UserError(
            f"{path} is an adapter, without the weights of the model",
            "open it with mod_export.adapter.open_model, or make a whole directory with "
            f"`mod-export convert MODEL --adapter {path}`",
        )
    return path, hf_directory.read_config(path)


def save_without_weights(path: Path, base, tokenizer) -> None:
    """Write the configuration and the tokenizer of a model as a directory."""
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    with loading.quiet():
        config.save_pretrained(path)
        _save_tokenizer(tokenizer, str(tokenizer.name_or_path or ""), path)


def _save_tokenizer(tokenizer, source: str, directory: Path) -> None:
    """Save a tokenizer, with the files that transformers does not write, for the export.

    source: where the tokenizer came from, a directory or a GGUF file; '' where that is not known
    """
    tokenizer.save_pretrained(directory)
    if source:
        _copy_vocabulary(Path(source), directory)


def _copy_vocabulary(source: Path, directory: Path) -> None:
    """Copy what transformers does not keep of a tokenizer.

    llama.cpp's converter prefers tokenizer.model. VOCABULARY has the keys of a GGUF file, of which
    transformers keeps a part.
    """
    if source.is_file():
        hf_directory.write_vocabulary(GGUFFile.open(source), directory / hf_directory.VOCABULARY)
    for name in ("tokenizer.model", hf_directory.VOCABULARY):
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)
