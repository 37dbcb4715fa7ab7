"""Wrap the decoder layers of a model so that tokens can skip them.

No architecture has code of its own here. The forwards of a layer and of a few modules in it
(architectures.LayerParts) are replaced on the instance; modules and weights keep their names. Each
forward of the model has a RoutingState, which decides. There are two ways to compute a layer:

* dense: every token is computed, masks hide what was not stored, and what a skipping token got is
  thrown away. This is the form for batches and for gradients.
* sparse (a cache, batch size 1): the active tokens' rows of the hidden states, positions and mask
  are gathered, run, and scattered back. With no active token nothing runs.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable

import torch
from torch import nn

from mod_export.model import architectures
from mod_export.model.architectures import LayerParts
from mod_export.model.masks import Kept
from mod_export.model.routing import RoutingState
from mod_export.units import ATTN, BLOCK, FFN, Unit

# The wrapped layers of each base model. A layer's wrappers do not refer to the base model, so an
# entry goes with its base model.
_WRAPPED: weakref.WeakKeyDictionary[nn.Module, list[LayerRouting]] = weakref.WeakKeyDictionary()


def wrap_layers(base: nn.Module) -> list[LayerRouting]:
    """Wrap every decoder layer of `base`. The wrappers of a former call are removed first."""
    unwrap_layers(base, _WRAPPED.get(base, []))
    parts = architectures.decoder_layers(base)
    _WRAPPED[base] = [LayerRouting(index, part) for index, part in enumerate(parts)]
    return _WRAPPED[base]


def unwrap_layers(base: nn.Module, layers: list[LayerRouting]) -> None:
    """Give the decoder layers their own forwards back, unless other wrappers have taken over."""
    for layer in layers:
        layer.detach()
    if _WRAPPED.get(base) is layers:
        del _WRAPPED[base]


def is_wrapped(base: nn.Module) -> bool:
    """Return whether the decoder layers of `base` are wrapped."""
    return base in _WRAPPED


class LayerRouting:
    """The wrapped forwards of one decoder layer, which are the plain ones without a `state`."""

    def __init__(self, index: int, parts: LayerParts):
        self.index = index
        self.state: RoutingState | None = None
        self.recurrent = parts.recurrent
        self._patched: list[nn.Module] = []
        # The residual stream where the current sublayer reads it.
        self._h: torch.Tensor | None = None
        self._ffn_reads_layer_input = parts.ffn_entry is None
        self._scale = parts.residual_scale
        self._returns_tuple = parts.returns_tuple
        self._delta_so_far: torch.Tensor | None = None  # of an FFN of two modules
        self._ffn_returns_scores = parts.ffn_returns_scores
        self._stores_kv = parts.attends and parts.kv_source is None
        # A module can have two roles; the later wrapper is the outer one.
        self._patch(parts.attn, self._attn)
        self._patch(parts.ffn, self._ffn)
        self._patch(parts.attn_out, self._gated(ATTN))
        self._patch(parts.ffn_out, self._gated(FFN, more_follows=parts.ffn_beside is not None))
        self._patch(parts.ffn_beside, self._ffn)
        self._patch(parts.ffn_beside, self._gated(FFN))
        self._patch(parts.ffn_entry, self._enter_ffn)
        self._patch(parts.layer, self._layer)

    def detach(self) -> None:
        """Give the layer its own forwards back."""
        for module in self._patched:
            vars(module).pop("forward", None)
        self._patched.clear()

    def _patch(self, module: nn.Module | None, wrapper: Callable) -> None:
        if module is None:  # the layer has no module of this role
            return
        inner = module.forward
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def forward(*args, **kwargs):
            if self.state is None:
                return inner(*args, **kwargs)
            x, *rest = args if args else (kwargs.pop(names[0]),)
            return wrapper(inner, x, dict(zip(names[1:], rest, strict=False)) | kwargs)

        module.forward = forward
        self._patched.append(module)

    def _layer(self, inner: Callable, h: torch.Tensor, kwargs: dict):
        state, states = self.state, iter([self.state])

        def compute(h: torch.Tensor):
            # A backward pass may compute the layer again, when the forward's state is gone. What is
            # decided then is the same, and must not outlive the layer: all that led to it would.
            before, self.state = self.state, next(states, None) or state.again()
            try:
                return self._compute_layer(inner, h, dict(kwargs))
            finally:
                self.state, self._h = before, None

        return state.strategy.run_layer(compute, h)

    def _compute_layer(self, inner: Callable, h: torch.Tensor, kwargs: dict):
        state, layer = self.state, self.index
        self._h = h
        kept = state.decide_kept(layer, h)
        block = state.decide(Unit(layer, BLOCK), h)
        attn = state.decide(Unit(layer, ATTN), h)
        if self._ffn_reads_layer_input:
            state.decide(Unit(layer, FFN), h)
        stored = attn if block is None else block
        if state.cache is not None:
            return self._layer_sparse(inner, h, kwargs, kept, stored, skips=block is not None)
        kwargs["attention_mask"] = state.strategy.mask(
            state, layer, kwargs.get("attention_mask"), stored, kept
        )
        out = inner(h, **kwargs)
        return out if block is None else _replace(out, self._end_block(h, _first(out)))

    def _end_block(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        state, unit = self.state, Unit(self.index, BLOCK)
        if state.strategy.on_unit is not None:
            state.strategy.on_unit(unit, h, y - h)
        if (gate := state.gate.get(unit)) is not None:
            y = h + gate.unsqueeze(-1).to(h.dtype) * (y - h)
        return state.strategy.select(state.active[unit], y, h)

    def _layer_sparse(
        self, inner: Callable, h: torch.Tensor, kwargs: dict, kept: Kept | None, stored, skips: bool
    ):
        """Run the layer for the tokens that need it.

        kept: of all tokens. stored: [1, T] tokens that get K/V. None stands for all. skips: the
        tokens that are not stored skip the whole layer.
        """
        state = self.state
        rows = None if stored is None else _rows(stored)
        is_partial = self._stores_kv and state.cache.is_partial(self.index)
        if rows is not None or kept is not None or is_partial:
            visible = state.cache.begin(self.index, rows, kept)
            kwargs["attention_mask"] = state.masks.sparse(
                kwargs.get("attention_mask"), visible, rows, state.cache.cell_positions
            )
        if not skips:
            return inner(h, **kwargs)
        if len(rows) == 0:
            return (h, None) if self._returns_tuple else h
        x = h[:, rows]
        out = inner(x, **_gather_rows(kwargs, rows))
        y = _first(out)
        if (gate := state.gate.get(Unit(self.index, BLOCK))) is not None:
            y = x + gate[:, rows].unsqueeze(-1).to(h.dtype) * (y - x)
        return _replace(out, h.index_copy(1, rows, y))

    def _attn(self, inner: Callable, x: torch.Tensor, kwargs: dict):
        return self._run_sparse(ATTN, inner, x, kwargs, nothing=(torch.zeros_like(x), None))

    def _ffn(self, inner: Callable, x: torch.Tensor, kwargs: dict):
        nothing = torch.zeros_like(x)
        return self._run_sparse(
            FFN, inner, x, kwargs, nothing=(nothing, None) if self._ffn_returns_scores else nothing
        )

    def _run_sparse(self, kind: str, inner: Callable, x: torch.Tensor, kwargs: dict, nothing):
        """Run the sublayer; with a cache, for the active rows of x [1, T, n_embd] only."""
        active = self.state.active.get((self.index, kind))
        if active is None or self.state.cache is None:
            return inner(x, **kwargs)
        rows = _rows(active)
        if len(rows) == 0:
            return nothing
        some = x[:, rows]
        out = inner(some, **_gather_rows(kwargs, rows))
        computed = _first(out).view_as(some)  # an FFN may return its rows without the batch axis
        return _replace(out, torch.zeros_like(x).index_copy(1, rows, computed))

    def _enter_ffn(self, inner: Callable, h: torch.Tensor, kwargs: dict):
        self._h = h
        self.state.decide(Unit(self.index, FFN), h)
        return inner(h, **kwargs)

    def _gated(self, kind: str, more_follows: bool = False) -> Callable:
        """Return a wrapper of the last module before the residual sum.

        What the unit adds is exactly 0 for inactive tokens. more_follows: the output of another
        module is added to that of this one.
        """
        unit = (self.index, kind)

        def gated(inner: Callable, x: torch.Tensor, kwargs: dict):
            out = inner(x, **kwargs)
            state = self.state
            if unit not in state.active:
                return out
            delta = _first(out).view_as(x)
            if state.strategy.on_unit is not None:
                so_far, self._delta_so_far = self._delta_so_far, None
                total = delta if so_far is None else so_far + delta
                if more_follows:
                    self._delta_so_far = total
                else:
                    state.strategy.on_unit(unit, self._h, total * self._scale)
            if (gate := state.gate.get(unit)) is not None:
                delta = gate.unsqueeze(-1).to(delta.dtype) * delta
            return _replace(out, state.strategy.select(state.active[unit], delta, 0.0))

        return gated


def _rows(active: torch.Tensor) -> torch.Tensor:
    return active[0].nonzero()[:, 0]


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _replace(out, value: torch.Tensor):
    return (value, *out[1:]) if isinstance(out, tuple) else value


def _gather_rows(kwargs: dict, rows: torch.Tensor) -> dict:
    """Return kwargs with what belongs to single tokens cut to `rows`; the mask is cut already.

    These are positions, as ids [.., T] or embeddings [.., T, head_dim], and the embeddings that a
    layer has of its own, [.., T, n].
    """

    def cut(value):
        if isinstance(value, (tuple, list)):
            return tuple(cut(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        is_ids = not (value.is_floating_point() or value.is_complex())
        return value[..., rows] if is_ids else value[..., rows, :]

    def of_tokens(name: str) -> bool:
        return "position" in name or name == "per_layer_input"

    return {name: cut(value) if of_tokens(name) else value for name, value in kwargs.items()}
