"""One forward of a Mixture-of-Depths model: how its units decide, and what they decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from mod_export.model.cache import MoDCache
from mod_export.model.masks import Kept, MaskBuilder
from mod_export.model.router import Router, is_active, rms_norm, threshold_logit
from mod_export.units import KV, Unit

# Distance of the cut below the lowest logit where top-k takes every token.
ALL_ACTIVE_MARGIN = 10.0


class DecisionStrategy:
    """How router logits become decisions, and how decisions act in the dense form.

    This class is the reference: hard decisions by the threshold rule. Top-k selection (TopK) and
    training (training/relaxation.py) replace parts of it.

    on_unit: called with (unit, h, delta) for each block, attn and ffn unit that decides, with its
    input h and what the unit would add, both [B, T, n_embd].
    """

    is_causal = True  # no decision depends on a later token

    def __init__(self, on_unit: Callable | None = None):
        self.on_unit = on_unit

    def check(self, base: nn.Module) -> None:
        """Raise ValueError where the base model is not prepared for this strategy."""

    def divide(
        self, unit: Unit, router: Router, logit: torch.Tensor, shift: float
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Return which tokens pass, [B, T], and the logit that divides them from the others."""
        return is_active(logit, router.threshold, shift), threshold_logit(router.threshold) + shift

    def decided(
        self, state: RoutingState, unit: Unit, logit: torch.Tensor, cut: float | torch.Tensor
    ) -> None:
        """Take note of a decision that a router has made; `state` holds it."""

    def mask(
        self,
        state: RoutingState,
        layer: int,
        mask: torch.Tensor | None,
        stored: torch.Tensor | None,
        kept: Kept | None,
    ):
        """Return the attention mask of a layer; the arguments are those of MaskBuilder.dense."""
        return state.masks.dense(mask, stored, kept)

    def select(
        self, active: torch.Tensor, new: torch.Tensor, old: torch.Tensor | float
    ) -> torch.Tensor:
        """Return `new` [B, T, n_embd] for the active tokens and `old` for the others."""
        return torch.where(active.unsqueeze(-1), new, old)

    def run_layer(self, compute: Callable, h: torch.Tensor):
        """Return compute(h), the output of a decoder layer."""
        return compute(h)


