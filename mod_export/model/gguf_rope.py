"""The rotary position embedding of a GGUF file as `rope_parameters` of transformers.

llama.cpp turns pair i of a head by the angle `position / (base^(2i/d) * scale * f_i)` and scales
cosine and sine by one attention factor. `scale` is a key of the file, f_i are a tensor of it.
Sources: load_hparams in src/llama-model.cpp, src/llama-context.cpp and rope_yarn in
ggml/src/ggml-cpu/ops.cpp of llama.cpp; modeling_rope_utils.py of transformers.

    rope_parameters(keys, RopeFactors(freqs=array), n_rot=64, head_dim=64, context=131072)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mod_export.errors import UserError

# The context before its extension, of every released model with llama3's scaling. A file does not
# hold it: the same factors follow from other contexts with other frequency factors.
LLAMA3_CONTEXT = 8192
PRECISION = 1e-6  # relative; a file holds the factors in float32


@dataclass(frozen=True)
class RopeFactors:
    """The f_i of a file, float32 [d / 2] each, or None where the file has no such tensor.

    freqs: for every context; short, long: for contexts up to and beyond the original one.
    """

    freqs: np.ndarray | None = None
    short: np.ndarray | None = None
    long: np.ndarray | None = None


def rope_parameters(
    keys, factors: RopeFactors, n_rot: int, head_dim: int, context: int
) -> dict[str, Any]:
    """Return `rope_parameters` and take their keys from the file's.

    keys: what gguf_reading.Keys is. n_rot: the dimensions of a head that are turned. context: the
    longest sequence of the model. Raises UserError for a combination that transformers lacks.
    """
    base = float(keys.take("rope.freq_base", 10000.0))
    kind = keys.take("rope.scaling.type", "linear")
    old_scale = keys.take("rope.scale_linear", 0.0)
    scale = float(keys.take("rope.scaling.factor", old_scale)) or 1.0
    attention = float(keys.take("rope.scaling.attn_factor", 1.0))
    original = int(keys.take("rope.scaling.original_context_length", context))
    if kind == "none":
        scale = 1.0
    common: dict[str, Any] = {"rope_theta": base}
    if n_rot != head_dim:
        common["partial_rotary_factor"] = n_rot / head_dim
    if kind == "yarn":
        if any(part is not None for part in (factors.freqs, factors.short, factors.long)):
            raise UserError(
                f"{keys.path} has the key {keys.name('rope.scaling.type')} = yarn and factors of "
                "frequencies beside it",
                "transformers has no such rotary embedding",
            )
        return common | _yarn(scale, attention, original)
    if factors.long is not None and factors.short is not None and factors.freqs is None:
        return common | _explicit(factors.short * scale, factors.long * scale, attention, original)
    if factors.freqs is None:
        if attention == 1.0:
            found = {"rope_type": "linear", "factor": scale} if scale != 1.0 else {}
            return common | ({"rope_type": "default"} | found)
        every = np.full(n_rot // 2, scale)
    else:
        every = factors.freqs.astype(np.float64) * scale
        if attention == 1.0 and np.allclose(every, 1.0, rtol=PRECISION, atol=0):
            return common | {"rope_type": "default"}
        if attention == 1.0 and (found := llama3_parameters(every, base)):
            return common | found
    return common | _explicit(every, every, attention, original)


def _yarn(scale: float, attention: float, original: int) -> dict[str, Any]:
    """Return YaRN's parameters. llama.cpp has the paper's betas for all architectures of the table.

    Its attention factor is transformers' default, times the key's.
    """
    found = {
        "rope_type": "yarn",
        "factor": scale,
        "original_max_position_embeddings": original,
    }
    if attention != 1.0:
        found["attention_factor"] = (0.1 * math.log(max(scale, 1.0)) + 1.0) * attention
    return found


def _explicit(
    short: np.ndarray, long: np.ndarray, attention: float, original: int
) -> dict[str, Any]:
    """Return parameters that hold each factor; transformers calls this form longrope."""
    return {
        "rope_type": "longrope",
        "short_factor": [float(value) for value in short],
        "long_factor": [float(value) for value in long],
        "factor": 1.0,
        "attention_factor": attention,
        "original_max_position_embeddings": original,
    }


def llama3_factors(
    base: float, n_pairs: int, factor: float, low: float, high: float, context: float
) -> np.ndarray:
    """Return the f_i that llama3's scaling gives, float64 [n_pairs].

    Source: generate_extra_tensors in conversion/llama.py of llama.cpp.
    """
    turns = context * base ** (-np.arange(n_pairs) / n_pairs) / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - share) / factor + share)


def llama3_parameters(factors: np.ndarray, base: float) -> dict[str, Any] | None:
    """Return llama3's parameters that give these factors, or None where there are none.

    factors: f_i [n_pairs]. The share of the unscaled frequency is linear in the turns of a pair in
    the original context, between the two frequency factors: a line through the shares that lie
    strictly between 0 and 1 gives these.
    """
    factor = float(factors.max())
    if factor <= 1.0 + PRECISION:
        return None
    turns = LLAMA3_CONTEXT * base ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)
    share = (1.0 / factors - 1.0 / factor) / (1.0 - 1.0 / factor)
    slope, start = _line(turns, share)
    if not slope > 0:
        return None
    low, high = -start / slope, (1.0 - start) / slope
    for digits in (2, 4, 6, 15):  # the released models have round numbers
        low_round, high_round = (float(f"{value:.{digits}g}") for value in (low, high))
        if not low_round < high_round:
            continue
        made = llama3_factors(
            base, len(factors), factor, low_round, high_round, float(LLAMA3_CONTEXT)
        )
        if np.allclose(made, factors, rtol=PRECISION, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_round,
                "high_freq_factor": high_round,
                "original_max_position_embeddings": LLAMA3_CONTEXT,
            }
    return None


def _line(turns: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    """Return slope and start of the line that the shares between 0 and 1 lie on.

    With fewer than two such shares many lines fit. The one returned is steep enough to be at most 0
    and at least 1 at the neighbours.
    """
    inside = (share > PRECISION) & (share < 1.0 - PRECISION)
    if inside.sum() >= 2:
        slope, start = np.polyfit(turns[inside], share[inside], 1)
        return float(slope), float(start)
    below = turns[share <= PRECISION].max(initial=0.0)
    above = turns[share >= 1.0 - PRECISION].min(initial=2.0 * turns.max())
    if not below < above:
        return 0.0, 0.0
    if not inside.any():
        slope = 2.0 / (above - below)
        return float(slope), float(0.5 - slope * (above + below) / 2)
    x, y = float(turns[inside][0]), float(share[inside][0])
    slope = max(y / (x - below), (1.0 - y) / (above - x))
    return slope, y - slope * x
