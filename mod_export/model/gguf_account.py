"""Whether a GGUF file says all that a Hugging Face configuration makes a model compute.

llama.cpp's converter leaves out in silence what it has no rule for. Here the written file is
compared with the configuration. What a key or a tensor of llama.cpp can still say is added. What
counts for long texts alone is told in a line of the log, and all else is refused by name.

    added = account(Path("mod"), GGUFFile.open("written.gguf"))   # {} where nothing is missing
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import hf_directory, recurrent_layers, sliding_windows
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.rotary import SLIDING as SLIDING_ROTARY
from mod_export.model import gguf_rotary
from mod_export.model.gguf_graphs import ACTIVATION_FIELDS, GRAPHS, Graph, fits
from mod_export.model.gguf_rotary import COMMON_CURE, SLIDES, Additions, shown
from mod_export.model.gguf_rows import SIGMOID

logger = logging.getLogger(__name__)


# field -> key of the architecture that holds it. head_dim is compared where the field is there.
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "max_position_embeddings": "context_length",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "conv_L_cache": "shortconv.l_cache",
    # delta nets
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    # Mamba 2, as Granite and Falcon call it, and Nemotron
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_n_groups": "ssm.group_count",
    "mamba_n_heads": "ssm.time_step_rank",
    "conv_kernel": "ssm.conv_kernel",
    "ssm_state_size": "ssm.state_size",
    "n_groups": "ssm.group_count",
    "mamba_num_heads": "ssm.time_step_rank",
}
# field -> tensor that is there if the field is true (tie_word_embeddings: if it is false)
TENSORS = {
    "attention_bias": "blk.0.attn_q.bias",
    "mlp_bias": "blk.0.ffn_up.bias",
    "tie_word_embeddings": "output.weight",
}
# model type -> what transformers takes where the fields of sliding attention are not there; the
# model types that are not here slide in all layers
SLIDING_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"use_sliding_window": False},
    **dict.fromkeys(
        ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
        {"use_sliding_window": False, "max_window_layers": 28},
    ),
}
# type of a layer -> field with the number of tokens that it attends to
WINDOW_FIELDS = {SLIDES: "sliding_window", "chunked_attention": "attention_chunk_size"}
ATTENTION_TYPES = ("full_attention", "attention")
# Types whose code has sigmoid gates, so that a configuration need not name them.
SIGMOID_GATES = ("deepseek_v3", "dots1", "exaone_moe", "glm4_moe_lite", "minimax_m2")
GATES_KEY = "expert_gating_func"
SAME_MODEL = "they are not of the same model"


def account(directory: Path, file: GGUFFile) -> Additions:
    """Compare a file with the configuration of a directory, and return what it lacks.

    Raises UserError for what llama.cpp has no key for. Of architectures that are not in GRAPHS
    nothing is compared but the windows.
    """
    config = hf_directory.read_json(directory / hf_directory.CONFIG_JSON, hf_directory.CONVERT)
    if "model_type" not in config:
        return Additions()
    added = Additions()
    if graph := GRAPHS.get(file.architecture):
        _check_fixed(directory, config, graph)
        _check_keys(directory, config, graph, file)
        added = gguf_rotary.additions(directory, config, graph, file)
    if _lacks_gates(config, file):
        added.keys.append((f"{file.architecture}.{GATES_KEY}", "u32", SIGMOID))
    key = f"{file.architecture}.context_length"
    window = _lost_window(directory, config, file)
    if window is not None:
        _tell_window(directory, window, f"the file's context is therefore {window} tokens")
        added.keys.append((key, "u32", window))
        added.dropped.append(key)
    return added


def check_base(directory: Path, base: GGUFFile) -> None:
    """Raise UserError where a GGUF to put routers on computes something else than a directory."""
    config = hf_directory.read_json(directory / hf_directory.CONFIG_JSON, hf_directory.CONVERT)
    if "model_type" not in config:
        return
    window = _lost_window(directory, config, base)
    if window is not None:
        _tell_window(directory, window, f"up to {window} tokens both are the same")
    if _lacks_gates(config, base):
        raise UserError(
            f"{base.path} has no key {base.architecture}.{GATES_KEY}, which says that the experts "
            f"of {directory} have sigmoid gates",
            "give a GGUF that a newer converter has written",
        )
    graph = GRAPHS.get(base.architecture)
    if graph is None:
        return
    _check_fixed(directory, config, graph)
    # The context is no part of the computation, and people extend it.
    _check_keys(directory, _without_context(config), graph, base)
    if not gguf_rotary.same(directory, config, graph, base):
        raise UserError(
            f"{base.path} has another rotary embedding than {directory}",
            "give a GGUF of the same model",
        )


def _without_context(config: dict) -> dict:
    return {name: value for name, value in config.items() if name != "max_position_embeddings"}


def _lacks_gates(config: dict, file: GGUFFile) -> bool:
    """Whether llama.cpp would take experts for others than those with sigmoid gates."""
    key = f"{file.architecture}.{GATES_KEY}"
    return config["model_type"] in SIGMOID_GATES and key not in file.keys


def _check_fixed(directory: Path, config: dict, graph: Graph) -> None:
    """Raise UserError for a field whose value is not the one that the graph computes."""
    fixed = dict(graph.fixed)
    if graph.activations is not None:
        name = next((name for name in ACTIVATION_FIELDS if config.get(name)), ACTIVATION_FIELDS[0])
        fixed[name] = graph.activations
    for name, rule in fixed.items():
        values = rule(config) if callable(rule) else rule
        if name in config and not fits(config[name], values):
            raise UserError(
                f"{directory} has {name} {config[name]!r}, where llama.cpp computes {values[0]}",
                COMMON_CURE,
            )


def _lost_window(directory: Path, config: dict, file: GGUFFile) -> int | None:
    """The least window, within the file's context, of layers that attend to all in llama.cpp.

    None where there is none. Raises UserError where a layer slides in llama.cpp that has full
    attention, or another window, in the configuration, and where the layers that slide differ by
    more than their window.
    """
    theirs = sliding_windows.layer_windows(file)
    if any(theirs) and "layer_types" not in config:
        return None  # Only the model's code says which of its layers slide.
    context = file.get(f"{file.architecture}.context_length", math.inf)
    lost = []
    for layer, (window, other) in enumerate(zip(_windows(config), theirs, strict=False)):
        if window == other or min(window or context, other or context) >= context:
            continue
        if other or file.architecture in SLIDING_ROTARY:
            raise UserError(
                f"layer {layer} of {directory} attends to {window or 'all'} tokens, where "
                f"llama.cpp's {file.architecture} attends to {other or 'all'}",
                COMMON_CURE,
            )
        lost.append(window)
    return min(lost, default=None)


def _windows(config: dict) -> list[int]:
    """The tokens that each layer attends to; 0: all of them."""
    fields = SLIDING_DEFAULTS.get(config.get("model_type", ""), {}) | config
    sizes = {name: int(fields.get(field) or 0) for name, field in WINDOW_FIELDS.items()}
    if not fields.get("use_sliding_window", True):
        return []
    if types := fields.get("layer_types"):
        return [sizes.get(name, 0) for name in types]
    first, n_layer = fields.get("max_window_layers") or 0, fields.get("num_hidden_layers") or 0
    return [sizes[SLIDES] if layer >= first else 0 for layer in range(n_layer)]


def _tell_window(directory: Path, window: int, what: str) -> None:
    logger.warning(
        f"note: {directory} has sliding attention of {window} tokens, where llama.cpp attends to "
        f"all: {what}"
    )


def _check_layers(directory: Path, config: dict, file: GGUFFile) -> None:
    """Raise UserError where other layers attend than in the configuration, of a hybrid."""
    types = config.get("layers_block_type") or config.get("layer_types")
    if not types or not any(recurrent_layers.recurrent_layers(file)):
        return
    attends = recurrent_layers.attention_layers(file)
    for layer, (kind, found) in enumerate(zip(types, attends, strict=False)):
        if (kind in ATTENTION_TYPES) != found:
            raise UserError(
                f"layer {layer} of {directory} is of the type {kind}, that of {file.path.name} "
                f"{'attends' if found else 'does not attend'}",
                SAME_MODEL,
            )


def _check_keys(directory: Path, config: dict, graph: Graph, file: GGUFFile) -> None:
    """Every field of KEYS and TENSORS that is in the configuration is what the file has."""
    _check_layers(directory, config, file)
    stated = {name: rule(config) for name, rule in graph.stated.items() if name in config}
    for name, key in KEYS.items():
        if f"{file.architecture}.{key}_swa" in file.keys:  # head_dim is then that of sliding layers
            key += "_swa"
        wanted = stated[name] if name in stated else config.get(name)
        found = file.get(f"{file.architecture}.{key}")
        if wanted is None or found is None or isinstance(found, np.ndarray):
            continue
        if name == "num_hidden_layers":
            found = sliding_windows.main_layers(file)
        if not math.isclose(wanted, found, rel_tol=1e-5):
            raise UserError(
                f"{directory} has {name} {shown(wanted)}, and {file.path.name} {key} "
                f"{shown(found)}",
                SAME_MODEL,
            )
    for name, tensor in TENSORS.items():
        wanted = config.get(name)
        if wanted is None or file.architecture != "llama":
            continue
        expected = wanted != (name == "tie_word_embeddings")
        # A tied model may hold the matrix twice.
        if (tensor in file.tensors) < expected:
            raise UserError(
                f"{directory} has {name} {wanted}, and {file.path.name} no tensor {tensor}",
                SAME_MODEL,
            )
