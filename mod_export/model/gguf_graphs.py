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


@dataclass(frozen=True)
class Graph:
    """What an architecture computes, beside what keys and tensors of a file say.

    activations: names of the activation function of the FFN; None: a formula of its own
    fixed: field of the configuration -> the values that fit, or a function that takes the
        configuration and returns them. The first one is told. A field that is not there fits.
    freqs, lengths: whether the loader takes the tensor of rotary factors for all lengths, and the
        two for short and long texts
    turns_all: whether layers with full attention are turned where others slide
    rounds_yarn: whether the released models have YaRN without `truncate`, which llama.cpp rounds
    """

    activations: tuple[str, ...] | None = SILU
    fixed: Mapping[str, tuple | Callable[[dict], tuple]] = field(default_factory=dict)
    freqs: bool = False
    lengths: bool = False
    turns_all: bool = True
    rounds_yarn: bool = False


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


_CAUSAL = {"use_bidirectional_attention": (False, None, "vision")}
_ALL_FACTORS: dict[str, Any] = {"freqs": True, "lengths": True}

GRAPHS = {
    **dict.fromkeys(
        (
            *("command-r", "ernie4_5", "glm4", "glm4moe", "hunyuan-dense", "olmo", "olmo2"),
            *("qwen2", "qwen3", "seed_oss", "stablelm"),
        ),
        Graph(),
    ),
    **dict.fromkeys(("llama", "mistral3", "granite", "granitemoe"), Graph(**_ALL_FACTORS)),
    "qwen2moe": Graph(fixed={"norm_topk_prob": (False,)}),
    "qwen3moe": Graph(fixed={"norm_topk_prob": (True,)}),
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
