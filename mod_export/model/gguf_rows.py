"""What a row of the table of GGUF architectures holds, and what several rows share.

gguf_architectures.py and gguf_hybrids.py have the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RMS_NORM = "attention.layer_norm_rms_epsilon"
LAYER_NORM = "attention.layer_norm_epsilon"
FULL, SLIDING = "full_attention", "sliding_attention"
SIGMOID = 2  # llama.cpp's number for gates of experts


@dataclass(frozen=True)
class Layout:
    """A parameter of transformers that the file holds otherwise.

    tensors: the file's, without blk.N.
    join: gives the parameter's values from theirs and from the configuration
    whole: the one tensor that some files have instead, with transformers' values
    """

    tensors: tuple[str, ...]
    join: Callable[[list[np.ndarray], Any], np.ndarray] = lambda arrays, _config: arrays[0]
    whole: str = ""


@dataclass(frozen=True)
class Architecture:
    """How the configuration of transformers follows from a file.

    model_type: transformers' name
    norm: key of the norms' epsilon, and its field; a field of None: both sides have the same
    fields: more keys -> fields; a key that is missing leaves the field out
    fixed: fields whose value llama.cpp's graph fixes, or takes where the key is missing
    present: fields that are true where the file has a tensor of this pattern
    sliding: of so many layers each last one has full attention, where the file does not say; 0 for
        architectures that llama.cpp runs without sliding attention
    window: the tokens that sliding layers attend to where the file does not say
    sliding_rope: the rotary embedding of sliding layers: "same" as that of the others, "own" key of
        the base and no scaling, or "plain" for the base of the others and no scaling
    prepare: replaces keys before any is read
    finish: changes the fields once all others are known, and may take keys
    swap_halves: q and k have the order of interleaved pairs in the file
    norm_offset: what transformers adds to the weight of a norm, and the file has added already
    rope_factors: the tensors of ROPE_TENSORS that llama.cpp reads
    no_effect: keys without effect, beside those of every architecture
    layouts: end of a parameter's name -> where its values are; norms among them get no offset
    variants: key of the file -> row for files in which it is not 0
    """

    model_type: str
    norm: tuple[str, str | None] = (RMS_NORM, "rms_norm_eps")
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    sliding: int = 0
    window: int = 0
    sliding_rope: str = "same"
    prepare: Callable[[Any], None] | None = None
    finish: Callable[[dict[str, Any], Any], None] | None = None
    swap_halves: bool = False
    norm_offset: float = 0.0
    rope_factors: tuple[str, ...] = ()
    no_effect: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    variants: Mapping[str, Architecture] = field(default_factory=dict)


def joined(arrays: list[np.ndarray], _config) -> np.ndarray:
    return np.concatenate(arrays, axis=1)


def granite_scale(fields: dict[str, Any]) -> None:
    """A scale of attention scores that is missing, or 0, is the usual one."""
    usual = 1.0 / math.sqrt(fields["head_dim"])
    fields["attention_multiplier"] = fields.get("attention_multiplier") or usual


def sigmoid_gates(fields: dict[str, Any], keys) -> None:
    """Experts have sigmoid gates, and a scale that is missing, or 0, is none."""
    keys.require("expert_gating_func", SIGMOID)
    fields["routed_scaling_factor"] = fields.get("routed_scaling_factor") or 1.0


ATTENTION_BIAS = {"attention_bias": r"blk\.\d+\.attn_(q|k|v|output)\.bias"}
MLP_BIAS = {"mlp_bias": r"blk\.\d+\.ffn_(gate|up|down)\.bias"}
ALL_FACTORS = ("freqs", "short", "long")
MIXTURE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
ROUTED_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
FEW_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
# transformers keeps the experts of a layer in one matrix.
EXPERTS = {
    "mlp.experts.gate_up_proj": Layout(
        ("ffn_gate_exps.weight", "ffn_up_exps.weight"), joined, "ffn_gate_up_exps.weight"
    ),
    "mlp.experts.down_proj": Layout(("ffn_down_exps.weight",)),
}
GRANITE_EXPERTS = {
    "block_sparse_moe.experts.gate_up_proj": EXPERTS["mlp.experts.gate_up_proj"],
    "block_sparse_moe.experts.down_proj": EXPERTS["mlp.experts.down_proj"],
    "block_sparse_moe.router.weight": Layout(("ffn_gate_inp.weight",)),
}
GRANITE_SCALES = {
    "logit_scale": "logits_scaling",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}
