"""The attention of a transformers model: what it computes, and how to replace it for a while.

Every model calls the attention function that its configuration names, after it has applied its
position encoding. So one registered function serves every architecture. Training reads biases of
keys there (training/relaxation.py), and calibration reads queries, keys and values
(calibration/layer_hooks.py).

    with replaced_attention(base, "mod_relaxed", function):
        base(input_ids)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from mod_export.errors import UserError


@contextmanager
def replaced_attention(base: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Let `base` call `function` as its attention within the context.

    name: of the function in the registry of transformers. The function takes (inner, module, query,
    key, value, attention_mask, scaling=None, **kwargs) and returns (output, weights), where `inner`
    is what `inner_attention` returns. The masks that the model makes are those of SDPA: boolean,
    or None for a causal mask.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, partial(function, inner_attention(base)))
    AttentionMaskInterface.register(name, sdpa_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def has_attention(base: nn.Module, name: str) -> bool:
    """Return whether the attention of `base` is the registered function of that name."""
    return base.config._attn_implementation == name


def inner_attention(base: nn.Module) -> Callable:
    """Return the attention that `base` computes, as a function that takes masks of every form.

    It is SDPA, or the model's own eager attention where SDPA lacks a part of it, such as attention
    sinks or a softcap of the scores. The function takes (module, query, key, value, attention_mask,
    scaling=None, **kwargs): a boolean mask, one that is added to the scores, or None for a causal
    mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward if base._supports_sdpa else _eager_attention


def _eager_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise UserError(
            f"{type(module).__name__} has no attention function that can be called by itself",
            "use a model whose attention transformers lets others replace",
        )
    mask = additive_mask(attention_mask, query, key)
    return own(module, query, key, value, mask, scaling=scaling, **kwargs)


def additive_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Return the form of a mask that eager attention takes: what is added to the scores.

    mask: boolean, additive already, or None for a causal mask. query: [B, n_head, T, head_dim].
    """
    if mask is None:
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    none = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, none, torch.finfo(query.dtype).min)
