"""How a configuration of transformers follows from a GGUF file, for each architecture: the table.

What a key means is what llama.cpp makes of it. Sources: src/models/*.cpp and conversion/*.py of
llama.cpp, and the models of transformers.

    row = row_of(GGUFFile.open("model.gguf"))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import architectures
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.rotary import FREQS
from mod_export.model.gguf_hybrids import HYBRIDS
from mod_export.model.gguf_rows import (
    ALL_FACTORS,
    ALL_SPARSE,
    ATTENTION_BIAS,
    EXPERTS,
    FEW_EXPERTS,
    FULL,
    GRANITE_EXPERTS,
    GRANITE_SCALES,
    LAYER_NORM,
    MIXTURE,
    MLP_BIAS,
    ROUTED_EXPERTS,
    Architecture,
    Layout,
    granite_scale,
    sigmoid_gates,
)
from mod_export.model.gguf_tokenizer import USE_DIRECTORY
from mod_export.units import UNIT_KINDS


def row_of(file: GGUFFile) -> Architecture:
    """Return the row of a file. Raises UserError where the table has none, with the reason."""
    row = ARCHITECTURES.get(file.architecture)
    if row is None:
        if not architectures.kinds(file.architecture):
            architectures.check(file.architecture, UNIT_KINDS)
        raise UserError(
            f"{file.path}: GGUF files of the architecture {file.architecture} cannot be read",
            f"{USE_DIRECTORY}; files of {', '.join(ARCHITECTURES)} can be read",
        )
    for key, variant in row.variants.items():
        if file.get(f"{file.architecture}.{key}", 0):
            return variant
    return row


def _gemma(large: int) -> Callable[[dict[str, Any], Any], None]:
    """Set the scale of attention scores, which llama.cpp knows by the number of layers.

    A bound of 0 on the logits means none.
    """

    def finish(fields: dict[str, Any], _keys) -> None:
        per_head = fields["hidden_size"] // fields["num_attention_heads"]
        is_large = fields["num_hidden_layers"] == large
        fields["query_pre_attn_scalar"] = per_head if is_large else fields["head_dim"]
        fields["final_logit_softcapping"] = fields.get("final_logit_softcapping") or None

    return finish


def _stablelm(fields: dict[str, Any], _keys) -> None:
    fields["use_parallel_residual"] = not fields.pop("ffn_norm")


def _granite(fields: dict[str, Any], keys) -> None:
    keys.require("rope.scaling.finetuned", True)
    granite_scale(fields)


def _ministral3(fields: dict[str, Any], keys) -> None:
    """Set the scale of queries in long texts, beside YaRN's parameters."""
    rope = fields["rope_parameters"]
    rope["llama_4_scaling_beta"] = float(keys.take("attention.temperature_scale"))
    rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    _mistral3(fields, keys)


def _mistral3(fields: dict[str, Any], keys) -> None:
    """Set YaRN's parameters that llama.cpp reads for this architecture alone."""
    rope = fields["rope_parameters"]
    share = float(keys.take("rope.scaling.yarn_log_multiplier", 0.0))
    fast = float(keys.take("rope.scaling.yarn_beta_fast", 32.0))
    slow = float(keys.take("rope.scaling.yarn_beta_slow", 1.0))
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": fast, "beta_slow": slow}
        if share:
            scale = math.log(max(rope["factor"], 1.0))
            usual = 0.1 * scale + 1.0
            own = rope.get("attention_factor", usual) / usual
            rope["attention_factor"] = own * usual / (0.1 * share * scale + 1.0)


def _exaone4(fields: dict[str, Any], _keys) -> None:
    """llama.cpp has sliding layers in the model of 64 layers alone; full ones have no positions."""
    if fields["num_hidden_layers"] != 64:
        fields |= {
            "sliding_window": None,
            "layer_types": [FULL] * fields["num_hidden_layers"],
        }


def _prepare_gemma4(keys) -> None:
    """Put the sizes of sliding layers where those of all layers are, as transformers has them."""
    sliding = np.asarray(keys.rest["attention.sliding_window_pattern"], bool)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        keys.rest[f"{name}_full"] = keys.rest.pop(name)
        keys.rest[name] = keys.rest.pop(f"{name}_swa")
    heads = np.broadcast_to(keys.rest["attention.head_count_kv"], sliding.shape)
    keys.rest["attention.head_count_kv"] = heads[sliding]
    keys.rest["attention.head_count_kv_full"] = heads[~sliding]
    widths = np.broadcast_to(keys.rest["feed_forward_length"], sliding.shape)
    first_shared = len(sliding) - keys.rest.get("attention.shared_kv_layers", 0)
    keys.rest["feed_forward_length"] = widths[:first_shared]
    keys.rest["feed_forward_length_shared"] = widths[first_shared:]


