"""What it would cost to skip: one number for each token and unit, measured on the original model.

Knows nothing of routers. A sequence runs through the model once. Where a score needs gradients, the
inputs of all layers are kept; then each layer runs once more by itself, last layer first, and hands
its gradient to the one
below: memory holds the graph and the attention of one layer only.

    meter = CostMeter(base, kv_window=64) for unit, (h, costs) in meter.measure(ids, {(5, "kv"):
    ["max_value"], (7, "ffn"): ["gradient"]}): ...

Scores of `block`, `attn` and `ffn`, with Δ what the unit adds to the residual stream h:

    size      |Δ| / |h| cosine    1 - cos(h, h + Δ) gradient  (g · Δ)^2, g the gradient of the
    log-likelihood of a next token drawn from the model: averaged over
              draws this is twice the KL that skipping costs, to second order (Fisher information)
    gradient_keys   the same, plus what later queries lose (block and attn store no K/V): `gradient`
    of kv, window 1

Scores of `kv`, from the attention weight a(i, j) of queries i at a distance >= kv_window, over all
heads:

    max, sum              largest, mean attention received max_value, sum_value  weighted by the
    norm of what the key's value adds, |W_o v| max_relative          and divided by the query's |h|
    (KVzip+, as in KVzap, arXiv 2601.07891) gradient              mean over i of (g · δ)^2, δ what
    the attention output loses without this key,
                          a / (1 - a) (o - v) in every head: the same second-order KL as above
    repeat_*              as the first five, the queries being those of a repetition of the whole
    text after itself
                          (the reconstruction target of KVzip, arXiv 2505.23416)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mod_export.calibration.layer_hooks import Seen, first, observing, prepared
from mod_export.errors import UserError
from mod_export.model import architectures
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit

SUBLAYER_SCORES = ("size", "cosine", "gradient")
ATTENTION_SCORES = ("max", "sum", "max_value", "sum_value", "max_relative")
SCORES = {
    KV: (*ATTENTION_SCORES, "gradient", *(f"repeat_{name}" for name in ATTENTION_SCORES)),
    BLOCK: (*SUBLAYER_SCORES, "gradient_keys"),
    ATTN: (*SUBLAYER_SCORES, "gradient_keys"),
    FFN: SUBLAYER_SCORES,
}
REPEAT_PROMPT = "\n\nRepeat the previous context exactly.\n\n"
_QUERIES = 256  # queries whose attention weights [n_head, _QUERIES, T] are in memory at once


class CostMeter:
    """Runs sequences through `base` and measures costs, layer by layer. Restores the model after
    each sequence.
    """

    def __init__(self, base: nn.Module, kv_window: int, seed: int = 0):
        self.base, self.parts = base, architectures.decoder_layers(base)
        self.kv_window = kv_window
        self.generator = torch.Generator().manual_seed(seed)

    def measure(
        self, ids: torch.Tensor, wanted: dict[Unit, list[str]], context: int = 0
    ) -> Iterator:
        """Yield (unit, (h [T, n_embd], {score: cost [T]})) for each unit in `wanted`.

        ids: [T]. context: where > 0, the `repeat_*` scores are taken on the first `context` tokens
        from the queries after them, and h and costs have that length. Raises UserError for a score
        that the kind does not have.
        """
        wanted = {Unit(*unit): names for unit, names in wanted.items()}
        check_scores(wanted)
        gradients = any(name.startswith("gradient") for names in wanted.values() for name in names)
        with prepared(self.base), torch.set_grad_enabled(gradients):
            yield from (self._downwards if gradients else self._upwards)(ids, wanted, context)

    def _upwards(self, ids: torch.Tensor, wanted: dict[Unit, list[str]], context: int) -> list:
        """Without gradients, all costs are known when a layer has run."""
        found, patched = [], []

        def observe(layer: int, part: architectures.LayerParts) -> None:
            inner = part.layer.forward

            def forward(*args, **kwargs):
                with observing(part) as seen:
                    out = inner(*args, **kwargs)
                seen.enter_layer(args[0] if args else kwargs["hidden_states"], first(out), part)
                units = [unit for unit in wanted if unit.layer == layer]
                found.extend(
                    (unit, self._costs(unit, wanted[unit], seen, None, context)) for unit in units
                )
                return out

            part.layer.forward = forward
            patched.append(part.layer)

        try:
            for layer in {layer for layer, _ in wanted}:
                observe(layer, self.parts[layer])
            self.base(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        finally:
            for module in patched:
                del module.__dict__["forward"]
        return found

    def _downwards(
        self, ids: torch.Tensor, wanted: dict[Unit, list[str]], context: int
    ) -> Iterator:
        """With gradients: from the last layer to the first wanted one."""
        inputs, grad = self._forward(ids)
        for layer in range(len(self.parts) - 1, min(layer for layer, _ in wanted) - 1, -1):
            seen, grads, grad = self._layer(layer, inputs.pop(), grad)
            for unit in [unit for unit in wanted if unit.layer == layer]:
                yield unit, self._costs(unit, wanted[unit], seen, grads, context)

    def _forward(self, ids: torch.Tensor) -> tuple[list, torch.Tensor]:
        """Inputs (args, kwargs) of every layer, and the gradient at the last layer's output."""
        inputs, last = [], []

        def enter(_module, args, kwargs):
            inputs.append((args, kwargs))

        def leave(
            _module, _args, out
        ):  # the graph starts here: the head's gradient ends at the last layer's output
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
            drawn = torch.multinomial(p, 1, generator=self.generator)
            slope = p.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))
        logits.backward(slope[None].to(logits.dtype))
        return inputs, last[0].grad

    def _layer(
        self, layer: int, inputs: tuple, grad: torch.Tensor
    ) -> tuple[Seen, list, torch.Tensor]:
        """Run one layer by itself. Returns what was seen, gradients of (attn, ffn, mixed), gradient
        at its input.
        """
        part, (args, kwargs) = self.parts[layer], inputs
        h = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        with observing(part) as seen:
            out = first(part.layer(h, *args[1:], **rest))
        seen.enter_layer(h, out, part)
        *grads, below = torch.autograd.grad(out, (seen.attn, seen.ffn, seen.mixed, h), grad)
        return seen, grads, below

    @torch.no_grad()
    def _costs(self, unit: Unit, names: list[str], seen: Seen, grads, context: int):
        layer, kind = unit
        entrance = seen.mid if kind == FFN else seen.h
        if kind == KV:
            costs = self._kv_costs(names, seen, grads, self.parts[layer].attn, context)
            return entrance.detach()[: context or None], costs
        return entrance.detach(), {
            name: self._sublayer_cost(kind, name, seen, grads) for name in names
        }

    def _sublayer_cost(self, kind: str, name: str, seen: Seen, grads) -> torch.Tensor:
        h = seen.mid if kind == FFN else seen.h
        delta = {ATTN: seen.attn, FFN: seen.ffn, BLOCK: seen.out}[kind]
        if name == "size":
            return delta.norm(dim=-1) / h.norm(dim=-1).clamp(min=1e-12)
        if name == "cosine":
            return 1 - torch.cosine_similarity(h.double(), (h + delta).double(), dim=-1).float()
        effect = 0.0
        if kind in (ATTN, BLOCK):
            effect = effect + (grads[0] * seen.attn).sum(-1)
        if kind in (FFN, BLOCK):
            effect = effect + (grads[1] * seen.ffn).sum(-1)
        cost = effect.pow(2)
        return (
            cost + received(seen, ["gradient"], 1, grads=grads)["gradient"]
            if name == "gradient_keys"
            else cost
        )

    def _kv_costs(self, names: list[str], seen: Seen, grads, attn: nn.Module, context: int) -> dict:
        plain = [name for name in names if not name.startswith("repeat_")]
        repeat = [name.removeprefix("repeat_") for name in names if name.startswith("repeat_")]
        weight = (
            output_weight(attn)
            if any("value" in name or "relative" in name for name in names)
            else None
        )
        costs = received(seen, plain, self.kv_window, weight, grads) if plain else {}
        if repeat:
            found = received(seen, repeat, 1, weight, first_query=context)
            costs |= {f"repeat_{name}": cost for name, cost in found.items()}
        return {name: cost[: context or None] for name, cost in costs.items()}


