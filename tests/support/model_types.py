"""Tiny random models of the types that people run.

MODEL_TYPES has for each name a model type of transformers and the fields of its configuration,
beside those of `gguf_models.SMALL`. Every window and scale counts for the logits of 200 tokens.

    units(base, "block+kv")     # {"block": [2, 3], "kv": [1]}, as far as the type has the kinds
"""

from mod_export.model import architectures
from mod_export.units import UNIT_KINDS

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
N_LAYER = 4


def _sliding(*full: int, n_layer: int = N_LAYER) -> dict:
    """The fields of a model whose other layers slide."""
    kinds = [FULL if layer in full else SLIDING for layer in range(n_layer)]
    return {"sliding_window": 32, "num_hidden_layers": n_layer, "layer_types": kinds}


def _rope(kind: str, **more) -> dict:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
_FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
_GEMMA4 = {"head_dim": 32, "global_head_dim": 64, "final_logit_softcapping": 5.0}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.5,
}
_NO_WINDOW = {"sliding_window": None}
_DEEPSEEK = {
    "rope_parameters": _YARN | {"mscale": 0.8, "mscale_all_dim": 0.8},
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

# Hybrids: three layers attend, and the last one has a recurrent state.
_MIXED = [LINEAR, FULL, LINEAR, FULL, FULL, LINEAR]
_DELTA_NET = {
    "num_hidden_layers": 6,
    "layer_types": _MIXED,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
_SHORT_CONV = {
    "num_hidden_layers": 6,
    "layer_types": ["conv" if kind == LINEAR else kind for kind in _MIXED],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
_GRANITE_H = _GRANITE | _MAMBA | {"num_hidden_layers": 6, "layer_types": _MIXED}
_NEMOTRON_H = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
}


def _layers(*kinds: str) -> dict:
    """The layers of a Nemotron-H, each of which has one of three things."""
    return {"layers_block_type": list(kinds), "num_hidden_layers": len(kinds)}


HYBRIDS: dict[str, tuple[str, dict]] = {
    "qwen3_5": ("qwen3_5_text", _DELTA_NET),
    "qwen3_5_moe": ("qwen3_5_moe_text", _DELTA_NET | _MIXTURE | _SHARED_EXPERT),
    "qwen3_next": ("qwen3_next", _DELTA_NET | _MIXTURE | _SHARED_EXPERT),
    "lfm2": ("lfm2", _SHORT_CONV | {"block_multiple_of": 16}),
    "lfm2_moe": ("lfm2_moe", _SHORT_CONV | _MIXTURE | {"num_dense_layers": 1}),
    "granitemoehybrid": (
        "granitemoehybrid",
        _GRANITE_H | _FEW_EXPERTS | {"shared_intermediate_size": 64},
    ),
    "granitemoehybrid_dense": (
        "granitemoehybrid",
        _GRANITE_H
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96},
    ),
    "falcon_h1": (
        "falcon_h1",
        _MAMBA
        | {"num_hidden_layers": N_LAYER, "mamba_d_ssm": 128, "head_dim": 16}
        | {"attention_in_multiplier": 1.5, "attention_out_multiplier": 0.7}
        | {"ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8, "key_multiplier": 1.3}
        | {"ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "mlp_multipliers": [0.9, 1.1]}
        | {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.6},
    ),
    "nemotron_h": (
        "nemotron_h",
        _NEMOTRON_H | _layers(LINEAR, FULL, LINEAR, "mlp", FULL, FULL, LINEAR, "mlp"),
    ),
    "nemotron_h_moe": (
        "nemotron_h",
        _NEMOTRON_H
        | _layers(LINEAR, FULL, LINEAR, "moe", FULL, FULL, LINEAR, "moe")
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"moe_shared_expert_intermediate_size": 48, "num_nextn_predict_layers": 1},
    ),
}

_THREE_HEADS = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
_ALIBI = _THREE_HEADS | {"intermediate_size": 384}  # four times the width, as their code has it
_BY_TYPE: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen2_moe": _MIXTURE | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": _MIXTURE | {"head_dim": 32, "norm_topk_prob": True},
    "mistral": _NO_WINDOW,
    "ministral3": {
        "rope_parameters": _YARN
        | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    },
    "mixtral": _FEW_EXPERTS | _NO_WINDOW,
    "gemma": {"head_dim": 32},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA
    | {
        "rope_parameters": {
            FULL: _rope("linear", factor=4.0),
            SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
        }
    }
    | _sliding(5, n_layer=6),
    "gemma4_text": _GEMMA4
    | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 261}
    | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    | _sliding(1, 3, 5, n_layer=6),
    "gpt_oss": _FEW_EXPERTS
    | {"head_dim": 32, "rope_parameters": _YARN | {"truncate": True}}
    | _sliding(1, 3),
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 256},
    "phi3": _NO_WINDOW,
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _sliding(3),
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "arcee": {},
    "granite": _GRANITE,
    "granitemoe": _GRANITE | _FEW_EXPERTS,
    "glm4": {"head_dim": 32},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "head_dim": 32,
    },
    "deepseek_v2": _DEEPSEEK | {"topk_method": "greedy"},
    # Released configurations have scoring_func, which transformers does not read.
    "deepseek_v3": _DEEPSEEK | {"scoring_func": "sigmoid", "n_routed_experts": 8, "n_group": 2},
    "glm4_moe_lite": _DEEPSEEK | {"scoring_func": "sigmoid"},
    "starcoder2": _NO_WINDOW,
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "rotary_pct": 1.0} | _sliding(3),
    "exaone4": _NO_WINDOW | {"layer_types": [FULL] * N_LAYER},
    "seed_oss": {"head_dim": 32},
    "ernie4_5": {"head_dim": 32},
    "hunyuan_v1_dense": {"head_dim": 32},
    "nemotron": {"head_dim": 16},
    "stablelm": {},
    "falcon": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "intermediate_size": 256,  # as its FFN has it: four times the width
        "num_ln_in_parallel_attn": 2,
    },
    "apertus": {},
    # Three heads, so that one has a slope between those of a power of two.
    "bloom": _ALIBI | {"seq_length": 2048},
    "mpt": _ALIBI | {"attn_config": {"clip_qkv": 2.0, "alibi_bias_max": 6}},
}
MODEL_TYPES = {
    **HYBRIDS,
    **{name: (name, {"num_hidden_layers": N_LAYER} | more) for name, more in _BY_TYPE.items()},
    "gemma4_moe": (
        "gemma4_text",
        _GEMMA4
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        | {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"enable_moe_block": True, "top_k_experts": 2}
        | {"num_experts": 4, "moe_intermediate_size": 32}
        | _sliding(1, 3),
    ),
    # llama.cpp knows the model with sliding layers by its number of layers.
    "exaone4_sliding": ("exaone4", _sliding(*range(3, 64, 4), n_layer=64)),
}


# A layer with `block` has neither `attn` nor `ffn`, so that two models have all kinds.
ROUTINGS = ("kv+attn+ffn", "block+kv")


def units(base, routing: str) -> dict[str, list[int]]:
    """Return the layers to route of each kind: the last ones that can have it."""
    parts = architectures.decoder_layers(base)
    able = {
        kind: [layer for layer, part in enumerate(parts) if not part.lacks(kind)]
        for kind in UNIT_KINDS
    }
    able["kv"] = able["kv"][-3:-1] or able["kv"]  # beside `block` and below it
    return {kind: able[kind][-2:] for kind in routing.split("+") if able[kind]}