def _gemma4(fields: dict[str, Any], keys) -> None:
    """Sizes of full layers, and their rotary embedding, which leaves a part of each head alone."""
    fields["global_head_dim"] = keys.take("attention.key_length_full")
    for name in ("attention.value_length_full", "rope.dimension_count_full"):
        keys.require(name, fields["global_head_dim"])
    own = fields["layer_types"][: fields["num_hidden_layers"] - fields["num_kv_shared_layers"]]
    fields["attention_k_eq_v"] = not all(
        f"blk.{layer}.attn_v.weight" in keys.file.tensors
        for layer, kind in enumerate(own)
        if kind == FULL
    )
    fields["num_global_key_value_heads"] = keys.take("attention.head_count_kv_full")
    shared = keys.rest.pop("feed_forward_length_shared")
    fields["use_double_wide_mlp"] = bool(
        len(shared) and (shared == 2 * fields["intermediate_size"]).all()
    )
    factors = keys.file.tensors[FREQS].array() if FREQS in keys.file.tensors else np.ones(1)
    fields["rope_parameters"][FULL] |= {
        "rope_type": "proportional",
        "partial_rotary_factor": float((factors == 1).mean()),
    }
    if not ((factors == 1) | (factors >= 1e29)).all():
        raise UserError(f"{keys.path} has other factors in {FREQS}", USE_DIRECTORY)
    fields["enable_moe_block"] = "num_experts" in fields
    if fields["hidden_size_per_layer_input"]:
        table = keys.file.tensors["per_layer_token_embd.weight"]
        fields["vocab_size_per_layer_input"] = table.shape[-1]


def _interleaved(arrays: list[np.ndarray], _config) -> np.ndarray:
    """gpt-oss: gate and up [n_expert, n_ff, ...] -> [n_expert, ..., 2 n_ff] in turns."""
    both = np.stack(arrays, axis=2).reshape(len(arrays[0]), -1, *arrays[0].shape[2:])
    return both.swapaxes(1, 2) if both.ndim == 3 else both


def _transposed(arrays: list[np.ndarray], _config) -> np.ndarray:
    return arrays[0].swapaxes(1, 2)


def _falcon_qkv(arrays: list[np.ndarray], config) -> np.ndarray:
    """Heads of q, then of k, then of v -> for each head of k its heads of q, k and v."""
    head = config.hidden_size // config.num_attention_heads
    heads = arrays[0].reshape(-1, head, *arrays[0].shape[1:])
    n_kv = (len(heads) - config.num_attention_heads) // 2
    q, k, v = np.split(heads, (config.num_attention_heads, config.num_attention_heads + n_kv))
    groups = [q.reshape(n_kv, -1, *q.shape[1:]), k[:, None], v[:, None]]
    return np.concatenate(groups, axis=1).reshape(arrays[0].shape)


def _falcon(fields: dict[str, Any], _keys) -> None:
    n_kv = fields["num_kv_heads"] = fields.pop("num_key_value_heads")
    fields["new_decoder_architecture"] = two_norms = fields.pop("two_norms")
    fields["num_ln_in_parallel_attn"] = 2 if two_norms else 1
    fields["multi_query"] = n_kv == 1
    fields.pop("head_dim")  # the class computes it
    fields["ffn_hidden_size"] = fields.pop("intermediate_size")


def _own_size_fields(fields: dict[str, Any], context: str) -> None:
    """Leave out what BLOOM and MPT have no fields for, and name the context as they do."""
    fields[context] = fields.pop("max_position_embeddings")
    for name in ("intermediate_size", "num_key_value_heads", "head_dim", "rope_parameters"):
        del fields[name]


def _bloom(fields: dict[str, Any], _keys) -> None:
    _own_size_fields(fields, "seq_length")


def _bloom_qkv(arrays: list[np.ndarray], config) -> np.ndarray:
    """Heads of q, then of k, then of v -> q, k and v of each head."""
    heads = arrays[0].reshape(3, config.num_attention_heads, -1, *arrays[0].shape[1:])
    return heads.swapaxes(0, 1).reshape(arrays[0].shape)


