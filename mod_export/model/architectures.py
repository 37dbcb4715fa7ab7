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
from mod_export.units import ATTN, BLOCK, FFN, KV, UNIT_KINDS, Unit, format_layers, routed_layers


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
    state: the module with a recurrent state, in the layers that have one
    single: whether a layer has an attention, a recurrent state or an FFN, and nothing beside it
    returns_tuple: whether the layer returns a tuple, whose first entry is its output
    calls_sdpa: whether the attention calls torch's SDPA itself, not through transformers' interface
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
    state: str | None = None
    single: bool = False
    returns_tuple: bool = False
    calls_sdpa: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


_OUTPUT_NORMS = {"attn_out": "post_attention_layernorm", "ffn_out": "post_feedforward_layernorm"}
_GLM4 = {"attn_out": "post_self_attn_layernorm", "ffn_out": "post_mlp_layernorm"}
_EXPERTS = {"ffn": "block_sparse_moe", "ffn_out": "block_sparse_moe"}
_MULTIPLIER = {"residual_scale": "residual_multiplier"}
_FEED_FORWARD = {"ffn": "feed_forward", "ffn_out": "feed_forward"}

# model_type -> names, for architectures whose layers do not have Llama's names or order
ARCHITECTURES = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text"), Names(ffn_entry="pre_feedforward_layernorm", **_OUTPUT_NORMS)
    ),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        Names(
            ffn_entry="pre_feedforward_layernorm",
            # llama.cpp's graph ends the FFN where the layer ends.
            refused={FFN: "per-layer embeddings and the layer's scale come after the FFN"},
            **_OUTPUT_NORMS,
        ),
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
        **_FEED_FORWARD,
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
    "minicpm3": Names(residual_scale="residual_scale"),
    "granitemoe": Names(**_EXPERTS, **_MULTIPLIER),
    **dict.fromkeys(
        ("granitemoeshared", "granitemoe_swa"),
        Names(ffn_beside="shared_mlp", **_EXPERTS, **_MULTIPLIER),
    ),
    "hyperclovax": Names(attn_out="post_norm1", ffn_out="post_norm2", **_MULTIPLIER),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "phi"), Names(ffn_entry=None)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), Names(attn="attn", attn_out="attn", ffn_entry="ln_2")),
    "falcon": Names(
        attn="self_attention",
        attn_out="self_attention",
        parallel="parallel_attn",
        returns_tuple=True,
        calls_sdpa=True,
    ),
    "bloom": Names(attn="self_attention", attn_out="self_attention"),
    # llama.cpp's converter writes this epsilon whatever the configuration says.
    "mpt": Names(
        attn="attn", attn_out="attn", ffn="ffn", ffn_out="ffn", ffn_entry="norm_2", norm_eps=1e-5
    ),
    "gpt_neox": Names(
        attn="attention",
        attn_out="post_attention_dropout",
        ffn_out="post_mlp_dropout",
        parallel="use_parallel_residual",
    ),
    "stablelm": Names(parallel="use_parallel_residual"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), Names(state="linear_attn")),
    **dict.fromkeys(
        ("lfm2", "lfm2_moe"), Names(ffn_entry="ffn_norm", state="conv", **_FEED_FORWARD)
    ),
    "granitemoehybrid": Names(ffn_beside="shared_mlp", state="mamba", **_EXPERTS, **_MULTIPLIER),
    "falcon_h1": Names(
        ffn_entry="pre_ff_layernorm",
        state="mamba",
        returns_tuple=True,
        refused=dict.fromkeys((ATTN, BLOCK), "it has a recurrent state beside its attention"),
        **_FEED_FORWARD,
    ),
    "nemotron_h": Names(
        attn="mixer",
        attn_out="mixer",
        ffn="mixer",
        ffn_out="mixer",
        ffn_entry="norm",
        state="mixer",
        single=True,
    ),
}

