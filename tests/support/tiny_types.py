"""Tiny random models of types whose attention is not Llama's: windows, sinks, softcaps, shared K/V.

    base = tiny_types.base("gemma2")
    units = tiny_types.UNITS["gemma2"]       # what each kind can route, a few layers each

Windows and chunks are shorter than the tests' sequences, and scores are large enough for softcaps
and sinks to matter.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 12
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
EVERY_OTHER = {
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL] * 3,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# model type -> fields of its configuration beside those of `base`
FIELDS = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {**EVERY_OTHER, "head_dim": 16, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**EVERY_OTHER, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma4_text": {
        **EVERY_OTHER,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "rms_norm_eps": 1e-2,  # its many norms amplify the noise of small values
    },
    "gemma4_text experts": {
        **EVERY_OTHER,
        "head_dim": 16,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "attention_k_eq_v": True,
    },
    "gpt_oss": {**EVERY_OTHER, **EXPERTS, "head_dim": 16},
    "olmo3": EVERY_OTHER,
    "exaone4": EVERY_OTHER,
    "cohere2": EVERY_OTHER,
    "llama4_text": {
        **EXPERTS,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "layer_types": [CHUNKED, FULL] * 3,
        "no_rope_layers": [1, 0] * 3,
        "floor_scale": 8,
    },
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mixtral": EXPERTS,
}
_ALL = {"kv": [1, 3], "attn": [3, 4], "block": [2, 5], "ffn": [1, 3, 4]}
# model type -> units that its layers can have
UNITS = {
    **dict.fromkeys(FIELDS, _ALL),
    "gemma4_text": {"kv": [0, 1], "attn": [0], "block": [1]},
    "gemma4_text experts": {"kv": [1, 3], "attn": [3, 4], "block": [2, 5]},
    "llama4_text": {"kv": [1, 3], "ffn": [1, 2, 4]},
}


def base(name: str, seed: int = 0, **kwargs):
    """Return a random model. name: of FIELDS; kwargs: more fields of its configuration."""
    torch.manual_seed(seed)
    fields = {
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 300,
        "max_position_embeddings": 2048,
        "initializer_range": 0.12,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **FIELDS[name],
        **kwargs,
    }
    config = AutoConfig.for_model(name.split()[0], **fields)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".sinks"):
            parameter.data.normal_(1.0, 1.0)
        if name.startswith("gemma4") and parameter_name.endswith(".q_norm.weight"):
            parameter.data.fill_(0.25)  # large scores amplify noise, and have no other scale
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(".layer_scalar"):
            buffer.fill_(0.8)
    return model
