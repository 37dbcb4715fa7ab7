"""The attention of a transformers model: what it computes, and how to replace it for a while.

Every model calls the attention function that its configuration names, or torch's SDPA, after it has
applied its position encoding. So one function serves every architecture. Training reads biases of
keys there (training/relaxation.py), and calibration reads queries, keys and values
(calibration/layer_hooks.py).

    with replaced_attention(base, "mod_relaxed", function):
        base(input_ids)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mod_export.errors import UserError
from mod_export.model import architectures

# base model -> name of the function that stands for SDPA in it (`_redirected`)
_REDIRECTED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


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

    if architectures.names_of(base).calls_sdpa:
        with _redirected(base, name, function):
            yield
        return
    AttentionInterface.register(name, partial(function, inner_attention(base)))
    AttentionMaskInterface.register(name, sdpa_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def has_attention(base: nn.Module, name: str) -> bool:
    """Return whether the attention of `base` is the function of that name."""
    return name in (base.config._attn_implementation, _REDIRECTED.get(base))


@contextmanager
def _redirected(base: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """Replace the attention of a model whose attention modules call torch's SDPA themselves."""
    modules = [part.attn for part in architectures.decoder_layers(base)]
    before = [vars(module).get("forward") for module in modules]
    implementation = base.config._attn_implementation
    base.set_attn_implementation("sdpa")
    for module in modules:
        module.forward = _redirecting(module, partial(function, inner_attention(base), module))
    _REDIRECTED[base] = name
    try:
        yield
    finally:
        del _REDIRECTED[base]
        base.set_attn_implementation(implementation)
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _redirecting(module: nn.Module, function: Callable) -> Callable:
    """Return the forward of an attention module in which `function` stands for torch's SDPA."""
    forward = module.forward

    def redirecting(*args, attention_mask=None, **kwargs):
        # The mask need not be a tensor, so it does not go through the module.
        with _Redirection(function, attention_mask):
            return forward(*args, attention_mask=None, **kwargs)

    return redirecting


class _Redirection(TorchFunctionMode):
    """Passes each call of SDPA to a function that has the form of transformers' interface."""

    def __init__(self, function: Callable, mask):
        super().__init__()
        self.function, self.mask = function, mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        out, _ = self.function(query, key, value, self.mask)
        return out.transpose(1, 2)


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
