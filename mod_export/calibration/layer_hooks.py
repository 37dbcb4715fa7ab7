"""See inside decoder layers while they run: the residual stream, what sublayers add, queries, keys
and values.

Works for any architecture: hooks on the parts that hf.py finds, and an attention function in the
registry of transformers, which every model calls after it has applied its position encoding.

    with prepared(base), observing(part) as seen:
        part.layer(h, **kwargs)
    seen.attn, seen.query   # [T, n_embd], [n_head, T, head_dim]
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mod_export.model import architectures

_NAME = "mod_observe"  # of our attention function in the registry of transformers


@dataclass
class Seen:
    """One layer's run. h, mid: input of the layer and of its FFN; attn, ffn, out: what is added;
    all [T, n_embd].

    query, key, value, mixed: [n_head, T, head_dim], position-encoded, mixed the attention's output
    before W_o; scaling, mask [T, T] or None (causal), softcap: of the scores.
    """

    h: torch.Tensor = None
    mid: torch.Tensor = None
    attn: torch.Tensor = None
    ffn: torch.Tensor = None
    out: torch.Tensor = None
    query: torch.Tensor = None
    key: torch.Tensor = None
    value: torch.Tensor = None
    mixed: torch.Tensor = None
    scaling: float = 1.0
    mask: torch.Tensor | None = None
    softcap: float | None = None

    def enter_layer(
        self, h: torch.Tensor, out: torch.Tensor, part: architectures.LayerParts
    ) -> None:
        """Note input and output [1, T, n_embd] of the layer."""
        self.h, self.out = h[0], out[0] - h[0]
        if part.ffn_entry is None:
            self.mid = self.h


def first(out):
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def prepared(base: nn.Module):
    """Freeze the weights and put our attention function in; undo both."""
    register()
    frozen = [p for p in base.parameters() if p.requires_grad]
    before = base.config._attn_implementation
    for p in frozen:
        p.requires_grad_(False)
    base.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
        for p in frozen:
            p.requires_grad_(True)


@contextmanager
def observing(part: architectures.LayerParts):
    """Fill a Seen while one layer runs."""
    global _seen
    seen = _seen = Seen()

    def enter(_module, args, kwargs):
        seen.mid = (args[0] if args else kwargs["hidden_states"])[0]

    # the batch axis is cut by a view of the output; its gradient is asked for, so the view must be
    # in the graph
    def observe(name: str):
        def hook(_module, _args, out):
            value = first(out)
            setattr(seen, name, value[0])
            kept = getattr(seen, name)[None]
            return (kept, *out[1:]) if isinstance(out, tuple) else kept

        return hook

    hooks = [
        part.attn_out.register_forward_hook(observe("attn")),
        part.ffn_out.register_forward_hook(observe("ffn")),
    ]
    if part.ffn_entry is not None:
        hooks.append(part.ffn_entry.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield seen
    finally:
        _seen = None
        for hook in hooks:
            hook.remove()


_seen: Seen | None = None


def _observed_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention function of transformers that notes its input and output when a layer is
    observed.
    """
    if kwargs.get("softcap") is not None:  # sdpa has none
        inner, mask = (
            sys.modules[type(module).__module__].eager_attention_forward,
            _additive(attention_mask, query),
        )
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as inner

        mask = attention_mask
    out, weights = inner(module, query, key, value, mask, scaling=scaling, **kwargs)
    if _seen is None:
        return out, weights
    n_rep = query.shape[1] // key.shape[1]
    _seen.query = query[0].detach()
    _seen.key, _seen.value = (x[0].detach().repeat_interleave(n_rep, 0) for x in (key, value))
    _seen.mixed = out[0].transpose(0, 1)  # [n_head, T, head_dim], part of the graph
    _seen.scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    _seen.mask = None if attention_mask is None else attention_mask[0, 0]
    _seen.softcap = kwargs.get("softcap")
    return _seen.mixed.transpose(0, 1)[None], weights


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """The form of a mask that eager attention takes: 0 where visible; None is causal."""
    if mask is None:
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()[None, None]
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)


def register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _observed_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
