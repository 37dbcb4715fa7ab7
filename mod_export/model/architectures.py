"""What a decoder layer consists of, for each architecture: the table to extend.

Knows nothing of routers and of files. A row of ARCHITECTURES is enough for an architecture that has
the usual Hugging Face layer with other attribute names.

    for parts in decoder_layers(model): parts.attn, parts.ffn
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mod_export.errors import UserError
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit


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
    refused: kinds of units that the layers cannot have, and why
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
    refused: Mapping[str, str] = field(default_factory=dict)


_OUTPUT_NORMS = {"attn_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"}
_GLM4 = {"attn_out": "post_self_attn_layernorm", "ffn_out": "post_mlp_layernorm"}
_EXPERTS = {"ffn": "block_sparse_moe", "ffn_out": "block_sparse_moe"}
_MULTIPLIER = {"residual_scale": "residual_multiplier"}

# model_type -> names, for architectures whose layers do not have Llama's names or order
ARCHITECTURES = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), Names(ffn_entry="pre_feedforward_layernorm", **_OUTPUT_NORMS)
    ),
    "gemma4_text": Names(
        ffn_entry="pre_feedforward_layernorm",
        # llama.cpp's graph ends the FFN where the layer ends.
        refused={FFN: "per-layer embeddings and the layer's scale come after the FFN"},
        **_OUTPUT_NORMS,
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
    "llama4_text": Names(
        ffn="feed_forward",
        ffn_out="feed_forward",
        refused=dict.fromkeys(
            (ATTN, BLOCK), "transformers scales queries by their row instead of their position"
        ),
    ),
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
# Classes of FFNs that return (output, scores of the experts); others return the output alone.
FFNS_WITH_SCORES = ("GptOssMLP", "Llama4TextMoe")


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, by the roles that `Names` describes.

    kv_source: the earlier layer whose K/V this layer reads; None where it has its own
    refused: kinds of units that this layer cannot have, and why
    """

    layer: nn.Module
    attn: nn.Module
    ffn: nn.Module
    attn_out: nn.Module
    ffn_out: nn.Module
    ffn_entry: nn.Module | None
    ffn_beside: nn.Module | None = None
    residual_scale: float = 1.0
    kv_source: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def ffn_returns_scores(self) -> bool:
        """Whether the FFN returns the scores of its experts beside its output."""
        return type(self.ffn).__name__ in FFNS_WITH_SCORES


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
    parts = [_find_parts(base, layer, names) for layer in _layer_list(base)]
    sources = _kv_sources(base, len(parts))
    return [
        replace(
            part, kv_source=source, refused={**names.refused, **_refused_for_kv(layer, sources)}
        )
        for layer, (part, source) in enumerate(zip(parts, sources, strict=True))
    ]


def check_units(base: nn.Module, units: Iterable[Unit]) -> None:
    """Raise UserError for a unit that its layer cannot have, with the reason."""
    layers = decoder_layers(base)
    for layer, kind in units:
        if reason := layers[layer].refused.get(kind):
            raise UserError(
                f"layer {layer} of {base.config.model_type} cannot have a unit {kind}: {reason}",
                "route other layers or other kinds",
            )


def last_logits(n: int, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the argument `logits_to_keep` for the last n tokens of input_ids [B, T].

    It is an index, because models that share K/V between layers (Gemma 4) compute their last layers
    for these tokens only where it is a number.
    """
    n_token = input_ids.shape[1]
    return torch.arange(max(n_token - n, 0), n_token, device=input_ids.device)


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


def _kv_sources(base: nn.Module, n_layer: int) -> list[int | None]:
    """Return for each layer the earlier layer whose K/V it reads, or None."""
    modes = getattr(base.config, "kv_sharing_modes", None) or [None] * n_layer
    stored: dict[str, int] = {}
    sources: list[int | None] = []
    for layer, mode in enumerate(modes):
        if mode == "store":
            stored[base.config.layer_types[layer]] = layer
        sources.append(stored[base.config.layer_types[layer]] if mode == "reuse" else None)
    return sources


def _refused_for_kv(layer: int, sources: list[int | None]) -> dict[str, str]:
    """Return the kinds that a layer cannot have because layers share K/V, and why."""
    if layer in sources:
        return dict.fromkeys((KV, ATTN, BLOCK), "later layers read its keys and values")
    if sources[layer] is not None:
        return {KV: f"it reads the keys and values of layer {sources[layer]}"}
    return {}


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
