"""Adapters: routers, and LoRA where it was trained, to be put on the model they were made for.

    identity = base_identity(base, tokenizer, "SmolLM2-135M-Instruct")    # before training
    save("adapter", config, routers, base, identity, figures={"perplexity": 27.5})
    model = apply(load("adapter"), base, tokenizer)
    model = open_model("adapter")                          # on the model that it names

formats/adapter_files.py describes the files, docs/how-to/use-adapters.md the use. LoRA itself is in
model/lora.py.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mod_export.common.files import atomic_dir, safetensors_errors
from mod_export.common.tables import format_table
from mod_export.config import MoDConfig
from mod_export.formats import adapter_files, hub, model_card
from mod_export.formats.adapter_files import MOD_JSON, ROUTERS
from mod_export.formats.base_identity import (
    ROUNDING_DISTANCE,
    compare,
    sample_matrix,
    vocabulary_hash,
)
from mod_export.model import architectures, devices, directory, loading
from mod_export.model.directory import router_state
from mod_export.model.lora import add_lora, lora_of, read_lora, write_lora
from mod_export.model.mod_model import MoDModel, check_routers
from mod_export.model.streaming import at_hand, embedding_rows
from mod_export.units import Unit

logger = logging.getLogger(__name__)

# Types with multipliers that llama.cpp's converter puts into the weights.
FOLDED = ("falcon_h1",)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's directory holds.

    routers: {unit: (w [n_embd], b [1])}
    base: identity of the model that the adapter is for
    lora: (LoraConfig, {name: tensor}), or None
    """

    config: MoDConfig
    routers: dict[Unit, tuple[torch.Tensor, torch.Tensor]]
    base: dict
    lora: tuple | None = None


def base_identity(base: nn.Module, tokenizer, name: str) -> dict:
    """Identity of a model as it is now; training and LoRA change the weights that it samples.

    `weights` of the result: {matrix: numbers} of the input embedding and of one FFN matrix in the
    middle, if the layer there has one; formats/base_identity.py compares such records.
    """
    layers = architectures.decoder_layers(base)
    embedding, middle = base.get_input_embeddings().weight, len(layers) // 2
    shape = embedding.shape[0], embedding.shape[1]
    weights = {"embedding": sample_matrix(shape, lambda i: _embedding_row(base, i))}
    ffn = layers[middle].ffn
    modules = () if ffn is None else ffn.modules()
    if linears := [part for part in modules if isinstance(part, nn.Linear)]:
        with at_hand(base, middle):
            matrix, scale = linears[-1].weight, _scale(base, ffn=True)
            shape = matrix.shape[0], matrix.shape[1]
            weights["ffn"] = sample_matrix(shape, lambda i: scale * _row(matrix[i : i + 1]))
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    return {
        "name": name,
        "model_type": base.config.model_type,
        "n_layer": len(layers),
        "n_embd": architectures.n_embd(base),
        "n_vocab": len(embedding),
        "tokenizer": vocabulary_hash({number: token for token, number in vocabulary.items()}),
        "weights": weights,
    }


def _embedding_row(base: nn.Module, i: int) -> np.ndarray:
    """Return a row of the input embedding as a GGUF file has it."""
    return _scale(base) * _row(embedding_rows(base, [i]))


def _scale(base: nn.Module, ffn: bool = False) -> float:
    """Return what a GGUF file has multiplied the input embedding, or the FFN's output, with."""
    if base.config.model_type not in FOLDED:
        return 1.0
    return base.config.mlp_multipliers[1] if ffn else base.config.embedding_multiplier


def _row(rows: torch.Tensor) -> np.ndarray:
    """Return the first of some rows."""
    return rows[0].detach().float().cpu().numpy()


def save(
    path: str | Path,
    config: MoDConfig,
    routers: dict,
    base: nn.Module,
    identity: dict,
    figures: dict | None = None,
    force: bool = False,
    model: str = "",
) -> None:
    """Write the directory, whole or not at all: routers, and the LoRA on `base` where there is one.

    The rest is as `write` takes it. Raises UserError if `path` exists and `force` is not set, and
    as `write` does.
    """
    with atomic_dir(path, force) as directory:
        write(directory, Path(path).name, config, routers, base, identity, figures, model)


def write(
    directory: Path,
    name: str,
    config: MoDConfig,
    routers: dict,
    base: nn.Module,
    identity: dict,
    figures: dict | None = None,
    model: str = "",
) -> None:
    """Write an adapter into an empty directory.

    name: of the adapter, for the model card
    identity: of the model before training
    figures: {what: number}, for the model card
    model: where the model before training was found, as hub.locate takes it

    Raises UserError for routers that do not fit or are not finite.
    """
    check_routers(config.validate(identity["n_layer"]), routers, identity["n_embd"])
    tensors = router_state(config, routers)
    with safetensors_errors():
        if lora_of(base) is not None:
            write_lora(base, directory, identity["name"])
        save_file(tensors, directory / ROUTERS, metadata={"format": "pt"})
    data = {"mod": config.to_dict(), "base": identity} | ({"model": model} if model else {})
    (directory / MOD_JSON).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    card = model_card.origin(str(base.config.name_or_path or ""))
    text = _card_text(name, config, identity, figures or {}, lora_of(base), card)
    # PEFT writes a README of its own, which is replaced
    if card.base_model:
        card.base_model_relation = "adapter"
    model_card.write(directory, card, text)


