"""Record what happens inside decoder layers while the layers run.

A record holds the residual stream, what the sublayers add, queries, keys and values.

This works for any architecture: hooks sit on the parts that architectures.py finds, and the model's
attention is replaced (model/attention.py).

    observer = LayerObserver(base)
    with observer.prepared(), observer.layer(part) as record:
        part.layer(h, **kwargs)
    record.attn, record.query   # [T, n_embd], [n_head, T, head_dim]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mod_export.model.architectures import LayerParts
from mod_export.model.attention import replaced_attention

_NAME = "mod_observe"  # Our attention function has this name in the registry of transformers.


@dataclass
class LayerRecord:
    """What one run of a layer has shown.

    h, mid: [T, n_embd], inputs of the layer and of its FFN
    attn, ffn: [T, n_embd], what attention, or a module with a recurrent state, and FFN give; times
        `scale` it is what they add
    ffn_beside: [T, n_embd], what the second module of an FFN gives; not part of `ffn`
    out: [T, n_embd], what the layer adds
    query, key, value: [n_head, T, head_dim], position-encoded; keys and values of the n_head_kv
        heads are repeated for the query heads that share them
    mixed: [n_head, T, head_dim], the attention's output before W_o
    scaling, mask ([T, T], or None for causal), softcap: of the attention scores
    sinks: [n_head], scores of attention sinks: keys that have no value and are always visible
    """

    h: torch.Tensor | None = None
    mid: torch.Tensor | None = None
    attn: torch.Tensor | None = None
    ffn: torch.Tensor | None = None
    ffn_beside: torch.Tensor | None = None
    scale: float = 1.0
    out: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    n_head_kv: int = 1
    mixed: torch.Tensor | None = None
    scaling: float = 1.0
    mask: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def note_layer(self, h: torch.Tensor, out: torch.Tensor, part: LayerParts) -> None:
        """Note input and output [1, T, n_embd] of the layer."""
        self.h, self.out, self.scale = h[0], out[0] - h[0], part.residual_scale
        if part.ffn is not None and part.ffn_entry is None:
            self.mid = self.h

    @property
    def whole_ffn(self) -> torch.Tensor:
        """What all modules of the FFN give, [T, n_embd]."""
        return self.ffn if self.ffn_beside is None else self.ffn + self.ffn_beside


def first(out):
    """Return the first of several outputs of a module, or its only one."""
    return out[0] if isinstance(out, tuple) else out


class LayerObserver:
    """Records what the layers of one model do, one layer at a time."""

    def __init__(self, base: nn.Module):
        self.base = base
        self._record: LayerRecord | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Freeze the weights and replace the attention; undo both at the end."""
        frozen = [p for p in self.base.parameters() if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        try:
            with replaced_attention(self.base, _NAME, self._attention):
                yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    @contextmanager
    def layer(self, part: LayerParts) -> Iterator[LayerRecord]:
        """Fill a record while one layer runs."""
        record = self._record = LayerRecord()

        def enter_ffn(_module, args, kwargs):
            record.mid = (args[0] if args else kwargs["hidden_states"])[0]

        # A view of the output cuts off the batch axis. Its gradient is asked for, so the view must
        # be in the graph.
        def attn_out(_module, _args, out):
            record.attn = first(out)[0]
            return _with_first(out, record.attn[None])

        # The FFN of some models has no batch axis. Falcon adds to its output in place, which a copy
        # keeps out of the record.
        def ffn_out(_module, _args, out):
            record.ffn = first(out).flatten(0, -2)
            return _with_first(out, record.ffn.clone().view_as(first(out)))

        def ffn_beside(_module, _args, out):
            record.ffn_beside = first(out)[0].detach()

        # A layer need not have all of them.
        places = [
            (part.attn_out, attn_out),
            (part.ffn_out, ffn_out),
            (part.ffn_beside, ffn_beside),
        ]
        hooks = [m.register_forward_hook(hook) for m, hook in places if m is not None]
        if part.ffn_entry is not None:
            hooks.append(part.ffn_entry.register_forward_pre_hook(enter_ffn, with_kwargs=True))
        try:
            yield record
        finally:
            self._record = None
            for hook in hooks:
                hook.remove()

    def _attention(self, inner, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Run the model's attention, and note its input and output where a layer is recorded."""
        out, weights = inner(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        record = self._record
        if record is None:
            return out, weights
        record.n_head_kv = key.shape[1]
        n_rep = query.shape[1] // record.n_head_kv
        # Scores of 16 bits would be coarser than the differences between keys.
        record.query = query[0].detach().float()
        record.key = key[0].detach().float().repeat_interleave(n_rep, 0)
        record.value = value[0].detach().float().repeat_interleave(n_rep, 0)
        record.mixed = out[0].transpose(0, 1)  # [n_head, T, head_dim], part of the graph
        record.scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        record.mask = None if attention_mask is None else attention_mask[0, 0]
        record.softcap = kwargs.get("softcap")
        sinks = kwargs.get("s_aux")
        record.sinks = None if sinks is None else sinks.detach().reshape(-1)
        return record.mixed.transpose(0, 1)[None], weights


def _with_first(out, value: torch.Tensor):
    return (value, *out[1:]) if isinstance(out, tuple) else value
