"""What it would cost to skip: one number for each token and unit, measured on the original model.

Knows nothing of routers. A sequence runs through the model once. Where a score needs gradients, the
inputs of all layers are kept. Then each layer runs once more by itself, last layer first, and hands
its gradient to the layer below: memory holds the graph and the attention of one layer only.

    meter = CostMeter(base, windows=(64,))
    for unit, (h, costs) in meter.measure(ids, {(5, "kv", 0): ["max_relative"]}):
        costs["max_relative"]                                        # kv: [n_window, T], else [T]

Scores of `block`, `attn` and `ffn`, with Δ what the unit adds to the residual stream h:

* size: |Δ| / |h|
* gradient: (g · Δ)^2, with g the gradient of the log-likelihood of a next token drawn from the
  model. Averaged over draws this is twice the KL that skipping costs, to second order (Fisher
  information).
* gradient_keys: `gradient`, plus what later queries lose, as `block` and `attn` store no K/V. The
  second part is `gradient` of kv with a window of 1.

Scores of `kv`, from the attention weight a(i, j) of queries i at a distance of at least a window,
over the query heads that share the K/V head of the unit, or over all heads where the unit is not of
one head. The attention of a layer is computed once, whatever the number of its units and windows:

* max_relative: the largest attention received, weighted by the norm of what the key's value adds,
  |W_o v|, and divided by the query's |h| (KVzip+, as in KVzap, arXiv 2601.07891)
* gradient: the mean over i of (g · δ)^2, with δ what the attention output loses without this key,
  a / (1 - a) (o - v) in every head. This is the same second-order KL as above.

scripts/studies/scores.py has the scores that these were chosen from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mod_export.calibration.layer_hooks import LayerObserver, LayerRecord, first
from mod_export.errors import UserError
from mod_export.model import architectures
from mod_export.model.fast_products import hide
from mod_export.model.layer_walk import LayerWalk
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit

SCORES = {
    KV: ("max_relative", "gradient"),
    BLOCK: ("size", "gradient", "gradient_keys"),
    ATTN: ("size", "gradient", "gradient_keys"),
    FFN: ("size", "gradient"),
}
QUERY_BLOCK = 256  # queries whose attention weights [n_head, QUERY_BLOCK, T] are in memory at once


@dataclass
class QueryBlock:
    """What a block of queries tells of the keys before them, in n_unit groups of heads.

    attention: [n_unit, n_head, n_query, n_key], with the heads of one group. h_norm: [n_query].
    value_norm: [n_unit, n_head, n_key], |W_o v|, where a score needs it. lost: [n_unit, n_query,
    n_key], the first-order effect of hiding the key in all heads of the group on the
    log-likelihood, where a score needs it.
    """

    attention: torch.Tensor
    h_norm: torch.Tensor
    value_norm: torch.Tensor | None = None
    lost: torch.Tensor | None = None

    @property
    def weighted(self) -> torch.Tensor:
        """The attention, weighted by the norm of what the key's value adds."""
        return self.attention * self.value_norm[:, :, None]


@dataclass(frozen=True)
class KeyScore:
    """A score of `kv` units.

    cost: what each query of a block loses with each key, [n_unit, n_query, n_key]. takes_max: the
    largest over the queries counts; otherwise their mean.
    """

    cost: Callable[[QueryBlock], torch.Tensor]
    takes_max: bool
    needs_values: bool = False
    needs_gradients: bool = False


KEY_SCORES = {
    "max_relative": KeyScore(
        lambda block: block.weighted.amax(1) / block.h_norm[:, None],
        takes_max=True,
        needs_values=True,
    ),
    "gradient": KeyScore(lambda block: block.lost.pow(2), takes_max=False, needs_gradients=True),
}