class TopK(DecisionStrategy):
    """The paper's baseline: in each sequence a fixed share of the tokens runs.

    shares: kind -> share of the tokens; other kinds obey the threshold rule. The choice looks at
    later tokens, so a model with it can neither generate nor be exported.
    """

    is_causal = False

    def __init__(self, shares: Mapping[str, float]):
        super().__init__()
        self.shares = dict(shares)

    def divide(
        self, unit: Unit, router: Router, logit: torch.Tensor, shift: float
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        if unit.kind in self.shares:
            return among_top(logit, self.shares[unit.kind])
        return super().divide(unit, router, logit, shift)


@dataclass
class RoutingState:
    """The state of one forward.

    position: [B, T] position of each token in its sequence
    given: decisions [B, T] that replace those of the routers
    force: "active" or "inactive" decides for every unit; None leaves it to the routers
    kv_window, windows: of all kv units, and of those that have their own
    kv_heads, group: of the model, K/V heads that can decide apart and query heads that share one
    additive_masks: see MaskBuilder
    active, logit: [B, T] of each unit that has decided
    gate: [B, T] factor of what a unit adds, only for units where the factor is not 1
    key_bias: [B, T] that relaxed decisions add to the attention scores of keys
    """

    position: torch.Tensor
    routers: dict[Unit, Router] = field(default_factory=dict)
    strategy: DecisionStrategy = field(default_factory=DecisionStrategy)
    sink_tokens: int = 0
    kv_window: int = 1
    windows: Mapping[Unit, int] = field(default_factory=dict)
    kv_heads: int = 1
    group: int = 1
    scale_output: bool = False
    shift: float = 0.0
    force: str | None = None
    given: dict[Unit, torch.Tensor] = field(default_factory=dict)
    cache: MoDCache | None = None
    additive_masks: bool = False
    active: dict[Unit, torch.Tensor] = field(default_factory=dict)
    logit: dict[Unit, torch.Tensor] = field(default_factory=dict)
    gate: dict[Unit, torch.Tensor] = field(default_factory=dict)
    key_bias: dict[Unit, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def masks(self) -> MaskBuilder:
        """What makes the attention masks of this forward."""
        return MaskBuilder(self.position, self.additive_masks, self.group)

    def decide_kept(self, layer: int, h: torch.Tensor) -> Kept | None:
        """Return what the kv units of a layer keep of the residual stream h [B, T, n_embd].

        None: the layer has none, so every token is kept.
        """
        units = [Unit(layer, KV)]
        if not self._is_routed(units[0]):
            units = [Unit(layer, KV, head) for head in range(self.kv_heads)]
        routed = [unit for unit in units if self._is_routed(unit)]
        if not routed:
            return None
        routers = [self.routers[unit] for unit in routed if unit in self.routers]
        x = rms_norm(h, routers[0].eps) if len(routers) > 1 else None
        kept = {unit: self.decide(unit, h, x) for unit in routed}
        every = torch.ones_like(self.position, dtype=torch.bool)
        return Kept(
            torch.stack([kept.get(unit, every) for unit in units], dim=1),
            tuple(self.windows.get(unit, self.kv_window) for unit in units),
        )

    def again(self) -> RoutingState:
        """Return a state in which nothing is decided yet, for the same forward."""
        return replace(self, active={}, logit={}, gate={}, key_bias={})

    def _is_routed(self, unit: Unit) -> bool:
        return unit in self.routers or unit in self.given

    def decide(
        self, unit: Unit, h: torch.Tensor, x: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return which tokens of the residual stream h [B, T, n_embd] are active, [B, T].

        x: h as the routers norm it, where that is known already. None: the unit is not routed, so
        every token runs.
        """
        router = self.routers.get(unit)
        if not self._is_routed(unit):
            return None
        if router is None:
            self.active[unit] = self._choose(unit, None)
            return self.active[unit]
        logit = self.logit[unit] = router(h) if x is None else router(h, x)
        passed, cut = self.strategy.divide(unit, router, logit, self.shift)
        if self.scale_output and self.force is None:
            # A sink below the threshold runs unscaled.
            self.gate[unit] = torch.where(passed, torch.sigmoid(logit), 1.0)
        self.active[unit] = self._choose(unit, passed)
        if self.force is None:
            self.strategy.decided(self, unit, logit, cut)
        return self.active[unit]

    def _choose(self, unit: Unit, passed: torch.Tensor | None) -> torch.Tensor:
        if self.force is not None:
            return torch.full_like(self.position, self.force == "active", dtype=torch.bool)
        if unit in self.given:
            given = self.given[unit].to(device=self.position.device, dtype=torch.bool)
            return given.expand_as(self.position)
        return passed | (self.position < self.sink_tokens)


def among_top(logit: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose in each sequence the `share` of tokens with the highest logits (arXiv 2404.02258).

    logit: [B, T]. Returns the choice, bool [B, T], and the cut, [B, 1]: the logit half way between
    the last active token and the first inactive one.

    The number of active tokens does not depend on the logits. Therefore the gradient of the cut is
    that of the cut which keeps the sum of sigmoid(logit - cut). Without this gradient each token
    would only learn to rise above a cut that rises with it.
    """
    n = logit.shape[-1]
    k = min(max(1, round(share * n)), n)
    best = logit.detach().topk(min(k + 1, n))
    last = best.values[:, k - 1 : k]
    cut = (last + best.values[:, k:]) / 2 if k < n else last - ALL_ACTIVE_MARGIN
    soft = torch.sigmoid(logit.detach() - cut)
    slope = soft * (1 - soft)
    share_of_cut = slope / slope.sum(-1, keepdim=True).clamp(min=1e-12)
    cut = cut + (share_of_cut * (logit - logit.detach())).sum(-1, keepdim=True)
    return torch.zeros_like(logit, dtype=torch.bool).scatter(-1, best.indices[:, :k], True), cut
