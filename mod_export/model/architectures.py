"""What a decoder layer consists of, for each architecture: the table to extend.

Knows nothing of routers and of files. A row of ARCHITECTURES is enough for an architecture that has
the usual Hugging Face layer with other attribute names.

    for parts in decoder_layers(model): parts.attn, parts.ffn
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from mod_export.errors import UserError


@dataclass(frozen=True)
class Names:
    """Attribute names in a decoder layer; the defaults are those of Llama and most later models.

    attn, ffn: the sublayers' main modules
    attn_out, ffn_out: the last module before each residual sum. This is a norm in models that norm
        the output.
    ffn_entry: the first module that reads the residual stream for the FFN. With None the FFN reads
        the layer's input, as in models whose attention and FFN run side by side.
    """

    attn: str = "self_attn"
    ffn: str = "mlp"
    attn_out: str = "self_attn"
    ffn_out: str = "mlp"
    ffn_entry: str | None = "post_attention_layernorm"


_OUTPUT_NORMS = {"attn_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"}

# model_type -> names, for architectures whose layers do not have Llama's names or order
ARCHITECTURES = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), Names(ffn_entry="pre_feedforward_layernorm", **_OUTPUT_NORMS)
    ),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), Names(ffn_entry="mlp", **_OUTPUT_NORMS)),
    **dict.fromkeys(("cohere", "cohere2", "phi"), Names(ffn_entry=None)),
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


def context_length(base: nn.Module) -> int | None:
    """Return the tokens of the longest sequence that the model was made for.

    None: its configuration does not say.
    """
    return getattr(base.config, "max_position_embeddings", None) or None


def decoder_layers(base: nn.Module) -> list[LayerParts]:
    """Return the parts of every decoder layer, first layer first.

    Raises UserError if the architecture is not supported.
    """
    names = ARCHITECTURES.get(base.config.model_type, Names())
    return [_find_parts(base, layer, names) for layer in _layer_list(base)]


def n_embd(base: nn.Module) -> int:
    """Return the width of the residual stream."""
    return base.config.hidden_size


def norm_eps(base: nn.Module) -> float:
    """Return the epsilon of the model's own norms.

    Raises UserError if the configuration names none.
    """
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"):
        if (value := getattr(base.config, name, None)) is not None:
            return float(value)
    raise _unsupported(base, "its configuration names no norm epsilon")


def _layer_list(base: nn.Module) -> nn.ModuleList:
    """Return the first ModuleList with as many entries as the model has layers."""
    n_layer = getattr(base.config, "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layer:
            return module
    raise _unsupported(base, "its decoder layers were not found")


def _find_parts(base: nn.Module, layer: nn.Module, names: Names) -> LayerParts:
    """Look each role up by its name; check that the layer takes what the wrapper has to pass."""
    kind = type(layer).__name__
    parameters = inspect.signature(type(layer).forward).parameters
    for needed in ("hidden_states", "attention_mask", "past_key_values"):
        if needed not in parameters:
            raise _unsupported(base, f"{kind}.forward takes no {needed}")
    found = {}
    for role in ("attn", "ffn", "attn_out", "ffn_out", "ffn_entry"):
        name = getattr(names, role)
        found[role] = getattr(layer, name, None) if name else None
        if name and not isinstance(found[role], nn.Module):
            raise _unsupported(base, f"its {kind} has no {name}")
    return LayerParts(layer=layer, **found)


def _unsupported(base: nn.Module, reason: str) -> UserError:
    model_type = getattr(base.config, "model_type", "?")
    return UserError(
        f"unsupported architecture {model_type}: {reason}",
        "use a model with Llama's kind of layers, or see docs/how-to/add-an-architecture.md",
    )