def load(path: str | Path) -> Adapter:
    """Read and check a directory.

    Raises UserError naming what is missing, damaged, not finite or unknown.
    """
    found = adapter_files.read(Path(path))
    routers = {
        unit: (torch.from_numpy(weight), torch.from_numpy(bias))
        for unit, (weight, bias) in found.routers.items()
    }
    lora = read_lora(Path(path)) if found.lora else None
    return Adapter(found.config, routers, found.base, lora)


def open_model(
    path: str | Path, base: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> MoDModel:
    """Return the model of a MoD directory, or of an adapter on its base, LoRA merged.

    base: as hub.locate takes it, where the adapter is not to be put on the model that it names. A
    directory has its weights, and takes none. Raises UserError as load, apply and the loading do.
    """
    return MoDModel.from_base(*load_parts(path, base, dtype))


def load_parts(path: str | Path, base: str | Path | None, dtype: torch.dtype):
    """Return what MoDModel.from_base takes of what `open_model` opens."""
    path = hub.locate(path)
    weights, found = adapter_files.weights_of(path, base), adapter_files.find(path)
    if found is None:
        return directory.load(path, dtype)
    adapter = load(found)
    # What LoRA makes of weights is rounded as `convert --adapter` rounds it.
    held = devices.DTYPES[loaded_type(adapter, weights)] if dtype == torch.float32 else dtype
    model, tokenizer = loading.load(weights, held)
    merge(adapter, model, tokenizer)
    if held != dtype:
        model.to(dtype)
    return model, tokenizer, adapter.config, adapter.routers


def open_streamed(path: str | Path, base: str | Path | None, dtype: torch.dtype):
    """Return the base, without LoRA, and the configuration of what `open_model` opens.

    The weights of layers are read when they run. Raises CannotStream where only the whole model can
    be loaded.
    """
    path = hub.locate(path)
    weights, found = adapter_files.weights_of(path, base), adapter_files.find(path)
    if found is None:
        return directory.open_streamed(path, dtype)
    return loading.open_streamed(weights, dtype)[0], adapter_files.read(found).config


def loaded_type(adapter: Adapter, model: Path) -> str:
    """Return the type to load a model in for an adapter: LoRA goes into weights as they are."""
    own = devices.OF_WEIGHTS.get(loading.stored_type(model), "float32")
    return own if adapter.lora is not None else "float32"


def apply(adapter: Adapter, base: nn.Module, tokenizer) -> MoDModel:
    """Make `base` the adapter's MoD model, in place, LoRA merged into the weights.

    Weights in another quantisation are accepted, with a warning. Raises UserError naming what
    differs where `base` is another model, and CannotStream as model/lora.py does.
    """
    merge(adapter, base, tokenizer)
    return MoDModel.from_base(base, tokenizer, adapter.config, adapter.routers)


def merge(adapter: Adapter, base: nn.Module, tokenizer) -> None:
    """Check that `base` is the adapter's, and merge LoRA into its weights; see `apply`.

    Raises CannotStream as model/lora.py does.
    """
    distance = compare(adapter.base, base_identity(base, tokenizer, "the model given"))
    if distance > ROUNDING_DISTANCE:
        logger.warning(_differs(adapter, distance))
    if adapter.lora is not None:
        add_lora(base, *adapter.lora)


def _differs(adapter: Adapter, distance: float) -> str:
    text = f"the weights differ by {distance:.1%} from those the adapter was made for"
    if adapter.lora is not None:
        return f"warning: {text}, and its LoRA was trained on exactly these"
    return f"{text}, as after quantisation or fine-tuning; its routers fit all the same"


def _card_text(name: str, config: MoDConfig, identity: dict, figures: dict, lora, card) -> str:
    counts = []
    for kind, unit in config.units.items():
        counts.append(f"{sum(p > 0 for p in unit.threshold)} {kind}")
    parts = f"routers for {', '.join(counts)} units of {identity['n_layer']} layers"
    if lora is not None:
        parts += f", and LoRA of rank {lora.peft_config['default'].r} in PEFT's format"
    base = card.base_model or "MODEL"
    original = model_card.link(card, card.base_model or identity["name"])
    model = f"{original} ({identity['model_type']})"
    lines = [
        f"# {name}",
        "",
        f"A Mixture-of-Depths adapter for {model}, which it holds nothing of:",
        f"{parts}.",
        "",
    ]
    if figures:
        rows = [[what, number] for what, number in figures.items()]
        lines += [format_table(["figure", "value"], rows, True), ""]
    lines += [f"    mod-export export {name} --base {base} -o mod.gguf", ""]
    if lora is None:
        lines += ["or with any GGUF of the model as --base, whatever its quantisation.", ""]
    return "\n".join(lines)