def _mpt(fields: dict[str, Any], keys) -> None:
    _own_size_fields(fields, "max_seq_len")
    largest = keys.take("attention.max_alibi_bias", 0.0)
    fields["attn_config"] = {
        "clip_qkv": keys.take("attention.clamp_kqv", None),
        "alibi": largest > 0,
        "alibi_bias_max": int(largest),
    }


_LLAMA = Architecture(
    "llama",
    present=ATTENTION_BIAS | MLP_BIAS,
    swap_halves=True,
    rope_factors=ALL_FACTORS,
)
_GEMMA2 = Architecture(
    "gemma2",
    fields={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    fixed={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    present=ATTENTION_BIAS,
    sliding=2,
    window=4096,
    finish=_gemma(large=46),
    norm_offset=1.0,
)
_GRANITE = replace(
    _LLAMA,
    model_type="granite",
    fields=GRANITE_SCALES,
    finish=_granite,
)
_OLMO2 = Architecture("olmo2", present=ATTENTION_BIAS)

# general.architecture -> row
ARCHITECTURES = {
    **HYBRIDS,
    "llama": replace(
        _LLAMA,
        variants={
            "expert_count": replace(
                _LLAMA,
                model_type="mixtral",
                fields=FEW_EXPERTS,
                fixed={"sliding_window": None},
                present={},
                layouts=EXPERTS,
            )
        },
    ),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        fields=MIXTURE,
        fixed=ALL_SPARSE | {"norm_topk_prob": False},
        layouts=EXPERTS,
    ),
    "qwen3": Architecture("qwen3", present=ATTENTION_BIAS),
    "qwen3moe": Architecture(
        "qwen3_moe",
        fields=MIXTURE,
        fixed=ALL_SPARSE | {"norm_topk_prob": True},
        present=ATTENTION_BIAS,
        layouts=EXPERTS,
    ),
    "mistral3": replace(
        _LLAMA,
        model_type="mistral",
        fixed={"sliding_window": None},
        present={},
        finish=_mistral3,
        variants={
            "attention.temperature_scale": replace(
                _LLAMA,
                model_type="ministral3",
                fixed={"sliding_window": None},
                present={},
                finish=_ministral3,
            )
        },
    ),
    "phi2": Architecture("phi", norm=(LAYER_NORM, "layer_norm_eps")),
    "phi3": Architecture(
        "phi3",
        rope_factors=("short", "long"),
        no_effect=("attention.sliding_window",),  # llama.cpp runs phi3 without it
    ),
    "stablelm": Architecture(
        "stablelm",
        norm=(LAYER_NORM, "layer_norm_eps"),
        present={
            "use_qkv_bias": r"blk\.\d+\.attn_(q|k|v)\.bias",
            "ffn_norm": r"blk\.\d+\.ffn_norm\.weight",
        },
        finish=_stablelm,
        no_effect=("use_parallel_residual",),  # The FFN's norm says it.
    ),
    "nemotron": Architecture(
        "nemotron",
        norm=(LAYER_NORM, "norm_eps"),
        present=ATTENTION_BIAS | MLP_BIAS,
        norm_offset=1.0,
    ),
    "gemma": Architecture("gemma", present=ATTENTION_BIAS, norm_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2,
        model_type="gemma3_text",
        fields={"final_logit_softcapping": "final_logit_softcapping"},
        fixed={},
        sliding=6,
        window=0,
        sliding_rope="own",
        finish=_gemma(large=62),
    ),
    "gemma4": Architecture(
        "gemma4_text",
        fields={
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        sliding=1,
        sliding_rope="own",
        prepare=_prepare_gemma4,
        finish=_gemma4,
        layouts={
            "layer_scalar": Layout(("layer_output_scale.weight",)),
            "router.scale": Layout(("ffn_gate_inp.scale",)),
            "router.proj.weight": Layout(("ffn_gate_inp.weight",)),
            "router.per_expert_scale": Layout(("ffn_down_exps.scale",)),
            "experts.gate_up_proj": Layout(("ffn_gate_up_exps.weight",)),
            "experts.down_proj": Layout(("ffn_down_exps.weight",)),
        },
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        fields=FEW_EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        fixed={"attention_bias": True},
        sliding=2,
        layouts={
            "self_attn.sinks": Layout(("attn_sinks.weight",)),
            "mlp.experts.gate_up_proj": Layout(
                ("ffn_gate_exps.weight", "ffn_up_exps.weight"), _interleaved
            ),
            "mlp.experts.gate_up_proj_bias": Layout(
                ("ffn_gate_exps.bias", "ffn_up_exps.bias"), _interleaved
            ),
            "mlp.experts.down_proj": Layout(("ffn_down_exps.weight",), _transposed),
            "mlp.experts.down_proj_bias": Layout(("ffn_down_exps.bias",)),
        },
    ),
    "smollm3": replace(_LLAMA, model_type="smollm3", rope_factors=()),
    "arcee": replace(_LLAMA, model_type="arcee"),
    "olmo": Architecture(
        "olmo",
        norm=(LAYER_NORM, None),
        fields={"attention.clamp_kqv": "clip_qkv"},
        swap_halves=True,
    ),
    "olmo2": replace(
        _OLMO2,
        variants={
            "attention.sliding_window": replace(
                _OLMO2, model_type="olmo3", sliding=4, sliding_rope="plain"
            )
        },
    ),
    "olmoe": Architecture(
        "olmoe",
        fields={"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        fixed={"norm_topk_prob": False},
        layouts=EXPERTS,
    ),
    "granite": _GRANITE,
    "granitemoe": replace(
        _GRANITE,
        model_type="granitemoe",
        fields=GRANITE_SCALES | FEW_EXPERTS,
        present=ATTENTION_BIAS,
        layouts=GRANITE_EXPERTS,
    ),
    "glm4": Architecture("glm4", present=ATTENTION_BIAS),
    "glm4moe": Architecture(
        "glm4_moe",
        fields=ROUTED_EXPERTS | {"leading_dense_block_count": "first_k_dense_replace"},
        fixed={"first_k_dense_replace": 0, "norm_topk_prob": False},
        present=ATTENTION_BIAS | {"use_qk_norm": r"blk\.\d+\.attn_q_norm\.weight"},
        finish=sigmoid_gates,
        layouts=EXPERTS | {"mlp.gate.e_score_correction_bias": Layout(("exp_probs_b.bias",))},
    ),
    "starcoder2": Architecture(
        "starcoder2",
        norm=(LAYER_NORM, "norm_epsilon"),
        fixed={"sliding_window": None},
        present={"use_bias": r"blk\.\d+\.(attn|ffn)_\w+\.bias"},
    ),
    "command-r": Architecture(
        "cohere",
        norm=(LAYER_NORM, "layer_norm_eps"),
        fields={"logit_scale": "logit_scale"},
        fixed={"logit_scale": 1.0},
        present={"use_qk_norm": r"blk\.\d+\.attn_q_norm\.weight"},
    ),
    "cohere2": Architecture(
        "cohere2",
        norm=(LAYER_NORM, "layer_norm_eps"),
        fields={"logit_scale": "logit_scale"},
        sliding=4,
    ),
    "exaone4": Architecture(
        "exaone4", sliding=4, window=4096, finish=_exaone4, rope_factors=("freqs",)
    ),
    "seed_oss": Architecture(
        "seed_oss",
        present={
            "attention_bias": r"blk\.\d+\.attn_(q|k|v)\.bias",
            "attention_out_bias": r"blk\.\d+\.attn_output\.bias",
        },
    ),
    "ernie4_5": Architecture("ernie4_5", present={"use_bias": r"blk\.\d+\.\w+\.bias"}),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", present=ATTENTION_BIAS),
    "bloom": Architecture(
        "bloom",
        norm=(LAYER_NORM, "layer_norm_epsilon"),
        finish=_bloom,
        layouts={
            "self_attention.query_key_value.weight": Layout(("attn_qkv.weight",), _bloom_qkv),
            "self_attention.query_key_value.bias": Layout(("attn_qkv.bias",), _bloom_qkv),
        },
    ),
    "mpt": Architecture("mpt", norm=(LAYER_NORM, "layer_norm_epsilon"), finish=_mpt),
    "falcon": Architecture(
        "falcon",
        norm=(LAYER_NORM, "layer_norm_epsilon"),
        present={
            "bias": r"blk\.\d+\.attn_qkv\.bias",
            "two_norms": r"blk\.\d+\.attn_norm_2\.weight",
        },
        finish=_falcon,
        layouts={
            "self_attention.query_key_value.weight": Layout(("attn_qkv.weight",), _falcon_qkv),
            "self_attention.query_key_value.bias": Layout(("attn_qkv.bias",), _falcon_qkv),
        },
    ),
}