ALIBI = ("bloom", "mpt")  # model types that get forwards of our own (alibi.py)
# model_type -> why its layers cannot have units, for those whose modules have the usual names
REFUSED = {
    **dict.fromkeys(
        ("deepseek_v4", "hy_v4"), "its residual stream consists of several streams with weights"
    ),
    **dict.fromkeys(
        ("gemma3n_text", "inkling2_text"), "its layers read more than one residual stream"
    ),
    **dict.fromkeys(
        ("codegen", "gpt_neo", "gpt_neox_japanese", "gptj"),
        "its attention cannot be replaced, because it does not use transformers' interface",
    ),
    "bamba": "the GGUF file that llama.cpp's converter writes of it computes something else",
    "jamba": "in transformers its recurrent state takes only one token at a time",
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
# Fields with the number of K/V heads, of all layers or of some.
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
# Model types whose attention reads the values of two heads at a time.
HEADS_TOGETHER = ("diffllama",)
FULL_ATTENTION = "full_attention"
# Types of layers whose queries see the last tokens only -> what the layer has, and the field of the
# configuration that says how many tokens these are.
WINDOWS = {
    "sliding_attention": ("sliding attention", "sliding_window"),
    "chunked_attention": ("attention within chunks", "attention_chunk_size"),
}
# Types of layers with a recurrent state: without attention, and beside it.
STATES, STATES_BESIDE = ("linear_attention", "conv"), ("hybrid",)
FFNS = ("mlp", "moe")  # types of layers that have an FFN and nothing else
_OF_FFN = ("ffn", "ffn_out", "ffn_entry")
# Classes of FFNs that return (output, scores of the experts); others return the output alone.
FFNS_WITH_SCORES = ("GptOssMLP", "Llama4TextMoe")


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer, by the roles that `Names` describes.

    attn: the attention; in a layer without one the module with the recurrent state, if any
    attends: whether the layer has an attention. recurrent: whether it has a recurrent state
    window: what the layer has where its queries see the last tokens only (WINDOWS), or None
    kv_source: the earlier layer whose K/V this layer reads; None where it has its own
    refused: kinds of units that this layer cannot have, and why
    """

    layer: nn.Module
    attn: nn.Module | None
    ffn: nn.Module | None
    attn_out: nn.Module | None
    ffn_out: nn.Module | None
    ffn_entry: nn.Module | None
    ffn_beside: nn.Module | None = None
    residual_scale: float = 1.0
    attends: bool = True
    recurrent: bool = False
    returns_tuple: bool = False
    window: str | None = None
    kv_source: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def ffn_returns_scores(self) -> bool:
        """Whether the FFN returns the scores of its experts beside its output."""
        return type(self.ffn).__name__ in FFNS_WITH_SCORES

    def lacks(self, kind: str) -> str | None:
        """Return why a conversion gives this layer no unit of a kind; None where it may."""
        if self.window is not None and kind in (KV, ATTN, BLOCK):
            return f"it has {self.window}, which forgets by itself"
        if self.ffn is not None and self.ffn_entry is None and kind in (ATTN, FFN):
            return "its attention and FFN run side by side"
        return self.cannot_have(kind)

    def cannot_have(self, kind: str) -> str | None:
        """Return why no model has a unit of a kind here; None where it can."""
        if kind == FFN and self.ffn is None:
            return "it has no FFN"
        if kind != FFN and not self.attends:
            return "it has a recurrent state" if self.recurrent else "it has no attention"
        if kind == ATTN and self.ffn is None:
            return "its attention is all that it has, which a block unit skips"
        return self.refused.get(kind)


def context_length(base: nn.Module) -> int | None:
    """Return the tokens of the longest sequence that the model was made for.

    None: its configuration does not say.
    """
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((n for name in names if (n := getattr(base.config, name, None))), None)


def layer_windows(base: nn.Module) -> dict[int, int]:
    """Return for each layer with K/V of its own the tokens that it attends to, 0 for all.

    The layers that take K and V of another layer are left out (Gemma 4), and those that have no
    attention.
    """
    types = _layer_types(base, base.config.num_hidden_layers)
    sizes = {name: getattr(base.config, size, None) or 0 for name, (_, size) in WINDOWS.items()}
    sources = _kv_sources(base, len(types))
    return {
        layer: sizes.get(name, 0)
        for layer, name in enumerate(types)
        if sources[layer] is None and name not in STATES + FFNS
    }


def decoder_layers(base: nn.Module) -> list[LayerParts]:
    """Return the parts of every decoder layer, first layer first.

    Raises UserError if the architecture is not supported.
    """
    if reason := REFUSED.get(base.config.model_type):
        raise unsupported(base, reason)
    if getattr(base.config, "alibi", False):
        raise unsupported(base, "llama.cpp has no Falcon with ALiBi")
    if base.config.model_type in ALIBI:
        from mod_export.model import alibi

        if reason := alibi.lacking(base.config):
            raise unsupported(base, reason)
        alibi.adapt(base)
    names, layers = names_of(base), _layer_list(base)
    types = _layer_types(base, len(layers))
    _check_types(base, names, types)
    parts = [
        _find_parts(base, layer, names, kind) for layer, kind in zip(layers, types, strict=True)
    ]
    sources = _kv_sources(base, len(parts))
    return [
        replace(
            part,
            window=WINDOWS[types[layer]][0] if types[layer] in WINDOWS else None,
            kv_source=sources[layer],
            refused={**names.refused, **_refused_for_kv(layer, sources)},
        )
        for layer, part in enumerate(parts)
    ]


def unit_layers(base: nn.Module, kind: str, chosen: list[int] | None) -> list[int]:
    """Return the layers to convert with units of a kind. `chosen` is what parse_layers returned.

    By default they are all that can have the kind and are not among the model's first; units of
    `kv`, `attn` and `block` go to layers whose attention sees the whole context. Raises UserError
    for a chosen layer that cannot have the kind, and where no layer can.
    """
    parts = decoder_layers(base)
    reasons = {layer: reason for layer, part in enumerate(parts) if (reason := part.lacks(kind))}
    wanted = routed_layers(chosen, len(parts), kind)
    layers = [layer for layer in wanted if layer not in reasons]
    refused = [layer for layer in wanted if layer in reasons]
    if refused and (chosen is not None or not layers):
        possible = format_layers(set(range(len(parts))) - reasons.keys())
        others = [name for name in UNIT_KINDS if not all(part.lacks(name) for part in parts)]
        # Where no layer can, one that attends says more than one with a recurrent state.
        told = refused if possible else sorted(refused, key=lambda layer: not parts[layer].attends)
        raise UserError(
            f"layer {told[0]} of {base.config.model_type} takes no {kind} unit: {reasons[told[0]]}",
            f"layers that do: {possible}" if possible else f"use {' or '.join(others)}",
        )
    return layers


def check_units(base: nn.Module, units: Iterable[Unit]) -> None:
    """Raise UserError for a unit that its layer cannot have, with the reason."""
    layers, units = decoder_layers(base), set(units)
    for unit in units:
        if reason := layers[unit.layer].cannot_have(unit.kind):
            raise UserError(
                f"layer {unit.layer} of {base.config.model_type} cannot have a {unit.kind} unit: "
                f"{reason}",
                "route other layers or other kinds",
            )
        if unit.head is None:
            continue
        if unit.kind != KV or not 0 <= unit.head < kv_heads(base):
            reason = (
                "only kv units can" if unit.kind != KV else f"it has {kv_heads(base)} K/V heads"
            )
            raise UserError(
                f"{unit.place} of {base.config.model_type} cannot decide for a unit {unit.kind}: "
                f"{reason}",
                "route the K/V heads that the model has, or whole layers",
            )
        if Unit(unit.layer, unit.kind) in units:
            raise UserError(
                f"layer {unit.layer} has a kv unit, and others of its heads",
                "let the layer decide, or its heads",
            )


def check_heads(base: nn.Module, heads: int) -> None:
    """Raise UserError where kv units cannot be of so many heads in each layer."""
    possible, model_type = kv_heads(base), base.config.model_type
    if heads not in (1, possible):
        raise UserError(
            f"the kv units are of {heads} heads, {model_type} can decide for {possible}",
            "use a model with as many K/V heads, or one decision per layer",
        )


def kv_heads(base: nn.Module) -> int:
    """Return the K/V heads of each layer that can decide apart; the layer decides where it is 1.

    It is 1 where the heads share what is stored (MQA, MLA) or are read together, and where layers
    have different numbers of heads. The query heads of a group share one K/V head, in the order of
    the heads.
    """
    config = base.config
    if getattr(config, "kv_lora_rank", None) is not None or config.model_type in HEADS_TOGETHER:
        return 1
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    if set(KV_HEADS) & set(getattr(config, "per_layer_attributes", None) or ()):
        return 1
    found = [getattr(config, name, None) for name in KV_HEADS]
    found.append(getattr(getattr(config, "attn_config", None), "kv_n_heads", None))
    of_queries = config.num_attention_heads
    numbers = {n for n in found if n is not None} or {of_queries}
    if len(numbers) > 1 or not all(isinstance(n, int) for n in (of_queries, *numbers)):
        return 1
    n = numbers.pop()
    return n if of_queries % n == 0 else 1


def query_group(base: nn.Module) -> int:
    """Return the query heads that share a K/V head which can decide apart."""
    heads = kv_heads(base)
    return base.config.num_attention_heads // heads if heads > 1 else 1


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
    if names.ffn_beside and not getattr(base.config, "num_local_experts", 1):
        return replace(names, ffn=names.ffn_beside, ffn_out=names.ffn_beside, ffn_beside=None)
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
    raise unsupported(base, "its configuration names no norm epsilon")


def _layer_list(base: nn.Module) -> nn.ModuleList:
    """Return the first ModuleList with as many entries as the model has layers."""
    n_layer = getattr(base.config, "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layer:
            return module
    raise unsupported(base, "its decoder layers were not found")


def _check_types(base: nn.Module, names: Names, types: list[str]) -> None:
    """Raise UserError for a layer of a type that nothing is known of."""
    known = {FULL_ATTENTION, *WINDOWS}
    if names.state is not None:
        known |= {*STATES, *STATES_BESIDE}
    if names.single:
        known |= set(FFNS)
    for layer, name in enumerate(types):
        if name not in known:
            raise unsupported(base, f"its layer {layer} is of the type {name}")


def _layer_types(base: nn.Module, n_layer: int) -> list[str]:
    return getattr(base.config, "layer_types", None) or [FULL_ATTENTION] * n_layer


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
        reason = f"it reads the keys and values of layer {sources[layer]}"
        return dict.fromkeys((KV, ATTN, BLOCK), reason)
    return {}


def _find_parts(base: nn.Module, layer: nn.Module, names: Names, kind: str) -> LayerParts:
    """Look each role up by its name; check that the layer takes what the wrapper has to pass.

    kind: the type of the layer.
    """
    class_name = type(layer).__name__
    parameters = inspect.signature(type(layer).forward).parameters
    for needed in ("hidden_states", "attention_mask"):
        if needed not in parameters:
            raise unsupported(base, f"{class_name}.forward takes no {needed}")
    if not {"past_key_values", "layer_past"} & set(parameters):
        raise unsupported(base, f"{class_name}.forward takes no cache")
    found = {}
    for role, name in _roles(names, kind).items():
        found[role] = _module(layer, name) if name else None
        if name and found[role] is None:
            raise unsupported(base, f"its {class_name} has no {name}")
    if names.ffn_beside:
        found["ffn_beside"] = _module(layer, names.ffn_beside)
    scale = float(getattr(layer, names.residual_scale)) if names.residual_scale else 1.0
    return LayerParts(
        layer=layer,
        residual_scale=scale,
        attends=kind not in STATES + FFNS,
        recurrent=kind in STATES + STATES_BESIDE,
        returns_tuple=names.returns_tuple,
        **found,
    )


def _roles(names: Names, kind: str) -> dict[str, str | None]:
    """Return the name of each role's module in a layer of a type; None where it has none."""
    roles = {role: getattr(names, role) for role in ("attn", "attn_out", *_OF_FFN)}
    if kind in STATES:
        roles |= dict.fromkeys(("attn", "attn_out"), names.state)
    if names.single:
        roles |= dict.fromkeys(("attn", "attn_out") if kind in FFNS else _OF_FFN)
    return roles


def _module(layer: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name with dots, or None."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def unsupported(base: nn.Module, reason: str) -> UserError:
    """Return the error for a model that cannot have units."""
    model_type = getattr(base.config, "model_type", "?")
    return UserError(
        f"unsupported architecture {model_type}: {reason}",
        "choose another model; docs/how-to/add-an-architecture.md says what it would take",
    )
