"""The rotary position embedding that llama.cpp computes from a GGUF file.

    rotary = file_rotary(GGUFFile.open("model.gguf"))
    rotary.same(other)

Sources: load_hparams in src/llama-model.cpp, src/llama-context.cpp and rope_yarn in
ggml/src/ggml-cpu/ops.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mod_export.formats.gguf import GGUFFile

YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0  # of most architectures; no key changes them
TOLERANCE = 1e-4  # relative, of the angles; a file holds factors in float32
FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Rotary:
    """Angles per position of the pairs of a head, and the factor of cosine and sine.

    short, long: float64 [n_rot / 2], up to `original` tokens and beyond; equal where the length
        does not count
    original: in tokens
    """

    short: np.ndarray
    long: np.ndarray
    scale: float
    original: int

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on the length of the text."""
        return not np.allclose(self.short, self.long, rtol=TOLERANCE, atol=0)

    def same_angles(self, other: Rotary) -> bool:
        """Whether all angles are those of another embedding."""
        if len(self.short) != len(other.short):
            return False
        if (self.by_length or other.by_length) and self.original != other.original:
            return False
        pairs = ((self.short, other.short), (self.long, other.long))
        return all(np.allclose(a, b, rtol=TOLERANCE, atol=0) for a, b in pairs)

    def same(self, other: Rotary) -> bool:
        """Whether angles and scale are those of another embedding."""
        return self.same_angles(other) and math.isclose(self.scale, other.scale, rel_tol=TOLERANCE)


def plain_angles(base: float, n_rot: int) -> np.ndarray:
    """The angles without any scaling, float64 [n_rot / 2]."""
    return float(base) ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)


def file_rotary(file: GGUFFile) -> Rotary:
    """The embedding of a file whose layers all have the same one."""

    def key(name: str, default):
        return file.get(f"{file.architecture}.{name}", default)

    head = key("attention.key_length", 0) or (
        file.model_number("embedding_length") // file.model_number("attention.head_count")
    )
    n_rot = int(key("rope.dimension_count", head))
    angles = plain_angles(key("rope.freq_base", 10000.0), n_rot)
    kind = key("rope.scaling.type", "linear")
    factor = float(key("rope.scaling.factor", 0.0) or key("rope.scale_linear", 0.0) or 1.0)
    scale = float(key("rope.scaling.attn_factor", 1.0))
    context = int(key("context_length", 0))
    original = int(key("rope.scaling.original_context_length", context))
    if kind == "none":
        factor = 1.0
    by_name = {name: _values(file, name, n_rot) for name in (FREQS, SHORT, LONG)}
    short = angles / (by_name[SHORT] if kind == "longrope" else by_name[FREQS])
    long = angles / (by_name[LONG] if kind == "longrope" else by_name[FREQS])
    if kind != "yarn":
        return Rotary(short / factor, long / factor, scale, original)
    kept = _yarn_share(key("rope.freq_base", 10000.0), n_rot, original)
    short = short * (kept + (1 - kept) / factor)
    return Rotary(short, short, scale * (1 + 0.1 * math.log(max(factor, 1.0))), original)


def _values(file: GGUFFile, name: str, n_rot: int) -> np.ndarray:
    """A tensor of factors, or ones where the file has none."""
    if name not in file.tensors:
        return np.ones(n_rot // 2)
    return file.tensors[name].array().astype(np.float64)


def _yarn_share(base: float, n_rot: int, original: int) -> np.ndarray:
    """How much of each angle YaRN leaves unscaled, 0 to 1."""

    def dimension(turns: float) -> float:
        return n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(dimension(YARN_BETA_FAST)))
    high = min(n_rot - 1, math.ceil(dimension(YARN_BETA_SLOW)))
    y = (np.arange(n_rot // 2) - low) / max(0.001, high - low)
    return 1 - np.clip(y, 0, 1)
