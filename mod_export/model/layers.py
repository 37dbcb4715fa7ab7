"""Wrap the decoder layers of a model so that tokens can skip them, with no code for any
architecture.

The forwards of a layer and of a few modules in it (hf.LayerParts) are replaced on the instance;
modules and weights keep their names. Each forward of the model has a `Run` (decisions.py), which
decides, and one of two ways of computing:

* dense: every token is computed, masks hide what was not stored, and what a skipping token got is
  thrown away.
  For batches and for gradients.
* sparse (a cache, batch size 1): the active tokens' rows of the hidden states, positions and mask
  are gathered,
  run, and scattered back. With no active token nothing runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mod_export.model.architectures import LayerParts
from mod_export.model.routing import Run, cached_mask, dense_mask


class LayerRouting:
    """The wrapped forwards of one decoder layer; without a `run` they are the plain ones."""

    def __init__(self, index: int, parts: LayerParts):
        self.index = index
        self.run: Run | None = None
        self._patched: list[nn.Module] = []
        self._h: torch.Tensor | None = (
            None  # the residual stream where the current sublayer reads it
        )
        self._ffn_reads_layer_input = parts.ffn_entry is None
        self.attn = parts.attn
        # a module can have two roles; the later wrapper is the outer one
        self._patch(parts.attn, self._attn)
        self._patch(parts.ffn, self._ffn)
        self._patch(parts.attn_out, self._gated("attn"))
        self._patch(parts.ffn_out, self._gated("ffn"))
        if parts.ffn_entry is not None:
            self._patch(parts.ffn_entry, self._enter_ffn)
        self._patch(parts.layer, self._layer)

    def detach(self) -> None:
        """Give the layer its own forwards back."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._patched.clear()

    def _patch(self, module: nn.Module, wrapper: Callable) -> None:
        inner = module.forward
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def forward(*args, **kwargs):
            if self.run is None:
                return inner(*args, **kwargs)
            x, *rest = args if args else (kwargs.pop(names[0]),)
            return wrapper(inner, x, dict(zip(names[1:], rest, strict=False)) | kwargs)

        module.forward = forward
        self._patched.append(module)

    def _layer(self, inner: Callable, h: torch.Tensor, kwargs: dict):
        run = self.run
        if not run.recompute or not torch.is_grad_enabled():
            return self._layer_of(run, inner, h, kwargs)

        def again(h: torch.Tensor):
            # in the backward pass the run is over
            before, self.run = self.run, run
            try:
                return self._layer_of(run, inner, h, dict(kwargs))
            finally:
                self.run = before
                self.attn.__dict__.pop("_mod_keys", None)

        return checkpoint(again, h, use_reentrant=False)

    def _layer_of(self, run: Run, inner: Callable, h: torch.Tensor, kwargs: dict):
        layer = self.index
        self._h = h
        keep = run.decide((layer, "kv"), h)
        block = run.decide((layer, "block"), h)
        attn = run.decide((layer, "attn"), h)
        if self._ffn_reads_layer_input:
            run.decide((layer, "ffn"), h)
        stored = attn if block is None else block
        if run.cache is not None:
            return self._layer_sparse(inner, h, kwargs, keep, stored, skips=block is not None)
        if run.relax is None:
            kwargs["attention_mask"] = dense_mask(run, kwargs.get("attention_mask"), stored, keep)
        elif (keys := run.key_bias(layer)) is not None:
            self.attn.__dict__["_mod_keys"] = keys  # relax.py's attention function finds it there
        out = inner(h, **kwargs)
        self.attn.__dict__.pop("_mod_keys", None)
        return out if block is None else _replace(out, self._end_block(h, _first(out)))

    def _end_block(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        unit = (self.index, "block")
        if self.run.observe is not None:
            self.run.observe(unit, h, y - h)
        if (gate := self.run.gate.get(unit)) is not None:
            y = h + gate.unsqueeze(-1).to(h.dtype) * (y - h)
        if self.run.relax is not None:
            return y  # the gate is 0 where not active, and has a gradient there
        return torch.where(self.run.active[unit].unsqueeze(-1), y, h)

    def _layer_sparse(
        self, inner: Callable, h: torch.Tensor, kwargs: dict, keep, stored, skips: bool
    ):
        """stored: [1, T] tokens that get K/V, None: all; skips: the others do without the whole
        layer.
        """
        run = self.run
        rows = None if stored is None else _rows(stored)
        if rows is not None or keep is not None or run.cache.is_partial(self.index):
            visible = run.cache.begin(
                self.index, rows, None if keep is None else keep[0], run.kv_window
            )
            kwargs["attention_mask"] = cached_mask(run, kwargs.get("attention_mask"), visible, rows)
        if not skips:
            return inner(h, **kwargs)
        if len(rows) == 0:
            return h
        x = h[:, rows]
        y = _first(inner(x, **_gather_positions(kwargs, rows)))
        if (gate := run.gate.get((self.index, "block"))) is not None:
            y = x + gate[:, rows].unsqueeze(-1).to(h.dtype) * (y - x)
        return h.index_copy(1, rows, y)

    def _attn(self, inner: Callable, x: torch.Tensor, kwargs: dict):
        return self._run_sparse("attn", inner, x, kwargs, nothing=(torch.zeros_like(x), None))

    def _ffn(self, inner: Callable, x: torch.Tensor, kwargs: dict):
        return self._run_sparse("ffn", inner, x, kwargs, nothing=torch.zeros_like(x))

    def _run_sparse(self, kind: str, inner: Callable, x: torch.Tensor, kwargs: dict, nothing):
        """With a cache: run the sublayer for the active rows of x [1, T, n_embd]; 0 elsewhere."""
        active = self.run.active.get((self.index, kind))
        if active is None or self.run.cache is None:
            return inner(x, **kwargs)
        rows = _rows(active)
        if len(rows) == 0:
            return nothing
        out = inner(x[:, rows], **_gather_positions(kwargs, rows))
        return _replace(out, torch.zeros_like(x).index_copy(1, rows, _first(out)))

    def _enter_ffn(self, inner: Callable, h: torch.Tensor, kwargs: dict):
        self._h = h
        self.run.decide((self.index, "ffn"), h)
        return inner(h, **kwargs)

    def _gated(self, kind: str) -> Callable:
        """A wrapper of the last module before the residual sum: what the unit adds, exactly 0 where
        not active.
        """
        unit = (self.index, kind)

        def gated(inner: Callable, x: torch.Tensor, kwargs: dict):
            out = inner(x, **kwargs)
            run = self.run
            if unit not in run.active:
                return out
            delta = _first(out)
            if run.observe is not None:
                run.observe(unit, self._h, delta)
            if (gate := run.gate.get(unit)) is not None:
                delta = gate.unsqueeze(-1).to(delta.dtype) * delta
            if run.relax is not None:
                return _replace(out, delta)
            return _replace(out, torch.where(run.active[unit].unsqueeze(-1), delta, 0.0))

        return gated


def _rows(active: torch.Tensor) -> torch.Tensor:
    return active[0].nonzero()[:, 0]


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _replace(out, value: torch.Tensor):
    return (value, *out[1:]) if isinstance(out, tuple) else value


def _gather_positions(kwargs: dict, rows: torch.Tensor) -> dict:
    """kwargs with positions cut to `rows`: ids [.., T], embeddings [.., T, head_dim]. The mask is
    cut already.
    """

    def cut(value):
        if isinstance(value, (tuple, list)):
            return tuple(cut(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        return value[..., rows, :] if value.is_floating_point() else value[..., rows]

    return {name: cut(value) if "position" in name else value for name, value in kwargs.items()}