def received(
    seen: Seen, names: list[str], window: int, weight=None, grads=None, first_query: int = 0
) -> dict:
    """Costs [T] of losing each key to the queries from `first_query` on at a distance >= window.

    weight: W_o [n_embd, n_head * head_dim]. Means are over those queries; a key that has none costs
    0.
    """
    n_token = seen.key.shape[1]
    costs = {name: torch.zeros(n_token) for name in names}
    norm = value_norm(seen.value, weight) if weight is not None else None
    for start in range(first_query, n_token, _QUERIES):
        rows = slice(start, min(start + _QUERIES, n_token))
        far = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(rows.stop)[None] >= window
        a = attention(seen, rows)
        if "gradient" in names:
            costs["gradient"][: rows.stop] += (_lost(seen, grads[2], a, rows) * far).pow(2).sum(0)
        a = a * far
        _gather_received(costs, a, norm, seen.h[rows].norm(dim=-1), rows.stop)
    queries = (n_token - (torch.arange(n_token) + window).clamp(min=first_query)).clamp(min=1)
    return {
        name: cost if name.startswith("max") else cost / queries for name, cost in costs.items()
    }


def _gather_received(costs: dict, a: torch.Tensor, norm, h_norm: torch.Tensor, stop: int) -> None:
    """Add one block of queries: a [n_head, n_query, stop] attention from far queries, norm [n_head,
    T].
    """
    weighted = a * norm[:, None, :stop] if norm is not None else None
    for name, cost in costs.items():
        if name == "max":
            cost[:stop] = torch.maximum(cost[:stop], a.amax((0, 1)))
        elif name == "sum":
            cost[:stop] += a.sum((0, 1))
        elif name == "max_value":
            cost[:stop] = torch.maximum(cost[:stop], weighted.amax((0, 1)))
        elif name == "sum_value":
            cost[:stop] += weighted.sum((0, 1))
        elif name == "max_relative":
            cost[:stop] = torch.maximum(cost[:stop], (weighted.amax(0) / h_norm[:, None]).amax(0))


