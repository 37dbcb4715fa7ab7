"""What a decoder layer consists of, for each architecture: the table to extend.

Knows nothing of routers and of files. A row of ARCHITECTURES is enough for an architecture that has
the usual Hugging Face layer with other attribute names.

    for parts in decoder_layers(model): parts.attn, parts.ffn
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

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
    ffn_beside: a second module of the FFN, whose output is added to that of `ffn` in some layers
    residual_scale: the layer's factor of what attention and FFN give, before the residual sum
    parallel: the field of the configuration that says whether attention and FFN run side by side;
        then `ffn_entry` does not count
    norm_eps: the epsilon of the norms, where it is no field of the configuration
    """

    attn: str = "self_attn"
    ffn: str = "mlp"
    attn_out: str = "self_attn"
    ffn_out: str = "mlp"
    ffn_entry: str | None = "post_attention_layernorm"
    ffn_beside: str | None = None
    residual_scale: str | None = None
    parallel: str | None = None
    norm_eps: float | None = None


_OUTPUT_NORMS = {"attn_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"}
_GLM4 = {"attn_out": "post_self_attn_layernorm", "ffn_out": "post_mlp_layernorm"}
_EXPERTS = {"ffn": "block_sparse_moe", "ffn_out": "block_sparse_moe"}
_MULTIPLIER = {"residual_scale": "residual_multiplier"}

# model_type -> names, for architectures whose layers do not have Llama's names or order
ARCHITECTURES = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), Names(ffn_entry="pre_feedforward_layernorm", **_OUTPUT_NORMS)
    ),
    "vaultgemma": Names(ffn_entry="pre_feedforward_layernorm"),
    **dict.fromkeys(
        ("olmo2", "olmo3", "exaone4", "flex_olmo"), Names(ffn_entry="mlp", **_OUTPUT_NORMS)
    ),
    "olmo": Names(norm_eps=1e-5),
    **dict.fromkeys(("glm4", "kolibri1"), Names(**_GLM4)),
    "afmoe": Names(
        attn_out="post_attention_layernorm",
        ffn_entry="pre_mlp_layernorm",
        ffn_out="post_mlp_layernorm",
    ),
    "apertus": Names(ffn_entry="feedforward_layernorm"),
    "llama4_text": Names(ffn="feed_forward", ffn_out="feed_forward"),
    "dbrx": Names(
        attn="norm_attn_norm.attn",
        attn_out="norm_attn_norm.attn",
        ffn="ffn",
        ffn_out="ffn",
        ffn_entry="norm_attn_norm.norm_2",
        norm_eps=1e-5,
    ),
    **dict.fromkeys(("granite", "granite_swa"), Names(**_MULTIPLIER)),
    "granitemoe": Names(**_EXPERTS, **_MULTIPLIER),
    **dict.fromkeys(
        ("granitemoeshared", "granitemoe_swa"),
        Names(ffn_beside="shared_mlp", **_EXPERTS, **_MULTIPLIER),
    ),
    "hyperclovax": Names(attn_out="post_norm1", ffn_out="post_norm2", **_MULTIPLIER),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "phi"), Names(ffn_entry=None)),
    "gpt_neox": Names(
        attn="attention",
        attn_out="post_attention_dropout",
        ffn_out="post_mlp_dropout",
        parallel="use_parallel_residual",
    ),
    "stablelm": Names(parallel="use_parallel_residual"),
}

# model_type -> why its layers cannot have units, for those whose modules have the usual names
REFUSED = {
    **dict.fromkeys(("bloom", "mpt"), "its attention has ALiBi biases, which masks cannot hold"),
    **dict.fromkeys(
        ("deepseek_v4", "hy_v4"), "its residual stream consists of several streams with weights"
    ),
    **dict.fromkeys(
        ("gemma3n_text", "inkling2_text"), "its layers read more than one residual stream"
    ),
    "inkling_text": "its convolutions carry a state from token to token",
    "longcat_flash": "its layers have two attentions each",
    "minimax": "its residual stream is normed in every layer",
    **dict.fromkeys(("beam", "doge"), "its layers scale the residual stream"),
}


# Fields with the epsilon of the norms: those of llama.cpp's converter, RMS norms first.
NORM_EPS = (
    "rms_norm_eps",
    "norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "layernorm_epsilon",
)


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, by the roles that `Names` describes."""

    layer: nn.Module
    attn: nn.Module
    ffn: nn.Module
    attn_out: nn.Module
    ffn_out: nn.Module
    ffn_entry: nn.Module | None
    ffn_beside: nn.Module | None = None
    residual_scale: float = 1.0


def context_length(base: nn.Module) -> int | None:
    """Return the tokens of the longest sequence that the model was made for.

    None: its configuration does not say.
    """
    return getattr(base.config, "max_position_embeddings", None) or None


def decoder_layers(base: nn.Module) -> list[LayerParts]:
    """Return the parts of every decoder layer, first layer first.

    Raises UserError if the architecture is not supported.
    """
    if reason := REFUSED.get(base.config.model_type):
        raise _unsupported(base, reason)
    names = names_of(base)
    return [_find_parts(base, layer, names) for layer in _layer_list(base)]


def n_embd(base: nn.Module) -> int:
    """Return the width of the residual stream."""
    return base.config.hidden_size


def names_of(base: nn.Module) -> Names:
    """Return the names in the decoder layers of a model, as its configuration has them."""
    names = ARCHITECTURES.get(base.config.model_type, Names())
    if names.parallel and getattr(base.config, names.parallel):
        return replace(names, ffn_entry=None)
    return names


def norm_eps(base: nn.Module) -> float:
    """Return the epsilon of the model's own norms, RMS norms or layer norms.

    It is the one that llama.cpp's converter writes to the file, where the runtime reads it for the
    routers. Raises UserError if the configuration names none.
    """
    if (fixed := names_of(base).norm_eps) is not None:
        return fixed
    for name in NORM_EPS:
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
    for needed in ("hidden_states", "attention_mask"):
        if needed not in parameters:
            raise _unsupported(base, f"{kind}.forward takes no {needed}")
    if not {"past_key_values", "layer_past"} & set(parameters):
        raise _unsupported(base, f"{kind}.forward takes no cache")
    found = {}
    for role in ("attn", "ffn", "attn_out", "ffn_out", "ffn_entry"):
        name = getattr(names, role)
        found[role] = _module(layer, name) if name else None
        if name and found[role] is None:
            raise _unsupported(base, f"its {kind} has no {name}")
    if names.ffn_beside:
        found["ffn_beside"] = _module(layer, names.ffn_beside)
    scale = float(getattr(layer, names.residual_scale)) if names.residual_scale else 1.0
    return LayerParts(layer=layer, residual_scale=scale, **found)


def _module(layer: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name with dots, or None."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _unsupported(base: nn.Module, reason: str) -> UserError:
    model_type = getattr(base.config, "model_type", "?")
    return UserError(
        f"unsupported architecture {model_type}: {reason}",
        "use a model with Llama's kind of layers, or see docs/how-to/add-an-architecture.md",
    )
