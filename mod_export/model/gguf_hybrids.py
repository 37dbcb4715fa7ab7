"""The rows of hybrids in the table of GGUF architectures.

Some of their layers attend, others have a recurrent state, and those of Falcon-H1 have both.
formats/recurrent_layers.py says which do. What the file holds otherwise than transformers is what
llama.cpp's converter makes of it; the functions here turn that back.

Sources: conversion/qwen.py, lfm2.py, granite.py, falcon_h1.py, nemotron.py and mamba.py, and
src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.formats.recurrent_layers import attention_layers, ffn_layers, recurrent_layers
from mod_export.model.gguf_rows import (
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
    RMS_NORM,
    ROUTED_EXPERTS,
    SIGMOID,
    Architecture,
    Layout,
    granite_scale,
    sigmoid_gates,
)
from mod_export.model.gguf_tokenizer import USE_DIRECTORY

LINEAR = "linear_attention"

# --- layers


def _prepare(keys) -> None:
    """Leave those numbers of heads, and widths, that are not 0: which layers have none is known."""
    for name in ("attention.head_count_kv", "feed_forward_length", "expert_feed_forward_length"):
        value = keys.rest.get(name)
        if isinstance(value, np.ndarray):
            keys.rest[name] = value[value != 0]


def _kinds(fields: dict[str, Any], keys, state: str = LINEAR) -> list[str]:
    """The type of each layer; state: what a layer with a recurrent state is called."""
    attends = attention_layers(keys.file)[: fields["num_hidden_layers"]]
    return [FULL if own else state for own in attends]


# --- Qwen3-Next and Qwen3.5: gated delta nets


def _delta_net(fields: dict[str, Any], keys) -> None:
    size, heads = keys.take("ssm.state_size"), keys.take("ssm.time_step_rank")
    keys.require("ssm.inner_size", size * heads)
    fields |= {
        "layer_types": _kinds(fields, keys),
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "linear_num_key_heads": keys.take("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_conv_kernel_dim": keys.take("ssm.conv_kernel"),
    }
    fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)


def _qwen35(fields: dict[str, Any], keys) -> None:
    """A text's positions turn all pairs alike, where the sections of images leave none out."""
    _delta_net(fields, keys)
    sections = [int(size) for size in keys.rest.pop("rope.dimension_sections", ())]
    pairs = range(int(fields["head_dim"] * fields["rope_parameters"]["partial_rotary_factor"]) // 2)
    period = max(1, sum(sections))
    if len(sections) < 3 or any(pair % period >= 3 * sections[pair % period % 3] for pair in pairs):
        raise UserError(
            f"{keys.path}: the key {keys.name('rope.dimension_sections')} = {sections} leaves "
            "pairs of a head where they are",
            USE_DIRECTORY,
        )
    fields["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}


def _grouped(values: np.ndarray, config, size: int, axis: int = 0) -> np.ndarray:
    """V heads of all K heads in turns -> those of one K head side by side.

    size: of a head along the axis
    """
    n_k = config.linear_num_key_heads
    shape, per_k = values.shape, config.linear_num_value_heads // n_k
    turns = values.reshape(*shape[:axis], per_k, n_k, size, *shape[axis + 1 :])
    return turns.swapaxes(axis, axis + 1).reshape(shape)


def _grouped_heads(arrays: list[np.ndarray], config) -> np.ndarray:
    return _grouped(arrays[0], config, 1)


def _grouped_rows(arrays: list[np.ndarray], config) -> np.ndarray:
    return _grouped(arrays[0], config, config.linear_value_head_dim)


def _grouped_columns(arrays: list[np.ndarray], config) -> np.ndarray:
    return _grouped(arrays[0], config, config.linear_value_head_dim, axis=1)


def _grouped_v(arrays: list[np.ndarray], config) -> np.ndarray:
    """Rows of Q and K, which stay, and those of V."""
    n_qk = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    v = _grouped(arrays[0][n_qk:], config, config.linear_value_head_dim)
    return np.concatenate([arrays[0][:n_qk], v])


def _decay(arrays: list[np.ndarray], _config) -> np.ndarray:
    """A = -exp(A_log) -> A_log, without the dimensions of 1."""
    return np.log(-arrays[0].reshape(-1))


def _grouped_decay(arrays: list[np.ndarray], config) -> np.ndarray:
    return _grouped(_decay(arrays, config), config, 1)


def _by_k_head(arrays: list[np.ndarray], config) -> np.ndarray:
    """Rows of all Q, K and V, and those of all gates -> those of each K head side by side."""
    n_k = config.linear_num_key_heads
    n_keys = n_k * config.linear_key_head_dim
    q, k, v = np.split(arrays[0], (n_keys, 2 * n_keys))
    heads = [part.reshape(n_k, -1, part.shape[-1]) for part in (q, k, v, arrays[1])]
    return np.concatenate(heads, axis=1).reshape(-1, q.shape[-1])


# The norm of a delta net's output has no offset.
_DELTA_LAYOUTS = {
    "linear_attn.A_log": Layout(("ssm_a",), _decay),
    "linear_attn.dt_bias": Layout(("ssm_dt.bias",)),
    "linear_attn.norm.weight": Layout(("ssm_norm.weight",)),
}
_QWEN35 = Architecture(
    "qwen3_5_text",
    present=ATTENTION_BIAS,
    finish=_qwen35,
    norm_offset=1.0,
    no_effect=("attention.recurrent_layers", "full_attention_interval"),
    layouts=_DELTA_LAYOUTS
    | {
        "linear_attn.A_log": Layout(("ssm_a",), _grouped_decay),
        "linear_attn.dt_bias": Layout(("ssm_dt.bias",), _grouped_heads),
        "linear_attn.conv1d.weight": Layout(("ssm_conv1d.weight",), _grouped_v),
        "linear_attn.in_proj_qkv.weight": Layout(("attn_qkv.weight",), _grouped_v),
        "linear_attn.in_proj_z.weight": Layout(("attn_gate.weight",), _grouped_rows),
        "linear_attn.in_proj_a.weight": Layout(("ssm_alpha.weight",), _grouped_heads),
        "linear_attn.in_proj_b.weight": Layout(("ssm_beta.weight",), _grouped_heads),
        "linear_attn.out_proj.weight": Layout(("ssm_out.weight",), _grouped_columns),
    },
)
_QWEN3_NEXT = replace(
    _QWEN35,
    model_type="qwen3_next",
    fields=MIXTURE,
    fixed=ALL_SPARSE | {"norm_topk_prob": True},
    finish=_delta_net,
    layouts=_DELTA_LAYOUTS
    | EXPERTS
    | {
        "linear_attn.in_proj_qkvz.weight": Layout(
            ("attn_qkv.weight", "attn_gate.weight"), _by_k_head, "ssm_in.weight"
        )
    },
)

# --- LFM2: short convolutions


def _lfm2(fields: dict[str, Any], keys) -> None:
    fields["layer_types"] = _kinds(fields, keys, "conv")


def _lfm2_moe(fields: dict[str, Any], keys) -> None:
    _lfm2(fields, keys)
    keys.require("expert_gating_func", SIGMOID)


_LFM2 = Architecture(
    "lfm2",
    norm=(RMS_NORM, "norm_eps"),
    fields={"shortconv.l_cache": "conv_L_cache"},
    fixed={"block_auto_adjust_ff_dim": False},
    prepare=_prepare,
    finish=_lfm2,
)
_LFM2_MOE = replace(
    _LFM2,
    model_type="lfm2_moe",
    fields=_LFM2.fields | MIXTURE | {"leading_dense_block_count": "num_dense_layers"},
    fixed={"num_dense_layers": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    finish=_lfm2_moe,
    layouts={
        "feed_forward.experts.gate_up_proj": EXPERTS["mlp.experts.gate_up_proj"],
        "feed_forward.experts.down_proj": EXPERTS["mlp.experts.down_proj"],
        "feed_forward.expert_bias": Layout(("exp_probs_b.bias",)),
    },
)

# --- Granite 4 H, Falcon-H1 and Nemotron-H: Mamba 2


def _mamba2(fields: dict[str, Any], keys) -> None:
    """Sizes by the names of Granite and Falcon."""
    inner, heads = keys.take("ssm.inner_size"), keys.take("ssm.time_step_rank")
    fields |= {
        "mamba_d_ssm": inner,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_state": keys.take("ssm.state_size"),
        "mamba_n_groups": keys.take("ssm.group_count"),
        "mamba_d_conv": keys.take("ssm.conv_kernel"),
    }


def _granite_hybrid(fields: dict[str, Any], keys) -> None:
    granite_scale(fields)
    _mamba2(fields, keys)
    fields["layer_types"] = _kinds(fields, keys)
    fields["mamba_expand"] = fields.pop("mamba_d_ssm") // fields["hidden_size"]
    turned = keys.take("rope.scaling.finetuned", True)
    fields["position_embedding_type"] = "rope" if turned else None
    if turned and "partial_rotary_factor" in fields["rope_parameters"]:
        raise UserError(
            f"{keys.path}: the key {keys.name('rope.dimension_count')} turns a part of each head, "
            f"where transformers' granitemoehybrid turns all of it",
            USE_DIRECTORY,
        )


def _granite_dense(fields: dict[str, Any], keys) -> None:
    """All experts are one FFN, which transformers calls the shared one."""
    _granite_hybrid(fields, keys)
    fields["shared_intermediate_size"] = fields["intermediate_size"]


def _nemotron_h(ffn: str, fields: dict[str, Any], keys) -> None:
    """ffn: what a layer that is an FFN is called."""
    _mamba2(fields, keys)
    fields.pop("mamba_d_ssm")
    for name, former in {
        "mamba_num_heads": "mamba_n_heads",
        "mamba_head_dim": "mamba_d_head",
        "ssm_state_size": "mamba_d_state",
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
    }.items():
        fields[name] = fields.pop(former)
    fields.pop("rope_parameters")  # Nothing is turned.
    sigmoid_gates(fields, keys)
    rows = zip(recurrent_layers(keys.file), ffn_layers(keys.file), strict=True)
    kinds = [LINEAR if state else ffn if has_ffn else FULL for state, has_ffn in rows]
    fields["layers_block_type"] = kinds[: fields["num_hidden_layers"]]


def _prepare_nemotron_h(keys) -> None:
    _prepare(keys)
    if LAYER_NORM in keys.rest:
        keys.rest.setdefault(RMS_NORM, keys.rest[LAYER_NORM])
    for name in [name for name in keys.rest if name.startswith("rope.")]:
        del keys.rest[name]


def _rows_joined(arrays: list[np.ndarray], _config) -> np.ndarray:
    return np.concatenate(arrays)


def _flat(arrays: list[np.ndarray], _config) -> np.ndarray:
    """Values for each group -> values for all."""
    return arrays[0].reshape(-1)


def _mamba_layouts(module: str) -> dict[str, Layout]:
    """Where a Mamba layer's parameters are; module: what the layer calls it."""
    return {
        f"{module}.A_log": Layout(("ssm_a",), _decay),
        f"{module}.D": Layout(("ssm_d",), _flat),
        f"{module}.dt_bias": Layout(("ssm_dt.bias",)),
        f"{module}.norm.weight": Layout(("ssm_norm.weight",), _flat),
    }


def _shared_layouts(suffix: str) -> dict[str, Layout]:
    """Where Granite's shared FFN is; suffix: of the file's names."""
    return {
        "shared_mlp.input_linear.weight": Layout(
            (f"ffn_gate{suffix}.weight", f"ffn_up{suffix}.weight"), _rows_joined
        ),
        "shared_mlp.output_linear.weight": Layout((f"ffn_down{suffix}.weight",)),
    }


_CONV_BIAS = {"mamba_conv_bias": r"blk\.\d+\.ssm_conv1d\.bias"}
_GRANITE_H = Architecture(
    "granitemoehybrid",
    fields=GRANITE_SCALES,
    fixed={"num_local_experts": 0, "num_experts_per_tok": 0},
    present=ATTENTION_BIAS | _CONV_BIAS,
    prepare=_prepare,
    finish=_granite_dense,
    swap_halves=True,
    rope_factors=("freqs",),
    no_effect=("expert_shared_feed_forward_length",),
    layouts=_mamba_layouts("mamba") | _shared_layouts(""),
)
_FALCON_H1 = Architecture(
    "falcon_h1",
    fixed={"mamba_norm_before_gate": False},
    present=ATTENTION_BIAS
    | MLP_BIAS
    | _CONV_BIAS
    | {"mamba_rms_norm": r"blk\.\d+\.ssm_norm\.weight"},
    finish=_mamba2,
    layouts=_mamba_layouts("mamba") | {"pre_ff_layernorm.weight": Layout(("ffn_norm",))},
)
_NEMOTRON_H = Architecture(
    "nemotron_h",
    norm=(RMS_NORM, "layer_norm_epsilon"),
    present=ATTENTION_BIAS | MLP_BIAS | {"use_conv_bias": _CONV_BIAS["mamba_conv_bias"]},
    prepare=_prepare_nemotron_h,
    finish=partial(_nemotron_h, "mlp"),
    swap_halves=True,  # as the converter has it, though nothing is turned
    no_effect=("expert_group_used_count",),
    layouts=_mamba_layouts("mixer"),
)

# general.architecture -> row
HYBRIDS = {
    "qwen35": _QWEN35,
    "qwen35moe": replace(
        _QWEN35,
        model_type="qwen3_5_moe_text",
        fields=MIXTURE,
        layouts=_QWEN35.layouts | EXPERTS,
    ),
    "qwen3next": _QWEN3_NEXT,
    "lfm2": _LFM2,
    "lfm2moe": _LFM2_MOE,
    "granitehybrid": replace(
        _GRANITE_H,
        variants={
            "expert_count": replace(
                _GRANITE_H,
                fields=GRANITE_SCALES
                | FEW_EXPERTS
                | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
                fixed={},
                finish=_granite_hybrid,
                no_effect=(),
                layouts=_mamba_layouts("mamba") | GRANITE_EXPERTS | _shared_layouts("_shexp"),
            )
        },
    ),
    "falcon-h1": _FALCON_H1,
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": replace(
        _NEMOTRON_H,
        fields=ROUTED_EXPERTS
        | {
            "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
            "moe_latent_size": "moe_latent_size",
        },
        fixed={"norm_topk_prob": False},
        finish=partial(_nemotron_h, "moe"),
        no_effect=(),
        layouts=_NEMOTRON_H.layouts
        | {
            "mixer.experts.up_proj": Layout(("ffn_up_exps.weight",)),
            "mixer.experts.down_proj": Layout(("ffn_down_exps.weight",)),
            "mixer.gate.e_score_correction_bias": Layout(("exp_probs_b.bias",)),
        },
    ),
}
