"""What llama.cpp's graph of an architecture computes whatever the file says: the table to extend.

    graph = GRAPHS["qwen3"]
    graph.activations, graph.fixed     # what a configuration must have

Source: src/models/*.cpp of llama.cpp. tests/runtime/evaluation/test_model_types.py compares each of
these architectures with torch, and has the fields that once differed in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The names of one field, in the order in which a configuration is searched.
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation")
SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
RELU2, XIELU = ("relu2",), ("xielu",)
# No limit of the time steps of Mamba 2, as JSON has it and as transformers writes it
NO_LIMIT = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], None)
CONVERTED_CONTEXT = 1 << 20  # that the converter writes for models whose positions turn nothing


@dataclass(frozen=True)
class Graph:
    """What an architecture computes, beside what keys and tensors of a file say.

    activations: names of the activation function of the FFN; None: a formula of its own
    fixed: field of the configuration -> the values that fit, or a function that takes the
        configuration and returns them. The first one is told. A field that is not there fits.
    freqs, lengths: whether the loader takes the tensor of rotary factors for all lengths, and the
        two for short and long texts
    turns: whether positions turn queries and keys at all
    turns_all: whether layers with full attention are turned where others slide
    rounds_yarn: whether the released models have YaRN without `truncate`, which llama.cpp rounds
    stated: field of the configuration -> a function that takes the configuration and returns what
        the converter writes, where that is not the field's value
    """

    activations: tuple[str, ...] | None = SILU
    fixed: Mapping[str, tuple | Callable[[dict], tuple]] = field(default_factory=dict)
    freqs: bool = False
    lengths: bool = False
    turns: bool = True
    turns_all: bool = True
    rounds_yarn: bool = False
    stated: Mapping[str, Callable[[dict], Any]] = field(default_factory=dict)


def _query_scale(large: int) -> Callable[[dict], tuple]:
    """The rule of Gemma's attention scale: the model of `large` layers has one of its own."""

    def expected(config: dict) -> tuple:
        per_head = config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == large:
            return (per_head,)
        return (config.get("head_dim") or per_head,)

    return expected


def _window_of_large(config: dict) -> tuple:
    """EXAONE 4 has windows in its model of 64 layers; others turn all layers."""
    return (config["sliding_window"] if config["num_hidden_layers"] == 64 else None,)


def _every_fourth(config: dict) -> tuple:
    return ([int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])],)


def _key_head(config: dict) -> tuple:
    """V heads of delta nets are as long as K heads."""
    return (config.get("linear_key_head_dim", 128),)


def _gate_first(config: dict) -> tuple:
    """A norm of Falcon-H1 comes behind the gate."""
    return (False,) if config.get("mamba_rms_norm") else (False, True)


def _tied_alike(config: dict) -> tuple:
    """A tied file of Falcon-H1 has the input's multiplier in the one matrix of both embeddings."""
    alike = config.get("embedding_multiplier", 1.0) == config.get("lm_head_multiplier", 1.0)
    return (False, True) if alike else (False,)


def _bias_alike(config: dict) -> tuple:
    """The converter multiplies the biases of Falcon-H1's attention with that of their input."""
    return (False, True) if config.get("attention_in_multiplier", 1.0) == 1.0 else (False,)


