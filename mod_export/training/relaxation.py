"""Decisions that gradients can flow through. Evaluation always uses the hard decisions.

There are two relaxations. Both depend on z, the distance of a logit to the threshold of its unit:

* The gate of `attn`, `ffn` and `block` units is straight-through: forward it is the hard decision,
  backward it has the gradient of sigmoid(z). The delta of every token is computed, so a skipped
  token tells the router what it misses.
* A key of `kv` units, and a key of tokens without K/V in `attn` and `block` units, has a weight:
  log sigmoid((z + noise) / temperature), a Gumbel-sigmoid sample, is added to the attention scores
  of that key. For `kv` units the weight acts beyond the unit's window only, and in the query heads
  that share the K/V head of the unit.

Sources: straight-through estimator, Bengio et al., arXiv 1308.3432; Gumbel-sigmoid as in DMS, arXiv
2506.05345.

    with relaxed_attention(base):
        logits, trace = model(ids, trace=True, strategy=RelaxedDecisions(Relaxation()))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mod_export.model.attention import has_attention, replaced_attention
from mod_export.model.masks import Kept
from mod_export.model.router import Router
from mod_export.model.routing import DecisionStrategy, RoutingState
from mod_export.units import ATTN, BLOCK, KV, UNIT_KINDS, Unit

# The least log weight of a key: exp(-30) is nothing, and -30 is finite.
MIN_LOG_WEIGHT = -30.0
# Queries whose scores are in memory at a time. Later keys are left out, which is half of the work.
CHUNK_QUERIES = 256
_NAME = "mod_relaxed"  # Our attention function has this name in the registry of transformers.


@dataclass(frozen=True)
class Relaxation:
    """How decisions are relaxed.

    temperature: of the samples of keys. noise: without noise the samples are deterministic.
    """

    temperature: float = 0.3
    noise: bool = True

    def gate(self, z: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Return [B, T]: 1 where active, 0 elsewhere, with the gradient of sigmoid(z)."""
        soft = torch.sigmoid(z)
        return active.to(soft.dtype) + (soft - soft.detach())

    def key(self, z: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        """Return [B, T], at most 0: what is added to the scores of a key; 0 for sinks."""
        if self.noise:
            u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
            z = z + torch.log(u) - torch.log1p(-u)
        weight = F.logsigmoid(z / self.temperature)
        return weight.clamp(min=MIN_LOG_WEIGHT).masked_fill(sink, 0.0)


class _DecisionsOfAnother(DecisionStrategy):
    """The decisions of another strategy, by default thresholds, in `relaxed_attention`."""

    def __init__(self, hard: DecisionStrategy | None = None, on_unit: Callable | None = None):
        super().__init__(on_unit)
        self.hard = hard or DecisionStrategy()

    def check(self, base: nn.Module) -> None:
        if not has_attention(base, _NAME):
            raise ValueError(
                "relaxed decisions need the attention of `with relaxed_attention(base)`"
            )

    def divide(
        self, unit: Unit, router: Router, logit: torch.Tensor, shift: float
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        return self.hard.divide(unit, router, logit, shift)


class HardDecisions(_DecisionsOfAnother):
    """The decisions of another strategy, whose masks are made some queries at a time.

    The masks of a whole sequence are what takes most memory where nothing is kept for a backward
    pass: a number for each head and each pair of tokens.
    """

    def mask(self, state: RoutingState, layer: int, mask, stored, kept: Kept | None):
        if stored is not None and bool(stored.all()):
            stored = None
        if kept is not None and bool(kept.keep.all()):
            kept = None
        if stored is None and kept is None:
            return mask
        keys = None if kept is None else _hidden(kept.keep)
        attn = None if stored is None else _hidden(stored)
        return RelaxedMask(mask, KeyBias(attn, keys, kept.windows if kept else ()))


def _hidden(seen: torch.Tensor) -> torch.Tensor:
    """Return what hides the keys that are not seen when it is added to their scores."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))


class RelaxedDecisions(_DecisionsOfAnother):
    """The decisions of another strategy, with a gradient. Use one object for one forward.

    hard: the strategy that makes the hard decisions. group_offset: of units, a zero that is added
    to each z; its gradient is that of all z of the unit together. recompute: layers are computed
    again in the backward pass, which takes less memory.
    """

    def __init__(
        self,
        relaxation: Relaxation,
        hard: DecisionStrategy | None = None,
        group_offset: Mapping[Unit, torch.Tensor] | None = None,
        recompute: bool = False,
        on_unit: Callable | None = None,
    ):
        super().__init__(hard, on_unit)
        self.relaxation = relaxation
        self.group_offset = group_offset or {}
        self.recompute = recompute

    def decided(
        self, state: RoutingState, unit: Unit, logit: torch.Tensor, cut: float | torch.Tensor
    ) -> None:
        kind = UNIT_KINDS[unit.kind]
        z = logit - cut + self.group_offset.get(unit, 0.0)
        if kind.skips_compute:
            scale = state.gate.get(unit, 1.0)
            state.gate[unit] = scale * self.relaxation.gate(z, state.active[unit])
        if kind.frees_kv:
            state.key_bias[unit] = self.relaxation.key(z, state.position < state.sink_tokens)

    def mask(self, state: RoutingState, layer: int, mask, stored, kept: Kept | None):
        attn = state.key_bias.get((layer, ATTN), state.key_bias.get((layer, BLOCK)))
        keys = None if kept is None else _of_heads(state, layer, kept.keep.shape[1])
        if attn is None and keys is None:
            return mask
        return RelaxedMask(mask, KeyBias(attn, keys, kept.windows if kept else ()))

    def select(self, active: torch.Tensor, new: torch.Tensor, old) -> torch.Tensor:
        return new  # the gate is 0 for inactive tokens, and has a gradient there

    def run_layer(self, compute: Callable, h: torch.Tensor):
        if not self.recompute or not torch.is_grad_enabled():
            return compute(h)
        return checkpoint(compute, h, use_reentrant=False)


def _of_heads(state: RoutingState, layer: int, n_head: int) -> torch.Tensor | None:
    """Return what is added to the scores of keys beyond the window, [B, n_head, T].

    n_head: 1, or the K/V heads where they decide apart. A head that is not routed keeps every
    key. None: no router has decided here.
    """
    heads = [Unit(layer, KV, head) for head in range(n_head)]
    found = [state.key_bias.get(unit) for unit in (heads if n_head > 1 else [Unit(layer, KV)])]
    some = next((keys for keys in found if keys is not None), None)
    if some is None:
        return None
    every = torch.zeros_like(some)
    return torch.stack([every if keys is None else keys for keys in found], dim=1)


@dataclass(frozen=True)
class KeyBias:
    """What is added to the attention scores of the keys of one layer.

    stored: [B, T] or None. kept: [B, H, T] or None, where H is the number of K/V heads, or 1; it
    acts beyond the H windows only.
    """

    stored: torch.Tensor | None
    kept: torch.Tensor | None
    windows: tuple[int, ...]

    def rows(self, start: int, stop: int, n_head: int) -> torch.Tensor:
        """Return the additive mask [B, 1 or n_head, stop - start, stop] of the queries start..stop.

        n_head: query heads. A query always sees itself.
        """
        some = self.kept if self.stored is None else self.stored
        at = torch.arange(stop, device=some.device)
        distance = at[start:, None] - at
        bias = some.new_zeros(1, 1, 1, 1)
        if self.stored is not None:
            bias = self.stored[:, None, None, :stop]
        if self.kept is not None:
            far = distance >= torch.tensor(self.windows, device=some.device)[:, None, None]
            bias = bias + torch.where(far, self.kept[:, :, None, :stop], 0.0)
        bias = torch.where(distance == 0, 0.0, bias).masked_fill(distance < 0, float("-inf"))
        n_head_kv = bias.shape[1]
        return bias if n_head_kv == 1 else bias.repeat_interleave(n_head // n_head_kv, dim=1)


@dataclass(frozen=True)
class RelaxedMask:
    """The mask that a layer hands to the relaxed attention: the model's own mask, and the biases.

    mask: boolean [B or 1, 1, T, T], or None for a causal mask.
    """

    mask: torch.Tensor | None
    bias: KeyBias


@contextmanager
def relaxed_attention(base: nn.Module) -> Iterator[None]:
    """Let the model's attention read the key biases of RelaxedDecisions within the context."""
    with replaced_attention(base, _NAME, _attention):
        yield


def _attention(inner, module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Run the model's attention `inner`, a chunk of queries at a time where keys have a bias.

    query: [B, n_head, T, head_dim] -> [B, T, n_head, head_dim].
    """
    if not isinstance(attention_mask, RelaxedMask):
        return inner(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    kwargs.pop("is_causal", None)
    frozen = not any(x.requires_grad for x in (query, key, value))
    if query.is_cuda and torch.is_grad_enabled() and frozen:
        # Otherwise torch's kernel does not keep what the gradient of the bias needs.
        query = query.detach().requires_grad_()
    n, parts = query.shape[2], []
    for start in range(0, n, CHUNK_QUERIES):
        stop = min(start + CHUNK_QUERIES, n)
        bias = attention_mask.bias.rows(start, stop, query.shape[1]).to(query.dtype)
        if attention_mask.mask is not None:
            visible = attention_mask.mask[:, :, start:stop, :stop]
            bias = bias.masked_fill(~visible, float("-inf"))
        some = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], bias)
        parts.append(inner(module, *some, scaling=scaling, is_causal=False, **kwargs)[0])
    return torch.cat(parts, dim=1), None
