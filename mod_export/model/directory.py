"""A MoD model as a Hugging Face directory: base weights, routers, tokenizer, and the key `mod` in
config.json.

The directory stays one of the base architecture. Routers are the tensors
model.layers.{l}.mod_{kind}.weight [n_embd] and .bias [1], float32, in the same safetensors files;
without them it is the plain base model.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch

from mod_export.common.files import atomic_dir, safetensors_errors
from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats.adapter_files import is_adapter
from mod_export.model import loading
from mod_export.model.lora import lora_of

_ROUTER_TENSOR = re.compile(r"model\.layers\.(\d+)\.mod_(\w+)\.(weight|bias)")


def router_tensor_name(layer: int, kind: str, part: str) -> str:
    """part: weight or bias."""
    return f"model.layers.{layer}.mod_{kind}.{part}"


def save(
    path: str | Path,
    base,
    tokenizer,
    config: MoDConfig,
    routers: dict,
    force: bool = False,
    **kwargs,
) -> None:
    """Write the directory, whole or not at all; kwargs go to save_pretrained (max_shard_size).

    routers: {(layer, kind): (w [n_embd], b [1])}. Raises UserError if `path` exists and `force` is
    not set, and where `base` has LoRA.
    """
    if lora_of(base) is not None:
        raise UserError("the model has LoRA that is not merged", "merge it, or save an adapter")
    state = base.state_dict()
    for (layer, kind), (weight, bias) in routers.items():
        state[router_tensor_name(layer, kind, "weight")] = weight.detach().float().cpu()
        state[router_tensor_name(layer, kind, "bias")] = bias.detach().float().cpu()
    with atomic_dir(path, force) as directory, safetensors_errors(), loading.quiet():
        base.config.mod = config.to_dict()
        try:
            base.save_pretrained(directory, state_dict=state, **kwargs)
        finally:
            del base.config.mod
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            _copy_sentencepiece(tokenizer, directory)


def load(path: str | Path, dtype: torch.dtype = torch.float32):
    """-> base, tokenizer, config, routers as `save` takes them. Raises UserError naming what is
    missing or wrong.
    """
    path = Path(path)
    config = read_config(path)
    routers = read_routers(path)
    base, tokenizer = loading.load(path, dtype)
    del base.config.mod
    return base, tokenizer, config, routers


def read_config(path: str | Path) -> MoDConfig:
    """The MoDConfig of a directory, without loading weights."""
    if Path(path).is_file():
        raise UserError(f"{path} is a file", "give a MoD directory; mod-export convert makes one")
    try:
        data = json.loads((Path(path) / "config.json").read_text())
    except FileNotFoundError:
        if is_adapter(path):
            cure = f"run mod-export convert MODEL --adapter {path}"
            raise UserError(
                f"{path} is an adapter, without the weights of the model", cure
            ) from None
        raise UserError(
            f"{path} is not a MoD model: no config.json", "make one with mod-export convert"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}/config.json cannot be read ({error})", "convert the model again"
        ) from error
    if not isinstance(data, dict) or "mod" not in data:
        raise UserError(
            f"{path} is not a MoD model: its config has no key mod",
            "make one with mod-export convert",
        )
    return MoDConfig.from_dict(data["mod"])


def read_routers(path: str | Path) -> dict:
    """{(layer, kind): (weight, bias)} of all router tensors in the directory's safetensors files."""
    from safetensors import SafetensorError, safe_open

    found: dict = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if match := _ROUTER_TENSOR.fullmatch(name):
                        layer, kind, part = int(match[1]), match[2], match[3]
                        found.setdefault((layer, kind), {})[part] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"{file} cannot be read ({error})", "convert the model again"
            ) from error
    for (layer, kind), parts in found.items():
        if missing := {"weight", "bias"} - set(parts):
            raise UserError(
                f"{path} lacks {router_tensor_name(layer, kind, missing.pop())}",
                "convert the model again",
            )
    return {unit: (parts["weight"], parts["bias"]) for unit, parts in found.items()}


def _copy_sentencepiece(tokenizer, directory: Path) -> None:
    """llama.cpp's converter prefers the SentencePiece file, which transformers does not write any
    more.
    """
    source = Path(str(tokenizer.name_or_path)) / "tokenizer.model"
    if source.is_file() and not (directory / source.name).exists():
        shutil.copyfile(source, directory / source.name)