def _lost(seen: Seen, grad: torch.Tensor, a: torch.Tensor, rows: slice) -> torch.Tensor:
    """First-order effect [n_query, stop] on the log-likelihood of hiding a key from a query, in all
    heads at once.
    """
    g, mixed = grad[:, rows], seen.mixed[:, rows]
    gap = (g * mixed).sum(-1, keepdim=True) - g @ seen.value[:, : rows.stop].transpose(1, 2)
    return (a / (1 - a).clamp(min=1e-3) * gap).sum(0)


def attention(seen: Seen, rows: slice) -> torch.Tensor:
    """Attention weights [n_head, n_query, rows.stop] of the queries in `rows`."""
    score = seen.query[:, rows] @ seen.key[:, : rows.stop].transpose(1, 2) * seen.scaling
    if seen.softcap:
        score = seen.softcap * torch.tanh(score / seen.softcap)
    future = torch.arange(rows.stop)[None] > torch.arange(rows.start, rows.stop)[:, None]
    if seen.mask is None:
        score = score.masked_fill(future, float("-inf"))
    elif seen.mask.dtype == torch.bool:
        score = score.masked_fill(~seen.mask[rows, : rows.stop], float("-inf"))
    else:
        score = score + seen.mask[rows, : rows.stop]
    return score.float().softmax(-1)


def value_norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """|W_o v| of each head and token [n_head, T]: the norm of what a value adds to the residual
    stream.
    """
    n_head, _, head_dim = value.shape
    by_head = weight.detach().float().view(weight.shape[0], n_head, head_dim).permute(1, 0, 2)
    gram = by_head.transpose(1, 2) @ by_head  # [n_head, head_dim, head_dim]
    return ((value @ gram) * value).sum(-1).clamp(min=0).sqrt()


def output_weight(attn: nn.Module) -> torch.Tensor:
    """The output projection W_o [n_embd, n_head * head_dim] of an attention module."""
    for name in ("o_proj", "out_proj", "dense", "c_proj"):
        if isinstance(module := getattr(attn, name, None), nn.Linear):
            return module.weight
    raise UserError(
        f"{type(attn).__name__} has no known output projection", "use a score that does not need it"
    )


def check_scores(wanted: dict[Unit, list[str]]) -> None:
    """Raise UserError for the first score that its kind of unit does not have."""
    for (_, kind), names in wanted.items():
        for name in names:
            if name not in SCORES[kind]:
                raise UserError(
                    f"unknown score {name!r} for {kind}", f"known: {', '.join(SCORES[kind])}"
                )
