"""Linear modules and attention in float32 on a CPU, by oneDNN instead of torch's own choice (MKL).

On AMD's processors oneDNN multiplies twice as fast; elsewhere the two are alike. Attention comes
some queries at a time, without the keys that they do not see. torch's own takes four times as long
where each head has a mask, and makes a float of each of its bits. Results differ by float noise.

    with FastProducts(), torch.no_grad(): base.model.layers[0](h)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# The operator that torch.compile uses for linear modules on a CPU; a torch without it has F.linear.
_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)
LEAST_ROWS = 16  # of fewer tokens reading the weights takes the time
QUERIES = 256  # whose scores are in memory at once
HIDDEN = 1e30  # less in the score of a key that is not seen


class FastProducts(TorchFunctionMode):
    """Within the block products are computed by oneDNN where that gives the same."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _LINEAR is not None and not torch.is_grad_enabled():
            if func is F.linear and not kwargs and _suits(*args):
                x, weight, *bias = args
                return _LINEAR(x, weight, bias[0] if bias else None, "none", [], "")
            if func is F.scaled_dot_product_attention and _attends(*args, **kwargs):
                return attention(*args, **kwargs)
        return func(*args, **kwargs)


def _suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    plain = all(
        part is None or part.dtype == torch.float32 and part.device.type == "cpu"
        for part in (x, weight, bias)
    )
    return plain and weight.dim() == 2 and x.numel() >= LEAST_ROWS * x.shape[-1]


def _attends(query, key, value, attn_mask=None, dropout_p: float = 0.0, **_more) -> bool:
    """Whether the tensors are of one sequence on a CPU, and it is worth it."""
    if query.device.type != "cpu" or query.dim() != 4 or len(query) > 1 or dropout_p:
        return False
    square = query.shape[2], key.shape[2]
    whole = attn_mask is None or attn_mask.dim() == 4 and attn_mask.shape[2:] == square
    return square[0] == square[1] >= LEAST_ROWS and whole


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b^T of each head, [n, k]; a: [n, d], b: [k, d], float32 on a CPU."""
    return a @ b.T if _LINEAR is None else _LINEAR(a, b, None, "none", [], "")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return what torch's scaled_dot_product_attention gives for one sequence, without dropout.

    query: [1, n_head, T, d]; key, value: [1, n_head or n_head_kv, T, ...]; attn_mask: boolean, or
    added to the scores, [1, n_head or 1, T, T]. Products and softmax are in float32.
    """
    n_token, share = query.shape[2], query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    seen = _keys_seen(attn_mask, is_causal, n_token)
    for head in range(query.shape[1]):
        q = query[0, head].float() * scale
        k, v = (part[0, head // share].float().contiguous() for part in (key, value))
        columns = v.T.contiguous()
        mask = None if attn_mask is None else attn_mask[0, min(head, attn_mask.shape[1] - 1)]
        for start, n_key in zip(range(0, n_token, QUERIES), seen, strict=True):
            rows = slice(start, min(start + QUERIES, n_token))
            scores = products(q[rows], k[:n_key])
            hide(scores, mask, rows, is_causal)
            chances = scores.softmax(-1)
            out[0, head, rows] = products(chances, columns[:, :n_key].contiguous())
    return out


def _keys_seen(mask: torch.Tensor | None, is_causal: bool, n_token: int) -> list[int]:
    """Return for each chunk of queries how many of the keys any of them can see."""
    found = []
    for start in range(0, n_token, QUERIES):
        end = min(start + QUERIES, n_token)
        later = None if mask is None or mask.dtype != torch.bool else mask[..., start:end, end:]
        is_seen = not is_causal and (later is None or bool(later.any()))
        found.append(n_token if is_seen else end)
    return found


def hide(scores: torch.Tensor, mask: torch.Tensor | None, rows: slice, is_causal: bool) -> None:
    """Put a mask [T, T] on the scores [..., n_query, n_key] of some rows, in place, in float32."""
    n_query, n_key = scores.shape[-2:]
    if mask is not None and mask.dtype == torch.bool:
        # Ten times as fast as masked_fill.
        scores += (mask[rows, :n_key].view(torch.uint8).float() - 1) * HIDDEN
    elif mask is not None:
        scores += mask[rows, :n_key]
    if is_causal:
        scores[..., rows] += _later(n_query, scores.device)


@lru_cache(maxsize=2)
def _later(n: int, device: torch.device) -> torch.Tensor:
    """Return what hides the tokens behind each of n, [n, n]: to add it is faster than to fill."""
    return torch.full((n, n), float("-inf"), device=device).triu(1)
