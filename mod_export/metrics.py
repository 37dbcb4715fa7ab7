"""How far the next-token distributions of two models are apart, and how much K/V stays visible.

Logits are arrays of numpy or tensors of torch, [n, n_vocab]. Arrays are compared in float64,
tensors in float32 on their device. torch is imported only where a tensor is given.

    kl, nll_dense, nll_mod, same = divergence(dense, mod, ids) / (len(ids) - 1)
    share = visible_share(config, active, windows)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mod_export.config import MoDConfig
from mod_export.units import KV, UNIT_KINDS

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

# Rows of logits that are compared at a time. A row of 150k float64 has 1.2 MB.
FLOAT64_ROWS = 128
FLOAT32_ROWS = 256
JUMPS_SHARE = 0.05  # of the tokens, see mean_without_jumps


def log_probabilities(logits: Array) -> Array:
    """Log-softmax over the vocabulary, [n, n_vocab]."""
    if not isinstance(logits, np.ndarray):
        return logits.float().log_softmax(-1)
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p, q) of each row in nats, [n], from log probabilities [n, n_vocab]."""
    p = np.exp(log_p) if isinstance(log_p, np.ndarray) else log_p.exp()
    return (p * (log_p - log_q)).sum(-1)


def negative_log_likelihood(log_p: Array, targets: Array) -> Array:
    """-log p(target) of each row, [n]. targets: token ids [n]."""
    if isinstance(log_p, np.ndarray):
        return -np.take_along_axis(log_p, targets[:, None], -1)[:, 0]
    return -log_p.gather(1, targets[:, None].to(log_p.device))[:, 0]


def divergence_sums(reference: Array, other: Array | None, targets: Array | None) -> Array:
    """Return four sums over rows of logits [n, n_vocab], float64 [4].

    The sums are the KL of reference and other, the negative log likelihood of reference, the
    negative log likelihood of other, and the number of rows with the same best token.

    targets: the tokens [n] that follow. A sum whose `other` or `targets` is None is 0.
    """
    log_p = log_probabilities(reference)
    sums = [0.0, 0.0, 0.0, 0.0]
    if targets is not None:
        sums[1] = float(negative_log_likelihood(log_p, targets).sum())
    if other is not None:
        if not isinstance(reference, np.ndarray):
            other = other.to(log_p.device)
        log_q = log_probabilities(other)
        sums[0] = float(kl_divergence(log_p, log_q).sum())
        if targets is not None:
            sums[2] = float(negative_log_likelihood(log_q, targets).sum())
        sums[3] = float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return _float64_like(reference, sums)


def divergence(reference: Array, other: Array, ids: Array | None = None) -> Array:
    """The sums of divergence_sums over a text, some rows at a time.

    reference, other: logits [T, n_vocab]. ids: tokens [T] of the text; the last position does not
    count, as no token follows. Without ids all positions count, and both likelihoods are 0.
    """
    n = len(reference) if ids is None else len(ids) - 1
    step = FLOAT64_ROWS if isinstance(reference, np.ndarray) else FLOAT32_ROWS
    sums = _float64_like(reference, [0.0, 0.0, 0.0, 0.0])
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        targets = None if ids is None else ids[start + 1 : rows.stop + 1]
        sums += divergence_sums(reference[rows], other[rows], targets)
    return sums


def compare_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Four figures for each row of logits [T, n_vocab], float64 [T, 4].

    KL(a, b) in nats, whether the best token is the same, mean and largest difference of the logits.
    """
    blocks = [np.zeros((0, 4))]
    for start in range(0, len(a), FLOAT64_ROWS):
        rows = slice(start, start + FLOAT64_ROWS)
        log_p = log_probabilities(a[rows])
        log_q = log_probabilities(b[rows])
        difference = np.abs(a[rows].astype(np.float64) - b[rows].astype(np.float64))
        figures = [
            kl_divergence(log_p, log_q),
            a[rows].argmax(-1) == b[rows].argmax(-1),
            difference.mean(-1),
            difference.max(-1),
        ]
        blocks.append(np.column_stack(figures))
    return np.concatenate(blocks)


def mean_without_jumps(values: Sequence[float] | np.ndarray, experts: bool) -> float:
    """The mean of a figure over tokens [n], which grows where two models differ; NaN if one is NaN.

    experts: whether the models are mixtures of experts. Where rounding decides between two experts,
    a token goes through another FFN, so the JUMPS_SHARE of the tokens that differ most do not count
    then.
    """
    values = np.sort(values)  # NaN are sorted to the end
    n_jumps = round(JUMPS_SHARE * len(values)) if experts and not np.isnan(values).any() else 0
    return float(values[: len(values) - n_jumps].mean())


def visible_share(config: MoDConfig, active: Array, windows: Mapping[int, int]) -> float:
    """Cells whose K/V a next token could see, over those of the dense model; 1 where it has none.

    A cell is of one K/V head where kv units are. active: decisions [n_tokens, n_units], in the
    order of config.routed(). windows: layer with K/V of its own -> tokens that it attends to, 0:
    all of them.
    """
    is_active = np.asarray(active, dtype=bool)
    n_tokens = len(is_active)
    positions = np.arange(n_tokens)
    seen = {
        window: positions >= n_tokens + 1 - window if window else np.ones(n_tokens, dtype=bool)
        for window in set(windows.values())
    }
    heads = config.heads(KV)
    dense = {layer: np.tile(seen[window], (heads, 1)) for layer, window in windows.items()}
    visible = {layer: cells.copy() for layer, cells in dense.items()}
    for index, unit in enumerate(config.routed()):
        if UNIT_KINDS[unit.kind].frees_kv and unit.layer in visible:
            mask = is_active[:, index]
            if unit.kind == KV:
                # The next token is in its window itself, so one token less of the past is.
                mask = mask | (positions >= n_tokens + 1 - config.window(unit))
            visible[unit.layer][slice(None) if unit.head is None else unit.head] &= mask
    cells, of_dense = (sum(int(x.sum()) for x in masks.values()) for masks in (visible, dense))
    return cells / of_dense if of_dense else 1.0


def _float64_like(array: Array, values: list[float]) -> Array:
    """The values as float64, an array or a tensor as `array` is; on the CPU."""
    if isinstance(array, np.ndarray):
        return np.array(values)
    import torch

    return torch.tensor(values, dtype=torch.float64)
