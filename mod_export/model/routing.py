"""One forward of a Mixture-of-Depths model: what decides, what was decided, and which keys that
leaves visible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mod_export.config import Unit
from mod_export.model.cache import MoDCache
from mod_export.model.relaxation import KeyBias, Relax
from mod_export.model.router import Router, is_active, threshold_logit

ALL_ACTIVE = 10.0  # how far below the lowest logit the cut lies where top-k takes every token


@dataclass
class Run:
    """State of one forward.

    position: [B, T] position of each token in its sequence
    given: decisions [B, T] that stand in for those of the routers
    observe: called with (unit, h, delta) for each block, attn and ffn unit of the dense form
    additive_masks: the model's attention adds its mask to the scores (eager) instead of reading a
    boolean (SDPA)
    top_k: kind -> share of a sequence's tokens that run, instead of the threshold (a baseline: not
    causal)
    relax: decisions get a gradient; recompute: layers are computed again in the backward pass
    active, logit: [B, T] of each unit that has decided; gate: [B, T], only where it is not 1
    key: [B, T] of each unit, what is added to the scores of its keys; with `relax` only
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
    top_k: dict[str, float] = field(default_factory=dict)
    relax: Relax | None = None
    recompute: bool = False
    active: dict[Unit, torch.Tensor] = field(default_factory=dict)
    logit: dict[Unit, torch.Tensor] = field(default_factory=dict)
    gate: dict[Unit, torch.Tensor] = field(default_factory=dict)
    key: dict[Unit, torch.Tensor] = field(default_factory=dict)

    def decide(self, unit: Unit, h: torch.Tensor) -> torch.Tensor | None:
        """Residual stream h [B, T, n_embd] -> which tokens are active, [B, T]; None: the unit is an
        ordinary one.
        """
        router = self.routers.get(unit)
        if router is None and unit not in self.given:
            return None
        passed = None
        self.gate.pop(unit, None)  # a layer may be computed again
        if router is not None:
            logit = self.logit[unit] = router(h)
            if unit[1] in self.top_k:
                passed, cut = among_top(logit, self.top_k[unit[1]])
            else:
                passed, cut = is_active(logit, router.threshold, self.shift), None
            if self.scale_output and self.force is None:
                self.gate[unit] = torch.where(
                    passed, torch.sigmoid(logit), 1.0
                )  # a sink below p runs unscaled
        self.active[unit] = self._choose(unit, passed)
        if self.relax is not None and router is not None and self.force is None:
            self._relax(
                unit, logit, threshold_logit(router.threshold) + self.shift if cut is None else cut
            )
        return self.active[unit]

    def _relax(self, unit: Unit, logit: torch.Tensor, cut: float | torch.Tensor) -> None:
        """cut: the logit, of each sequence [B, 1] or of all, that divides active from inactive."""
        z = logit - cut + self.relax.lever.get(unit, 0.0)
        if unit[1] != "kv":
            scale = self.gate.get(unit, 1.0)
            self.gate[unit] = scale * self.relax.gate(z, self.active[unit])
        if unit[1] != "ffn":
            self.key[unit] = self.relax.key(z, self.position < self.sink_tokens)

    def key_bias(self, layer: int) -> KeyBias | None:
        """What the layer's attention adds to its scores, with `relax`; None: nothing."""
        stored, kept = (
            self.key.get((layer, "attn"), self.key.get((layer, "block"))),
            self.key.get((layer, "kv")),
        )
        return None if stored is None and kept is None else KeyBias(stored, kept, self.kv_window)

    def _choose(self, unit: Unit, passed: torch.Tensor | None) -> torch.Tensor:
        if self.force is not None:
            return torch.full_like(self.position, self.force == "active", dtype=torch.bool)
        if unit in self.given:
            return (
                self.given[unit]
                .to(device=self.position.device, dtype=torch.bool)
                .expand_as(self.position)
            )
        return passed | (self.position < self.sink_tokens)

    @cached_property
    def far(self) -> torch.Tensor:
        """[B or 1, T, T]: query (row) and key (column) at least a window apart; the same for all
        layers.
        """
        position = self.position.int()
        if bool((position == position[:1]).all()):
            position = position[:1]
        return position[:, :, None] - position[:, None, :] >= self.kv_window

    @cached_property
    def diagonal(self) -> torch.Tensor:
        return torch.eye(self.position.shape[1], dtype=torch.bool, device=self.position.device)

    @cached_property
    def causal(self) -> torch.Tensor:
        return torch.ones_like(self.diagonal).tril()


def among_top(logit: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The `share` of each sequence's tokens with the highest logits, [B, T]: the top-k of MoD
    (arXiv 2404.02258).

    Also the cut, [B, 1]: the logit half way between the last that is active and the first that is
    not. As many run whatever the logits are, so its gradient is that of the cut which keeps the sum
    of sigmoid(logit - cut): without it each token would only be told to rise above a cut that rises
    with it.
    """
    n = logit.shape[-1]
    k = min(max(1, round(share * n)), n)
    best = logit.detach().topk(min(k + 1, n))
    last = best.values[:, k - 1 : k]
    cut = (last + best.values[:, k:]) / 2 if k < n else last - ALL_ACTIVE
    soft = torch.sigmoid(logit.detach() - cut)
    slope = soft * (1 - soft)
    share_of_cut = slope / slope.sum(-1, keepdim=True).clamp(min=1e-12)
    cut = cut + (share_of_cut * (logit - logit.detach())).sum(-1, keepdim=True)
    return torch.zeros_like(logit, dtype=torch.bool).scatter(-1, best.indices[:, :k], True), cut


def dense_mask(run: Run, mask: torch.Tensor | None, stored, keep) -> torch.Tensor | None:
    """The model's own mask [B or 1, 1, T, T] (None: causal) with the keys hidden that a query must
    not see.

    stored, keep: [B, T] or None. The diagonal stays visible: an inactive query is thrown away in
    any case, and a row without a key would be NaN. Where nothing is hidden the mask is the model's
    own, so results stay the same.
    """
    hidden = None
    if stored is not None and not bool(stored.all()):
        hidden = ~stored[:, None, :]
    if keep is not None and not bool(keep.all()):
        forgotten = ~keep[:, None, :] & run.far
        hidden = forgotten if hidden is None else hidden | forgotten
    if hidden is None:
        return mask
    visible = ~hidden
    if mask is None:
        return _as_mask(run, (visible & run.causal | run.diagonal)[:, None])
    return _combine(mask, (visible | run.diagonal)[:, None])


def cached_mask(
    run: Run, mask: torch.Tensor | None, visible: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """The model's own mask over all positions, cut to active rows and stored cells, and `visible`
    [n_rows, n_cells].
    """
    if mask is None:
        return _as_mask(run, visible[None, None])
    mask = mask if rows is None else mask[:, :, rows]
    return _combine(mask[..., run.cache.cell_positions], visible[None, None])


def _combine(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _as_mask(run: Run, visible: torch.Tensor) -> torch.Tensor:
    if not run.additive_masks:
        return visible
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(
        ~visible, torch.finfo(torch.float32).min
    )
