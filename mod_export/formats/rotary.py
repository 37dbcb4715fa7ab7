"""The rotary position embedding that llama.cpp computes from a GGUF file.

    rotary = file_rotary(GGUFFile.open("model.gguf"))          # of layers with full attention
    file_rotary(GGUFFile.open("gemma-3.gguf"), slides=True)    # of those with a sliding window
    rotary.same(other)

Sources: load_hparams in src/llama-model.cpp, src/llama-context.cpp and rope_yarn in
ggml/src/ggml-cpu/ops.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mod_export.formats.gguf import GGUFFile

YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0
YARN_KEYS = ("mistral3",)  # architectures whose files can name the betas and a multiplier
TOLERANCE = 1e-4  # relative, of the angles; a file holds factors in float32
NO_ANGLE = 1e-20  # a pair that is not turned has a factor of 1e30
FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class SlidingRotary:
    """What the layers with a sliding window rotate with, beside those with full attention.

    base: where the file has no key rope.freq_base_swa; None: the other layers' base
    keyed: the graph reads that key
    scaled: the other layers' scaling counts
    """

    base: float | None = None
    keyed: bool = True
    scaled: bool = True


SLIDING = {
    **dict.fromkeys(("gemma3", "gemma4"), SlidingRotary(10000.0, scaled=False)),
    **dict.fromkeys(("cohere2", "exaone4"), SlidingRotary(keyed=False)),
    "olmo2": SlidingRotary(keyed=False, scaled=False),
}


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
        return not _close(self.short, self.long)

    def same_angles(self, other: Rotary) -> bool:
        """Whether all angles are those of another embedding."""
        if len(self.short) != len(other.short):
            return False
        if (self.by_length or other.by_length) and self.original != other.original:
            return False
        pairs = ((self.short, other.short), (self.long, other.long))
        return all(_close(a, b) for a, b in pairs)

    def same(self, other: Rotary) -> bool:
        """Whether angles and scale are those of another embedding."""
        return self.same_angles(other) and math.isclose(self.scale, other.scale, rel_tol=TOLERANCE)


def plain_angles(base: float, n_rot: int) -> np.ndarray:
    """The angles without any scaling, float64 [n_rot / 2]."""
    return float(base) ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)


def file_rotary(file: GGUFFile, slides: bool = False) -> Rotary:
    """The embedding of a file's layers with full attention, or of those that slide."""

    def key(name: str, default):
        return file.get(f"{file.architecture}.{name}", default)

    if slides and not (own := SLIDING.get(file.architecture, SlidingRotary())).scaled:
        return _plain_sliding(file, own)
    n_rot, base = _n_rot(file), key("rope.freq_base", 10000.0)
    if slides and own.keyed:
        base = key("rope.freq_base_swa", base)
    angles = plain_angles(base, n_rot)
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
    fast, slow, multiplier = YARN_BETA_FAST, YARN_BETA_SLOW, 0.0
    if file.architecture in YARN_KEYS:
        fast = key("rope.scaling.yarn_beta_fast", fast)
        slow = key("rope.scaling.yarn_beta_slow", slow)
        multiplier = key("rope.scaling.yarn_log_multiplier", multiplier)
    kept = _yarn_share(base, n_rot, original, fast, slow)
    short = short * (kept + (1 - kept) / factor)
    log = 0.1 * math.log(max(factor, 1.0))
    return Rotary(short, short, scale * (1 + log) / (1 + multiplier * log), original)


def _n_rot(file: GGUFFile, suffix: str = "") -> int:
    """The number of values of a head that are turned; suffix: _swa for layers that slide."""
    prefix = f"{file.architecture}."
    head = file.get(f"{prefix}attention.key_length", 0) or (
        file.model_number("embedding_length") // file.model_number("attention.head_count")
    )
    n_rot = file.get(f"{prefix}rope.dimension_count", head)
    return int(file.get(f"{prefix}rope.dimension_count{suffix}", n_rot))


def _plain_sliding(file: GGUFFile, own: SlidingRotary) -> Rotary:
    """The embedding of layers that slide, in an architecture that scales only the others'."""
    prefix = f"{file.architecture}.rope."
    base = file.get(f"{prefix}freq_base", 10000.0) if own.base is None else own.base
    if own.keyed:
        base = file.get(f"{prefix}freq_base_swa", base)
        scale = float(file.get(f"{prefix}scaling.attn_factor", 1.0))
    else:
        scale = 1.0
    angles = plain_angles(base, _n_rot(file, "_swa"))
    return Rotary(angles, angles, scale, 0)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=TOLERANCE, atol=NO_ANGLE)


def _values(file: GGUFFile, name: str, n_rot: int) -> np.ndarray:
    """A tensor of factors, or ones where the file has none."""
    if name not in file.tensors:
        return np.ones(n_rot // 2)
    return file.tensors[name].array().astype(np.float64)


def _yarn_share(base: float, n_rot: int, original: int, fast: float, slow: float) -> np.ndarray:
    """How much of each angle YaRN leaves unscaled, 0 to 1."""

    def dimension(turns: float) -> float:
        return n_rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(dimension(fast)))
    high = min(n_rot - 1, math.ceil(dimension(slow)))
    y = (np.arange(n_rot // 2) - low) / max(0.001, high - low)
    return 1 - np.clip(y, 0, 1)
