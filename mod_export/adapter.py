"""Adapters: routers, and where it was trained LoRA, to be put on the model they were made for;
docs/how-to/use-adapters.md.

    identity = base_identity(base, tokenizer, "SmolLM2-135M-Instruct")    # before training
    save("adapter", config, routers, base, identity, figures={"perplexity": 27.5})
    model = apply(load("adapter"), base, tokenizer)

The files are those of adapter_files.py; LoRA itself is in lora.py.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mod_export.common.files import atomic_dir, safetensors_errors
from mod_export.common.tables import format_table
from mod_export.config import MoDConfig
from mod_export.formats import adapter_files
from mod_export.formats.adapter_files import MOD_JSON, ROUTERS, is_adapter, packaged, resolve
from mod_export.formats.base_identity import ROUNDING, base_identity, compare
from mod_export.model.directory import router_tensor_name
from mod_export.model.lora import (
    attach_lora,
    inject_lora,
    lora_of,
    merge_lora,
    read_lora,
    without_lora,
    write_lora,
)
from mod_export.model.mod_model import MoDModel, check_routers

logger = logging.getLogger(__name__)

__all__ = [
    "Adapter",
    "apply",
    "base_identity",
    "inject_lora",
    "is_adapter",
    "load",
    "merge_lora",
    "packaged",
    "resolve",
    "save",
    "without_lora",
]


@dataclass(frozen=True)
class Adapter:
    """routers: {(layer, kind): (w [n_embd], b [1])}; base: its identity; lora: (LoraConfig, {name:
    tensor}) or None.
    """

    config: MoDConfig
    routers: dict
    base: dict
    lora: tuple | None = None


def save(
    path: str | Path,
    config: MoDConfig,
    routers: dict,
    base: nn.Module,
    identity: dict,
    figures: dict | None = None,
    force: bool = False,
) -> None:
    """Write the directory, whole or not at all: routers, and the LoRA that inject_lora put on
    `base`, if any.

    identity: of the model before training; figures: {what: number} for the README. Raises UserError
    if `path` exists and `force` is not set, and for routers that do not fit or are not finite.
    """
    check_routers(config.validate(identity["n_layer"]), routers, identity["n_embd"])
    tensors = {
        router_tensor_name(*unit, part): tensor.detach().float().cpu().contiguous()
        for unit in config.routed()
        for part, tensor in zip(("weight", "bias"), routers[unit], strict=True)
    }
    with atomic_dir(path, force, marker=MOD_JSON) as directory, safetensors_errors():
        if lora_of(base) is not None:
            write_lora(base, directory, identity["name"])
        save_file(tensors, directory / ROUTERS, metadata={"format": "pt"})
        data = {"mod": config.to_dict(), "base": identity}
        (directory / MOD_JSON).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        text = _readme(
            Path(path).name, config, identity, figures or {}, lora_of(base)
        )  # instead of PEFT's own
        (directory / "README.md").write_text(text, encoding="utf-8")


def load(path: str | Path) -> Adapter:
    """Read and check a directory. Raises UserError naming what is missing, damaged, not finite or
    unknown.
    """
    found = adapter_files.read(Path(path))
    routers = {
        unit: tuple(torch.from_numpy(array) for array in pair)
        for unit, pair in found.routers.items()
    }
    return Adapter(found.config, routers, found.base, read_lora(Path(path)) if found.lora else None)


def apply(adapter: Adapter, base: nn.Module, tokenizer) -> MoDModel:
    """Make `base` the adapter's MoD model, in place, LoRA merged into the weights.

    Weights in another quantisation are accepted, with a warning. Raises UserError naming what
    differs where `base` is another model.
    """
    distance = compare(adapter.base, base_identity(base, tokenizer, "the model given"))
    if distance > ROUNDING:
        logger.warning(_differs(adapter, distance))
    if adapter.lora is not None:
        attach_lora(base, *adapter.lora)
        merge_lora(base)
    return MoDModel.from_base(base, tokenizer, adapter.config, adapter.routers)


def _differs(adapter: Adapter, distance: float) -> str:
    text = f"the weights differ by {distance:.1%} from those the adapter was made for"
    if adapter.lora is not None:
        return f"warning: {text}, and its LoRA was trained on exactly these"
    return f"{text}, as after quantisation or fine-tuning; its routers fit all the same"


def _readme(name: str, config: MoDConfig, identity: dict, figures: dict, lora) -> str:
    kinds = ", ".join(
        f"{sum(p > 0 for p in unit.threshold)} {kind}" for kind, unit in config.units.items()
    )
    parts = f"routers for {kinds} units of {identity['n_layer']} layers"
    if lora is not None:
        parts += f", and LoRA of rank {lora.peft_config['default'].r} in PEFT's format"
    model = f"{identity['name']} ({identity['model_type']})"
    lines = [
        f"# {name}",
        "",
        f"A Mixture-of-Depths adapter for {model}, which it holds nothing of:",
        f"{parts}.",
        "",
    ]
    if figures:
        lines += [
            format_table(
                ["figure", "value"], [[key, value] for key, value in figures.items()], True
            ),
            "",
        ]
    lines += [
        f"    mod-export convert MODEL --adapter {name} -o mod",
        "    mod-export export mod -o mod.gguf",
        "",
    ]
    if lora is None:
        lines += [
            "or, onto any GGUF of the model, whatever its quantisation,",
            "",
            f"    mod-export export {name} --base MODEL.gguf -o mod.gguf",
            "",
        ]
    return "\n".join(lines)