def _lfm2_width(config: dict) -> int:
    """The width of LFM2's FFN, which its code computes from the configuration's."""
    width = config["intermediate_size"]
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(config.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
    multiple = config.get("block_multiple_of", 256)
    return -(-width // multiple) * multiple


def _hunyuan_context(config: dict) -> int | None:
    """Files of a stretched HunYuan have a context of 256k tokens."""
    stretched = "alpha" in (config.get("rope_parameters") or {})
    return None if stretched else config["max_position_embeddings"]


def _usual_scale(config: dict) -> tuple:
    """The converter of MPT leaves out the scale of attention scores."""
    found = config["attn_config"]
    usual = found.get("softmax_scale") is None
    return (found if usual else found | {"softmax_scale": None},)


_NO_POSITIONS: dict[str, Any] = {
    "turns": False,
    "stated": {"max_position_embeddings": lambda _config: CONVERTED_CONTEXT},
}
_NEMOTRON_H = {
    "mlp_hidden_act": RELU2,
    "mamba_hidden_act": SILU,
    "time_step_limit": NO_LIMIT,
    "sliding_window": (None,),
}
_CAUSAL = {"use_bidirectional_attention": (False, None, "vision")}
_ALL_FACTORS: dict[str, Any] = {"freqs": True, "lengths": True}

GRAPHS = {
    **dict.fromkeys(
        (
            *("command-r", "ernie4_5", "glm4", "glm4moe", "olmo", "olmo2"),
            *("qwen2", "qwen3", "seed_oss", "stablelm"),
        ),
        Graph(),
    ),
    **dict.fromkeys(("llama", "mistral3", "granite", "granitemoe"), Graph(**_ALL_FACTORS)),
    "hunyuan-dense": Graph(stated={"max_position_embeddings": _hunyuan_context}),
    "qwen2moe": Graph(fixed={"norm_topk_prob": (False,)}),
    "qwen3moe": Graph(fixed={"norm_topk_prob": (True,)}),
    **dict.fromkeys(("qwen35", "qwen35moe"), Graph(fixed={"linear_value_head_dim": _key_head})),
    "qwen3next": Graph(
        fixed={
            "linear_value_head_dim": _key_head,
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
        }
    ),
    "lfm2": Graph(stated={"intermediate_size": _lfm2_width}),
    "lfm2moe": Graph(fixed={"norm_topk_prob": (True,), "routed_scaling_factor": (1.0,)}),
    "granitehybrid": Graph(
        fixed={"position_embedding_type": (None, "nope"), "time_step_limit": NO_LIMIT},
        **_NO_POSITIONS,
    ),
    "falcon-h1": Graph(
        fixed={
            "time_step_limit": NO_LIMIT,
            "mamba_norm_before_gate": _gate_first,
            "tie_word_embeddings": _tied_alike,
            "attention_bias": _bias_alike,
        }
    ),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), Graph(None, _NEMOTRON_H, **_NO_POSITIONS)),
    "gemma": Graph(GELU, _CAUSAL),
    "gemma2": Graph(GELU, _CAUSAL | {"query_pre_attn_scalar": _query_scale(46)}),
    "gemma3": Graph(GELU, _CAUSAL | {"query_pre_attn_scalar": _query_scale(62)}),
    "gemma4": Graph(GELU, _CAUSAL, freqs=True),
    "gpt-oss": Graph(None, {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)}, rounds_yarn=True),
    "phi2": Graph(GELU),
    "phi3": Graph(lengths=True),
    "smollm3": Graph(fixed={"no_rope_layers": _every_fourth}),
    "olmoe": Graph(fixed={"clip_qkv": (None,), "norm_topk_prob": (False,)}),
    "arcee": Graph(RELU2, freqs=True),
    "nemotron": Graph(RELU2),
    "apertus": Graph(XIELU, **_ALL_FACTORS),
    "starcoder2": Graph(GELU),
    "falcon": Graph(GELU),
    "bloom": Graph(None, turns=False),
    "mpt": Graph(None, {"attn_config": _usual_scale}, turns=False),
    "cohere2": Graph(turns_all=False),
    "exaone4": Graph(fixed={"sliding_window": _window_of_large}, freqs=True, turns_all=False),
}


def fits(found: Any, allowed: tuple) -> bool:
    """Whether the value of a field is one of those allowed, up to the precision of a file."""
    return any(
        math.isclose(found, value, rel_tol=1e-5)
        if isinstance(found, float) and isinstance(value, (int, float))
        else found == value
        for value in allowed
    )
