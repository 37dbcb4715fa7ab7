"""Whether a GGUF file says all that a Hugging Face configuration makes a model compute.

llama.cpp's converter leaves out in silence what it has no rule for. Here the written file is
compared with the configuration. What a key or a tensor of llama.cpp can still say is added. What
counts for long texts alone is told in a line of the log, and all else is refused by name.

    added = account(Path("mod"), GGUFFile.open("written.gguf"))   # {} where nothing is missing
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.formats import hf_directory
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.rotary import FREQS, LONG, SHORT, Rotary, file_rotary, plain_angles
from mod_export.formats.sliding_windows import layer_windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Graph:
    """What llama.cpp's graph of an architecture takes from a file.

    fixed: field of the configuration -> the values that the graph has
    factors: the loader takes the tensors of rotary factors
    """

    fixed: Mapping[str, tuple]
    factors: bool = False


_SILU = {"hidden_act": ("silu", "swish")}
GRAPHS = {
    "llama": Graph(_SILU, factors=True),
    "qwen2": Graph(_SILU),
    "qwen3": Graph(_SILU),
}
# field -> key of the architecture that holds it. head_dim is compared where the field is there.
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
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
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {"use_sliding_window": False, "max_window_layers": 28},
}
# type of a layer -> field with the number of tokens that it attends to
SLIDING = "sliding_attention"
WINDOW_FIELDS = {SLIDING: "sliding_window", "chunked_attention": "attention_chunk_size"}
COMMON_CURE = "use it in torch; a GGUF file of it would compute something else"


@dataclass
class Additions:
    """Keys (name, type, value), keys to drop, and tensors that a file lacks."""

    keys: list[tuple[str, str, object]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys or self.tensors)


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
        _check_keys(directory, config, file)
        added = _rotary_additions(directory, config, graph, file)
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
    if base.architecture not in GRAPHS:
        return
    # The context is no part of the computation, and people extend it.
    fields = {name: value for name, value in config.items() if name != "max_position_embeddings"}
    _check_keys(directory, fields, base)
    wanted = _config_rotary(directory, config)
    if wanted is not None and not wanted.same(file_rotary(base)):
        raise UserError(
            f"{base.path} has another rotary embedding than {directory}",
            "give a GGUF of the same model",
        )


def _check_fixed(directory: Path, config: dict, graph: Graph) -> None:
    for name, values in graph.fixed.items():
        if config.get(name, values[0]) not in values:
            raise UserError(
                f"{directory} has {name} {config[name]!r}, where llama.cpp computes {values[0]}",
                COMMON_CURE,
            )


def _lost_window(directory: Path, config: dict, file: GGUFFile) -> int | None:
    """The least window, within the file's context, of layers that attend to all in llama.cpp.

    None where there is none. Raises UserError where a layer slides in llama.cpp that has full
    attention, or another window, in the configuration.
    """
    theirs = layer_windows(file)
    if any(theirs) and "layer_types" not in config:
        return None  # Only the model's code says which of its layers slide.
    context = file.get(f"{file.architecture}.context_length", math.inf)
    lost = []
    for layer, (window, other) in enumerate(zip(_windows(config), theirs, strict=False)):
        if window == other or min(window or context, other or context) >= context:
            continue
        if other:
            raise UserError(
                f"layer {layer} of {directory} attends to {window or 'all'} tokens, where "
                f"llama.cpp's {file.architecture} attends to {other}",
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
    return [sizes[SLIDING] if layer >= first else 0 for layer in range(n_layer)]


def _tell_window(directory: Path, window: int, what: str) -> None:
    logger.warning(
        f"note: {directory} has sliding attention of {window} tokens, where llama.cpp attends to "
        f"all: {what}"
    )


def _check_keys(directory: Path, config: dict, file: GGUFFile) -> None:
    """Every field of KEYS and TENSORS that is in the configuration is what the file has."""
    for name, key in KEYS.items():
        wanted, found = config.get(name), file.get(f"{file.architecture}.{key}")
        if wanted is None or found is None or isinstance(found, np.ndarray):
            continue
        if not math.isclose(wanted, found, rel_tol=1e-5):
            raise UserError(
                f"{directory} has {name} {_number(wanted)}, and {file.path.name} {key} "
                f"{_number(found)}",
                "they are not of the same model",
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
                "they are not of the same model",
            )


def _rotary_additions(directory: Path, config: dict, graph: Graph, file: GGUFFile) -> Additions:
    wanted, found = _config_rotary(directory, config), file_rotary(file)
    if wanted is None or wanted.same(found):
        return Additions()
    prefix = f"{file.architecture}.rope.scaling."
    if wanted.same_angles(found):
        before = float(file.get(f"{prefix}attn_factor", 1.0))
        scale = before * wanted.scale / found.scale
        return Additions([(f"{prefix}attn_factor", "f32", scale)], [f"{prefix}attn_factor"])
    if not graph.factors:
        raise UserError(
            f"{directory} has the rotary embedding {_describe(config)}, for which llama.cpp's "
            f"{file.architecture} has no keys",
            COMMON_CURE,
        )
    plain = plain_angles(file.get(f"{file.architecture}.rope.freq_base", 10000.0), _n_rot(wanted))
    added = Additions(dropped=[name for name in file.keys if name.startswith(prefix)])
    added.keys.append((f"{prefix}attn_factor", "f32", wanted.scale))
    if wanted.by_length:
        added.keys.append((f"{prefix}type", "string", "longrope"))
        added.keys.append((f"{prefix}original_context_length", "u32", wanted.original))
        factors = {SHORT: plain / wanted.short, LONG: plain / wanted.long}
    else:
        added.keys.append((f"{prefix}type", "string", "none"))
        factors = {FREQS: plain / wanted.short}
    added.tensors |= {name: values.astype(np.float32) for name, values in factors.items()}
    return added


def _n_rot(rotary: Rotary) -> int:
    return 2 * len(rotary.short)


def _describe(config: dict) -> str:
    """The parameters of the rotary embedding, without long lists."""
    parameters = _parameters(config)
    kind = parameters.get("rope_type", "default")
    rest = [
        f"{name} {_number(value)}"
        for name, value in parameters.items()
        if isinstance(value, (int, float)) and name != "rope_theta"
    ]
    return f"{kind} ({', '.join(rest)})" if rest else str(kind)


def _number(value: float) -> str:
    """An integer as it is, and a float in its shortest form."""
    return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)


def _parameters(config: dict) -> dict[str, Any]:
    """The rotary parameters, in the form of transformers 5."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def _config_rotary(directory: Path, config: dict) -> Rotary | None:
    """The embedding that transformers computes; None where it differs between layers."""
    parameters = _parameters(config)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        return None
    context = int(config.get("max_position_embeddings") or 0)
    if parameters["rope_type"] == "default":
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        angles = plain_angles(parameters["rope_theta"], int(head * share))
        return Rotary(angles, angles, 1.0, context)
    from mod_export.model import loading

    compute = loading.rotary_function(directory, parameters["rope_type"])
    original = int(parameters.get("original_max_position_embeddings") or context)
    short, scale = compute(1)
    long, _ = compute(2 * max(context, original))
    longer, _ = compute(4 * max(context, original))
    if np.allclose(long, longer, rtol=1e-6):
        return Rotary(short, long, scale, original)
    if not np.allclose(short, compute(context)[0], rtol=1e-6):
        raise UserError(
            f"{directory} has the rotary embedding {_describe(config)}, whose angles change with "
            "the length of a text",
            COMMON_CURE,
        )
    logger.warning(
        f"note: {directory} has the rotary embedding {_describe(config)}, which a GGUF file cannot "
        f"say: up to {context} tokens this changes nothing"
    )
    return Rotary(short, short, scale, original)