class CostMeter:
    """Runs sequences through `base` and measures costs, layer by layer.

    The model is as it was after each sequence. windows: the recent tokens that kv units see anyway;
    each window has costs of its own. scores: kind -> names. key_scores: name -> KeyScore.
    """

    scores: Mapping[str, tuple[str, ...]] = SCORES
    key_scores: Mapping[str, KeyScore] = KEY_SCORES

    def __init__(self, base: nn.Module, windows: Sequence[int], seed: int = 0):
        self.base, self.parts = base, architectures.decoder_layers(base)
        self.windows = tuple(windows)
        self.observer = LayerObserver(base)
        self.generator = torch.Generator().manual_seed(seed)
        # Layer -> gradients of its K and V, from the later layers that read them.
        self._kv_grads: dict[int, tuple[torch.Tensor, ...]] = {}

    def measure(self, ids: torch.Tensor, wanted: dict[Unit, list[str]]) -> Iterator:
        """Yield (unit, (h [T, n_embd], {score: cost})) for each unit in `wanted`.

        A cost is [n_window, T] for kv units, and [T] for others. The units of one layer come one
        after the other. ids: [T]. Raises UserError for a score that the kind does not have.
        """
        wanted = {Unit(*unit): names for unit, names in wanted.items()}
        self.check_scores(wanted)
        gradients = needs_gradients(wanted.values())
        with self.observer.prepared(), torch.set_grad_enabled(gradients):
            if gradients:
                yield from self._downwards(ids, wanted)
            else:
                yield from self._upwards(ids, wanted)

    def check_scores(self, wanted: Mapping[Unit, Sequence[str]]) -> None:
        """Raise UserError for a score that the kind of a unit does not have."""
        for unit, names in wanted.items():
            for name in names:
                if name not in self.scores[unit.kind]:
                    known = ", ".join(self.scores[unit.kind])
                    raise UserError(f"unknown score {name!r} for {unit.kind}", f"known: {known}")

    def _upwards(self, ids: torch.Tensor, wanted: dict[Unit, list[str]]) -> Iterator:
        """Measure without gradients: all costs of a layer are known when the layer has run."""
        walk = LayerWalk(self.base, [ids])
        for layer in walk.layers(1 + max(unit.layer for unit in wanted)):
            units = {unit: names for unit, names in wanted.items() if unit.layer == layer}
            found, out = self.measure_layer(walk, 0, units)
            walk.keep(0, out)
            yield from found

    @torch.no_grad()
    def measure_layer(
        self, walk: LayerWalk, number: int, units: dict[Unit, list[str]]
    ) -> tuple[list, torch.Tensor]:
        """Run a sequence through the layer where a walk is, within `observer.prepared()`.

        Returns (unit, (h, costs)) of the units, as `measure` yields them, and the layer's output.
        """
        if not units:
            return [], walk.run(number)
        part, h = self.parts[next(iter(units)).layer], walk.h(number)
        with self.observer.layer(part) as record:
            out = walk.run(number, h)
        record.note_layer(h, out, part)
        return self._costs(part, units, record, None), out

    def _downwards(self, ids: torch.Tensor, wanted: dict[Unit, list[str]]) -> Iterator:
        """Measure with gradients, from the last layer to the first wanted one."""
        inputs, grad = self._forward(ids)
        self._kv_grads = {}
        for layer in range(len(self.parts) - 1, min(unit.layer for unit in wanted) - 1, -1):
            record, grads, grad = self._layer(layer, inputs.pop(), grad)
            units = {unit: names for unit, names in wanted.items() if unit.layer == layer}
            yield from self._costs(self.parts[layer], units, record, grads)

    def _forward(self, ids: torch.Tensor) -> tuple[list, torch.Tensor]:
        """Return the inputs (args, kwargs) of every layer, and the gradient at the last output."""
        inputs, last = [], []

        def enter(_module, args, kwargs):
            inputs.append((args, kwargs))

        def leave(_module, _args, out):
            # The graph starts here: the head's gradient ends at the last layer's output.
            last.append(first(out).detach().requires_grad_(True))
            return (last[0], *out[1:]) if isinstance(out, tuple) else last[0]

        hooks = [
            part.layer.register_forward_pre_hook(enter, with_kwargs=True) for part in self.parts
        ]
        hooks.append(self.parts[-1].layer.register_forward_hook(leave))
        try:
            logits = self.base(input_ids=ids[None], use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        with torch.no_grad():  # d log p(drawn token) / d logits = one-hot - p
            p = logits[0].float().softmax(-1)
            drawn = torch.multinomial(p.cpu(), 1, generator=self.generator).to(p.device)
            slope = p.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))
        logits.backward(slope[None].to(logits.dtype))
        return inputs, last[0].grad

    def _layer(
        self, layer: int, inputs: tuple, grad: torch.Tensor
    ) -> tuple[LayerRecord, list, torch.Tensor]:
        """Run one layer by itself.

        Returns its record, the gradients of (attn, ffn, mixed), and the gradient at its input.
        """
        part, (args, kwargs) = self.parts[layer], inputs
        h = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        stored: dict[str, tuple[torch.Tensor, ...]] = {}
        leaves: tuple[torch.Tensor, ...] = ()
        if part.kv_source is not None:
            read = rest["shared_kv_states"]
            rest["shared_kv_states"] = own = {
                kind: tuple(x.detach().requires_grad_(True) for x in pair)
                for kind, pair in read.items()
            }
            leaves = tuple(x for pair in own.values() for x in pair)
        elif layer in self._kv_grads:
            rest["shared_kv_states"] = stored
        with self.observer.layer(part) as record:
            out = first(part.layer(h, *args[1:], **rest))
        record.note_layer(h, out, part)
        ends = [out], [grad]
        if stored:
            (pair,) = stored.values()
            ends = [out, *pair], [grad, *self._kv_grads.pop(layer)]
        points = (record.attn, record.ffn, record.mixed, h, *leaves)
        there = [x for x in points if x is not None]  # a layer need not have all of them
        found = iter(torch.autograd.grad(ends[0], there, ends[1], allow_unused=bool(leaves)))
        grads = [None if x is None else next(found) for x in points]
        self._add_kv_grads(part.kv_source, [x for x in grads[4:] if x is not None])
        return record, list(grads[:3]), grads[3]

    def _add_kv_grads(self, source: int | None, grads: Sequence[torch.Tensor]) -> None:
        """Note the gradients of the K and V of layer `source`, from a layer that reads them."""
        if source is not None:
            before = self._kv_grads.get(source, (0.0, 0.0))
            self._kv_grads[source] = tuple(a + b for a, b in zip(before, grads, strict=True))

    @torch.no_grad()
    def _costs(
        self,
        part: architectures.LayerParts,
        units: dict[Unit, list[str]],
        record: LayerRecord,
        grads: list | None,
    ) -> list[tuple[Unit, tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
        """Return (unit, (h, costs)) of the units of one layer."""
        h = {kind: record.mid if kind == FFN else record.h for kind in (KV, BLOCK, ATTN, FFN)}
        of_keys = {unit: names for unit, names in units.items() if unit.kind == KV}
        costs = self.key_costs(of_keys, record, grads, part.attn) if of_keys else {}
        for unit in units.keys() - of_keys.keys():
            names = units[unit]
            costs[unit] = {name: self.unit_cost(unit.kind, name, record, grads) for name in names}
        return [(unit, (h[unit.kind].detach(), costs[unit])) for unit in units]

    def unit_cost(
        self, kind: str, name: str, record: LayerRecord, grads: list | None
    ) -> torch.Tensor:
        """Return a cost [T] of a block, attn or ffn unit."""
        if name == "size":
            h = record.mid if kind == FFN else record.h
            added = {ATTN: record.attn, FFN: record.whole_ffn}
            delta = record.out if kind == BLOCK else added[kind] * record.scale
            return delta.float().norm(dim=-1) / h.float().norm(dim=-1).clamp(min=1e-12)
        effect = 0.0
        if kind in (ATTN, BLOCK):
            effect = effect + (grads[0].float() * record.attn).sum(-1)
        if kind in (FFN, BLOCK):
            effect = effect + (grads[1].float() * record.whole_ffn).sum(-1)
        cost = effect.pow(2)
        if name == "gradient_keys":
            scores = {"gradient": self.key_scores["gradient"]}
            return cost + received(record, scores, (1,), grads=grads)["gradient"][0, 0]
        return cost

    def key_costs(
        self,
        units: dict[Unit, list[str]],
        record: LayerRecord,
        grads: list | None,
        attn: nn.Module,
    ) -> dict[Unit, dict[str, torch.Tensor]]:
        """Return costs [n_window, T] of the kv units of one layer."""
        scores = {name: self.key_scores[name] for names in units.values() for name in names}
        n_unit, weight = self.n_unit(units, record), self.values_weight(scores, attn)
        found = received(record, scores, self.windows, n_unit, weight, grads)
        return {
            unit: {name: found[name][:, unit.head or 0] for name in names}
            for unit, names in units.items()
        }

    @staticmethod
    def n_unit(units: Iterable[Unit], record: LayerRecord) -> int:
        """Return how many kv units the layer of `units` can have: 1, or one for each K/V head."""
        return 1 if all(unit.head is None for unit in units) else record.n_head_kv

    def values_weight(self, scores: Mapping[str, KeyScore], attn: nn.Module):
        """Return the output projection, where a score needs it, or None."""
        needed = any(score.needs_values for score in scores.values())
        return output_weight(attn) if needed else None


def needs_gradients(scores: Iterable[Sequence[str]]) -> bool:
    """Return whether one of the names is that of a score that needs a backward pass."""
    return any(name.startswith("gradient") for names in scores for name in names)


def received(
    record: LayerRecord,
    scores: Mapping[str, KeyScore],
    windows: Sequence[int],
    n_unit: int = 1,
    weight: torch.Tensor | None = None,
    grads: list | None = None,
    first_query: int = 0,
) -> dict[str, torch.Tensor]:
    """Return costs [n_window, n_unit, T] of losing each key to the queries from `first_query` on.

    Queries count at a distance of at least the window. n_unit: groups of heads, each with costs of
    its own. weight: W_o [n_embd, n_head * head_dim]. Means are over those queries; a key that has
    none costs 0.
    """
    if not scores:
        return {}
    n_token, device = record.key.shape[1], record.key.device
    shape = len(windows), n_unit, n_token
    costs = {name: torch.zeros(shape, device=device) for name in scores}
    norm = value_norm(record.value, weight) if weight is not None else None
    gradients = any(score.needs_gradients for score in scores.values())
    for start in range(first_query, n_token, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, n_token))
        a = attention(record, rows)
        block = QueryBlock(
            a.unflatten(0, (n_unit, -1)),
            record.h[rows].float().norm(dim=-1),
            norm[:, : rows.stop].unflatten(0, (n_unit, -1)) if norm is not None else None,
            _lost(record, grads[2], a, rows, n_unit) if gradients else None,
        )
        for name, score in scores.items():
            cost = score.cost(block)
            for number, window in enumerate(windows):
                so_far = costs[name][number, :, : rows.stop]
                _add_far(so_far, cost, rows, window, score.takes_max)
    for name, score in scores.items():
        if not score.takes_max:
            late = torch.arange(n_token) + torch.tensor(windows)[:, None]
            n_late = (n_token - late.clamp(min=first_query)).clamp(min=1)
            costs[name] /= n_late[:, None].to(device)
    return costs


def _add_far(
    so_far: torch.Tensor, cost: torch.Tensor, rows: slice, window: int, takes_max: bool
) -> None:
    """Add a block of queries, as far as they are from the keys, to costs [n_unit, n_key].

    cost: [n_unit, n_query, n_key].
    """
    n_key = max(0, rows.stop - window)  # no query is far from a later key
    near = max(0, rows.start - window + 1)  # the keys before are far from each query
    query = torch.arange(rows.start, rows.stop, device=cost.device)[:, None]
    keys = torch.arange(near, n_key, device=cost.device)
    some = cost[:, :, near:n_key] * (query - keys >= window)
    for part, place in ((cost[:, :, :near], slice(0, near)), (some, slice(near, n_key))):
        if takes_max and part.shape[2]:
            torch.maximum(so_far[:, place], part.amax(1), out=so_far[:, place])
        else:
            so_far[:, place] += part.sum(1)


def _lost(
    record: LayerRecord, grad: torch.Tensor, a: torch.Tensor, rows: slice, n_unit: int
) -> torch.Tensor:
    """Return the first-order effect [n_unit, n_query, n_key] of hiding a key in a group of heads.

    The effect is that on the log-likelihood.
    """
    g, mixed = grad[:, rows].float(), record.mixed[:, rows].float()
    gap = (g * mixed).sum(-1, keepdim=True) - g @ record.value[:, : rows.stop].transpose(1, 2)
    return (a / (1 - a).clamp(min=1e-3) * gap).unflatten(0, (n_unit, -1)).sum(1)


def attention(record: LayerRecord, rows: slice) -> torch.Tensor:
    """Return the attention weights [n_head, n_query, rows.stop] of the queries in `rows`."""
    query = record.query[:, rows] * record.scaling
    score = query @ record.key[:, : rows.stop].transpose(1, 2)
    if record.softcap:
        score = record.softcap * torch.tanh(score / record.softcap)
    hide(score, record.mask, rows, is_causal=record.mask is None)
    if record.sinks is None:
        return score.float().softmax(-1)
    sinks = record.sinks[:, None, None].float().expand(-1, score.shape[1], 1)
    return torch.cat((score, sinks), dim=-1).float().softmax(-1)[..., :-1]


def value_norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return |W_o v| of each head and token [n_head, T].

    This is the norm of what a value adds to the residual stream.
    """
    n_head, _, head_dim = value.shape
    by_head = weight.detach().float().view(weight.shape[0], n_head, head_dim).permute(1, 0, 2)
    gram = by_head.transpose(1, 2) @ by_head  # [n_head, head_dim, head_dim]
    return ((value @ gram) * value).sum(-1).clamp(min=0).sqrt()


def output_weight(attn: nn.Module) -> torch.Tensor:
    """Return the output projection W_o [n_embd, n_head * head_dim] of an attention module."""
    for name in ("o_proj", "out_proj", "dense", "c_proj"):
        module = getattr(attn, name, None)
        if isinstance(module, nn.Linear):
            return module.weight
        if isinstance(module, Conv1D):  # a linear function with its matrix transposed
            return module.weight.T
    raise UserError(
        f"{type(attn).__name__} has no known output projection", "use a score that does not need it"
    )
