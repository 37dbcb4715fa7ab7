"""Wrap the decoder layers of a model so that tokens can skip them, with no code for any architecture.

The forward of a layer, of its attention and of its FFN is replaced on the instance; module and weight names stay.
Two ways of running, chosen by the `Run` that model.py sets up for each forward:

* dense: every token is computed, masks hide what was not stored, and what a skipping token got is thrown away.
  For batches and for gradients.
* sparse (a cache, batch size 1): the rows of the active tokens are gathered (hidden states, positions, mask), run,
  and scattered back. With no active token nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mod_export.cache import MoDCache
from mod_export.hf import LayerParts
from mod_export.router import Router, is_active

Unit = tuple[int, str]  # (layer, kind)


@dataclass
class Run:
    """State of one forward: what decides, and what was decided so far.

    position: [B, T] position of each token in its sequence
    given: decisions [B, T] that replace those of the routers
    active, logit: [B, T] of each unit that has decided; gate: [B, T], only where it is not 1
    """

    position: torch.Tensor
    routers: dict[Unit, Router] = field(default_factory=dict)
    sink_tokens: int = 0
    kv_window: int = 1
    scale_output: bool = False
    shift: float = 0.0
    force: str | None = None
    given: dict[Unit, torch.Tensor] = field(default_factory=dict)
    observe: Callable | None = None
    cache: MoDCache | None = None
    additive_masks: bool = False
    active: dict[Unit, torch.Tensor] = field(default_factory=dict)
    logit: dict[Unit, torch.Tensor] = field(default_factory=dict)
    gate: dict[Unit, torch.Tensor] = field(default_factory=dict)

    def decide(self, unit: Unit, h: torch.Tensor) -> torch.Tensor | None:
        """Residual stream h [B, T, n_embd] -> which tokens are active, [B, T]; None: the unit is an ordinary one."""
        router = self.routers.get(unit)
        if router is None and unit not in self.given:
            return None
        passed = None
        if router is not None:
            logit = self.logit[unit] = router(h)
            passed = is_active(logit, router.threshold, self.shift)
        self.active[unit] = active = self._choose(unit, passed)
        if self.scale_output and router is not None and self.force is None:
            self.gate[unit] = torch.where(passed, torch.sigmoid(logit), 1.0)  # a sink below p runs unscaled
        return active

    def _choose(self, unit: Unit, passed: torch.Tensor | None) -> torch.Tensor:
        if self.force is not None:
            return torch.full_like(self.position, self.force == "active", dtype=torch.bool)
        if unit in self.given:
            return self.given[unit].to(device=self.position.device, dtype=torch.bool)
        return passed | (self.position < self.sink_tokens)

    def scale(self, unit: Unit, delta: torch.Tensor) -> torch.Tensor:
        gate = self.gate.get(unit)
        return delta if gate is None else gate.unsqueeze(-1).to(delta.dtype) * delta

    def keep_only_active(self, unit: Unit, delta: torch.Tensor) -> torch.Tensor:
        """What the unit adds to the residual stream: g * delta where active, else exactly 0."""
        return torch.where(self.active[unit].unsqueeze(-1), self.scale(unit, delta), 0.0)


class LayerRouting:
    """The wrapped forwards of one decoder layer. `detach` restores the layer."""

    def __init__(self, index: int, parts: LayerParts):
        self.index = index
        self.run: Run | None = None
        self._patched: list[nn.Module] = []
        self._h: torch.Tensor | None = None  # the layer's input, [B, T, n_embd]
        self._patch(parts.attn, self._attn)
        self._patch(parts.ffn, self._ffn)
        self._patch(parts.attn_out, self._gate_for("attn"))
        self._patch(parts.ffn_out, self._gate_for("ffn"))
        if parts.ffn_entry is not None:
            self._patch(parts.ffn_entry, self._enter_ffn)
        self._ffn_reads_layer_input = parts.ffn_entry is None
        self._patch(parts.layer, self._layer)

    def detach(self) -> None:
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._patched.clear()

    def _patch(self, module: nn.Module, wrapper: Callable) -> None:
        inner = module.forward
        module.forward = lambda *args, **kwargs: (
            inner(*args, **kwargs) if self.run is None else wrapper(inner, *args, **kwargs)
        )
        self._patched.append(module)

    def _layer(self, inner: Callable, hidden_states: torch.Tensor, *args, **kwargs):
        run, layer = self.run, self.index
        keep = run.decide((layer, "kv"), hidden_states)
        block = run.decide((layer, "block"), hidden_states)
        attn = run.decide((layer, "attn"), hidden_states)
        if self._ffn_reads_layer_input:
            run.decide((layer, "ffn"), hidden_states)
        self._h = hidden_states
        stored = block if block is not None else attn
        if run.cache is not None:
            return self._layer_sparse(inner, hidden_states, args, kwargs, keep, stored, block)
        kwargs["attention_mask"] = dense_mask(run, kwargs.get("attention_mask"), stored, keep)
        out = inner(hidden_states, *args, **kwargs)
        if block is None:
            return out
        return _replace(out, self._end_block(hidden_states, _first(out)))

    def _end_block(self, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        run, unit = self.run, (self.index, "block")
        if run.observe is not None:
            run.observe(unit, h, y - h)
        if unit in run.gate:
            y = h + run.scale(unit, y - h)
        return torch.where(run.active[unit].unsqueeze(-1), y, h)

    def _layer_sparse(self, inner: Callable, h: torch.Tensor, args: tuple, kwargs: dict, keep, stored, block):
        run = self.run
        rows = None if stored is None else stored[0].nonzero()[:, 0]
        if rows is not None or keep is not None or run.cache.is_partial(self.index):
            mask = run.cache.begin(self.index, run.position[0], rows, None if keep is None else keep[0], run.kv_window)
            kwargs["attention_mask"] = cached_mask(run, kwargs.get("attention_mask"), mask, rows)
        if block is None:
            return inner(h, *args, **kwargs)
        if len(rows) == 0:
            return h
        x = h[:, rows]
        y = _first(inner(x, *args, **{**kwargs, **_gather(kwargs, rows)}))
        gate = run.gate.get((self.index, "block"))
        if gate is not None:
            y = x + gate[:, rows].unsqueeze(-1).to(h.dtype) * (y - x)
        return h.index_copy(1, rows, y)

    def _attn(self, inner: Callable, *args, **kwargs):
        """Attention; kwargs hold mask and positions. In the sparse form only active rows are run."""
        active = self.run.active.get((self.index, "attn"))
        if active is None or self.run.cache is None:
            return inner(*args, **kwargs)
        rows = active[0].nonzero()[:, 0]
        x, rest = _take_hidden(args, kwargs)
        if len(rows) == 0:
            return torch.zeros_like(x), None
        out = inner(x[:, rows], **{**rest, **_gather(rest, rows)})
        return _replace(out, torch.zeros_like(x).index_copy(1, rows, _first(out)))

    def _ffn(self, inner: Callable, hidden_states: torch.Tensor, *args, **kwargs):
        active = self.run.active.get((self.index, "ffn"))
        if active is None or self.run.cache is None:
            return inner(hidden_states, *args, **kwargs)
        rows = active[0].nonzero()[:, 0]
        if len(rows) == 0:
            return torch.zeros_like(hidden_states)
        out = inner(hidden_states[:, rows], *args, **kwargs)
        return _replace(out, torch.zeros_like(hidden_states).index_copy(1, rows, _first(out)))

    def _enter_ffn(self, inner: Callable, hidden_states: torch.Tensor, *args, **kwargs):
        if (self.index, "ffn") not in self.run.active:
            self._h = hidden_states
            self.run.decide((self.index, "ffn"), hidden_states)
        return inner(hidden_states, *args, **kwargs)

    def _gate_for(self, kind: str) -> Callable:
        def gate(inner: Callable, *args, **kwargs):
            out = inner(*args, **kwargs)
            if (self.index, kind) not in self.run.active:
                return out
            return _replace(out, self._observed(kind, _first(out)))

        return gate

    def _observed(self, kind: str, delta: torch.Tensor) -> torch.Tensor:
        unit = (self.index, kind)
        if self.run.observe is not None:
            self.run.observe(unit, self._h, delta)
        return self.run.keep_only_active(unit, delta)


def dense_mask(run: Run, mask: torch.Tensor | None, stored, keep) -> torch.Tensor | None:
    """The model's own mask [B or 1, 1, T, T] (None: causal) with the keys hidden that a query must not see.

    stored, keep: [B, T] or None. The diagonal stays visible: a query that is not active is thrown away anyway,
    and a row without any key would be NaN.
    """
    hidden = None
    distance = run.position[:, :, None] - run.position[:, None, :]
    if stored is not None and not bool(stored.all()):
        hidden = ~stored[:, None, :]
    if keep is not None and not bool(keep.all()):
        forgotten = ~keep[:, None, :] & (distance >= run.kv_window)
        hidden = forgotten if hidden is None else hidden | forgotten
    if hidden is None:
        return mask
    size = run.position.shape[1]
    visible = ~hidden.expand(-1, size, size)
    diagonal = torch.eye(size, dtype=torch.bool, device=visible.device)
    if mask is None:
        return _as_mask(run, (visible & torch.ones_like(diagonal).tril() | diagonal)[:, None])
    return _combine(mask, (visible | diagonal)[:, None])


def cached_mask(run: Run, mask: torch.Tensor | None, visible: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The model's own mask over all positions, cut to the active rows and stored cells, and `visible` [rows, cells]."""
    if mask is None:
        return _as_mask(run, visible[None, None])
    cells = run.cache.pending_positions
    mask = mask[..., cells] if rows is None else mask[:, :, rows][..., cells]
    return _combine(mask, visible[None, None])


def _combine(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _as_mask(run: Run, visible: torch.Tensor) -> torch.Tensor:
    if not run.additive_masks:
        return visible
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, torch.finfo(torch.float32).min)


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _replace(out, value: torch.Tensor):
    return (value, *out[1:]) if isinstance(out, tuple) else value


def _take_hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, dict]:
    if args:
        return args[0], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), rest


def _gather(kwargs: dict, rows: torch.Tensor) -> dict:
    """The arguments that hold a value for each token, cut to `rows`: ids [.., T] and embeddings [.., T, D]."""

    def cut(value):
        if isinstance(value, (tuple, list)):
            return tuple(cut(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        return value[..., rows, :] if value.is_floating_point() else value[..., rows]

    return {name: cut(value) for name, value in kwargs.items() if "position" in name}
