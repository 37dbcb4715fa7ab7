"""Set routers and thresholds without training: measure costs, fit routers, choose thresholds.

1. Each unit's router is fitted to the logarithm of what skipping would cost (costs.py, ridge.py).
   Where wanted, each kv unit gets the window with which it remembers the fewest tokens.
2. One affine map for all units of a kind turns the predicted log cost into a logit (routers.py). So
   a logit means the same cost in every layer and head, which share the budget as they need it.
3. One quantile over all (token, unit) pairs of a kind gives the threshold (thresholds.py).

docs/log.md has the comparison behind the defaults.

    config, routers = calibrate(base, tokenizer, CalibrationPlan(units={"kv": range(2, 30)}))
    model = MoDModel.from_base(base, tokenizer, config, routers)
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import nn

from mod_export.calibration.costs import CostMeter
from mod_export.calibration.drift import ChunkMeans, router_inputs
from mod_export.calibration.ridge import Ridge
from mod_export.calibration.routers import LayerFit, solve
from mod_export.calibration.thresholds import routing_of, set_thresholds
from mod_export.config import (
    HEAD,
    KV_GRANULARITY,
    KV_WINDOW,
    SINK_TOKENS,
    MoDConfig,
    UnitConfig,
)
from mod_export.data.text import default_texts, pack, tokenize
from mod_export.errors import UserError
from mod_export.model import architectures
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit, deciding_order, shares_by_kind, units_in

logger = logging.getLogger(__name__)

DEFAULT_SCORES = {KV: "max_relative", BLOCK: "size", ATTN: "gradient_keys", FFN: "gradient"}
# The windows that a kv unit gets one of, where each has its own.
OWN_WINDOWS = (16, 32, 64, 128, 256, 512)
# Tokens of a sequence: fewer where the text is short, more for a wide window.
SEQUENCE_TOKENS = 1024
# Tokens of a sequence to see what drifts, as far as the model's context goes.
LONG_TOKENS = 4096
MIN_SEQUENCES = 4
# Keys after this part of a sequence without its last window have too few later queries to judge
# them by.
JUDGED_SHARE = 0.75


@dataclass(frozen=True)
class CalibrationPlan:
    """What to calibrate.

    units: kind -> layers. target: share of (token, unit) pairs that are to run, one number or kind
    -> number. kv_window: None gives each kv unit one of OWN_WINDOWS. kv_granularity: kv units
    decide for each K/V head, where layers have several, or for each layer. text: None
    is the packaged text. scores: kind -> score (costs.SCORES).
    """

    units: Mapping[str, Sequence[int]]
    target: float | Mapping[str, float] = 0.5
    kv_window: int | None = KV_WINDOW
    sink_tokens: int = SINK_TOKENS
    text: str | None = None
    scores: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_SCORES))
    rounds: int = 4
    kv_granularity: str = KV_GRANULARITY

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows that a kv unit can have."""
        return OWN_WINDOWS if self.kv_window is None else (self.kv_window,)

    def heads(self, base: nn.Module, kind: str) -> int:
        """Return how many units of a kind a layer has."""
        by_head = kind == KV and self.kv_granularity == HEAD
        return architectures.kv_heads(base) if by_head else 1

    def layer_units(self, base: nn.Module) -> dict[Unit, list[Unit]]:
        """Return Unit(layer, kind) -> its units, in deciding order."""
        places = [Unit(layer, kind) for kind, layers in self.units.items() for layer in layers]
        found = {}
        for place in sorted(places, key=deciding_order):
            found[place] = units_in(*place, self.heads(base, place.kind))
        return found


@torch.no_grad()
def calibrate(base: nn.Module, tokenizer, plan: CalibrationPlan) -> tuple[MoDConfig, dict]:
    """Return config and routers {Unit: (weight [n_embd], bias [1])}.

    Raises UserError for a text too short, an unknown score, or layers the model does not have.
    """
    sequences, held_out, source = _texts(tokenizer, plan, _sequence_length(base, plan))
    _first_config(base, plan)  # an error is raised before the minutes of work
    fits = measure(base, sequences, plan)
    logger.info("measuring what drifts from one part of a text to the next")
    drifts = drift(base, tokenizer, sequences, plan)
    targets = shares_by_kind(plan.target, plan.units)
    solution = solve(fits, targets, sequences.shape[1], drifts)
    if plan.kv_window is None:
        counts = sorted(Counter(solution.windows.values()).items())
        named = ", ".join(f"{window} ({n})" for window, n in counts)
        logger.info(f"windows of the kv units, and how many have them: {named}")
    first = _first_config(base, plan, solution.windows)
    model = MoDModel.from_base(base, tokenizer, first, solution.routers)
    try:
        subset = sequences[:: math.ceil(len(sequences) / 6)]
        groups = first.by_kind()
        activation = set_thresholds(model, subset, groups, targets, plan.rounds)
        thresholds = {kind: model.router(units[0]).threshold for kind, units in groups.items()}
        logger.info("measuring activation on held-out text")
        _, held = routing_of(model, held_out)
    finally:
        model.detach()
    record = {
        "method": {kind: f"ridge on log {plan.scores[kind]}" for kind in plan.units},
        "target_activation": plan.target,
        "text": source,
        "tokens": sequences.numel(),
        "activation": {kind: _mean(activation, kind) for kind in plan.units},
        "held_out": {
            "tokens": held_out.numel(),
            "activation": {kind: _mean(held, kind) for kind in plan.units},
        },
        "units": [
            {
                "layer": unit.layer,
                "kind": unit.kind,
                **({} if unit.head is None else {"head": unit.head}),
                "activation": round(activation[unit], 4),
                "held_out": round(held[unit], 4),
                "explained": round(solution.explained[unit], 4),
            }
            for unit in first.routed()
        ],
    }
    config = _config(base, plan, thresholds, activation, solution.windows, record)
    return config, solution.routers


def measure(base: nn.Module, sequences: torch.Tensor, plan: CalibrationPlan) -> list[LayerFit]:
    """Run the original model over sequences [n, T], and gather what each router is fitted to."""
    meter = CostMeter(base, plan.windows)
    n_embd, eps = architectures.n_embd(base), architectures.norm_eps(base)
    fits, wanted = {}, {}
    for place, units in plan.layer_units(base).items():
        windows = plan.windows if place.kind == KV else (0,)
        ridge = Ridge(n_embd, len(windows) * len(units))
        fits[place] = LayerFit(units, windows, ridge)
        wanted |= {unit: [plan.scores[unit.kind]] for unit in units}
    for number, ids in enumerate(sequences):
        logger.info(f"measuring costs: sequence {number + 1} of {len(sequences)}")
        measured = groupby(meter.measure(ids, wanted), lambda pair: Unit(*pair[0][:2]))
        for place, of_place in measured:
            rows = judged_rows(place.kind, len(ids), plan.sink_tokens, max(plan.windows))
            x, targets = None, []
            for _, (h, costs) in of_place:
                x = rms_norm(h, eps)[rows] if x is None else x
                (cost,) = costs.values()
                targets.append(torch.stack([log_cost(one[rows]) for one in torch.atleast_2d(cost)]))
            fits[place].ridge.add(x, torch.stack(targets, 1).flatten(0, 1).T)
    return list(fits.values())


def drift(
    base: nn.Module, tokenizer, sequences: torch.Tensor, plan: CalibrationPlan
) -> dict[Unit, torch.Tensor]:
    """Return Unit(layer, kind) -> the drift of the inputs of its routers, [k, n_embd] (drift.py).

    sequences: [n, T], consecutive parts of a text.
    """
    nothing = torch.zeros(architectures.n_embd(base)), torch.zeros(1)
    blank = {unit: nothing for units in plan.layer_units(base).values() for unit in units}
    model = MoDModel.from_base(base, tokenizer, _first_config(base, plan), blank)
    try:
        n, length = sequences.shape
        many = sequences_joined(base, length, n)
        joined = sequences[: n // many * many].reshape(-1, many * length)
        with model.forced("active"):
            found = router_inputs(model, joined, ChunkMeans)
        return {place: seen.drift() for place, seen in found.items()}
    finally:
        model.detach()


def sequences_joined(base: nn.Module, length: int, n: int) -> int:
    """Return how many of n sequences of `length` tokens make one of LONG_TOKENS tokens."""
    return min(n, max(1, min(LONG_TOKENS, architectures.context_length(base) or length) // length))


def judged_rows(kind: str, n_token: int, sink_tokens: int, kv_window: int) -> slice:
    """Return the tokens to fit to: no sinks, and no keys whose later queries are few.

    Sinks are always active.
    """
    late = int(JUDGED_SHARE * (n_token - kv_window)) if kind == KV else n_token
    return slice(sink_tokens, late)


def log_cost(cost: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithm of costs.

    The lowest percent, which may be 0, is raised to the percentile first.
    """
    floor = cost.float().quantile(0.01).clamp(min=1e-20)
    return cost.float().clamp(min=floor.item()).log()


def _mean(activation: dict[Unit, float], kind: str) -> float:
    values = [value for unit, value in activation.items() if unit.kind == kind]
    return round(sum(values) / len(values), 4)


def _first_config(
    base: nn.Module, plan: CalibrationPlan, windows: Mapping[Unit, int] | None = None
) -> MoDConfig:
    """Return the configuration before there are thresholds."""
    return _config(base, plan, dict.fromkeys(plan.units, 0.5), {}, windows or {}, {})


def _config(
    base: nn.Module,
    plan: CalibrationPlan,
    thresholds: Mapping[str, float],
    activation: Mapping[Unit, float],
    windows: Mapping[Unit, int],
    record: dict,
) -> MoDConfig:
    n_layer = len(architectures.decoder_layers(base))
    kv_window = plan.kv_window or max(windows.values(), default=max(plan.windows))
    units = {}
    for kind, layers in plan.units.items():
        if beyond := [layer for layer in layers if not 0 <= layer < n_layer]:
            raise UserError(
                f"there is no layer {beyond[0]}", f"the model has layers 0 to {n_layer - 1}"
            )
        heads = plan.heads(base, kind)
        every = [units_in(layer, kind, heads) for layer in range(n_layer)]
        values = [unit for of_layer in every for unit in of_layer]
        own = kind == KV and plan.kv_window is None
        units[kind] = UnitConfig(
            threshold=tuple(thresholds[kind] if u.layer in layers else 0.0 for u in values),
            activation=tuple(activation.get(unit, 1.0) for unit in values),
            heads=heads,
            window=tuple(windows.get(unit, kv_window) for unit in values) if own else (),
        )
    config = MoDConfig(
        sink_tokens=plan.sink_tokens, kv_window=kv_window, units=units, calibration=record
    )
    return config.validate(n_layer)


def _sequence_length(base: nn.Module, plan: CalibrationPlan) -> int:
    """Return the tokens of a sequence.

    Raises UserError where the model's own context is too short for the window.
    """
    needed = 4 * max(plan.windows) if KV in plan.units else 0
    limit = architectures.context_length(base) or max(SEQUENCE_TOKENS, needed)
    if limit < needed:
        raise UserError(
            f"a window of {max(plan.windows)} is too wide for a context of {limit} tokens",
            f"use --kv-window {limit // 4} or less",
        )
    return min(max(SEQUENCE_TOKENS, needed), limit)


def _texts(tokenizer, plan: CalibrationPlan, length: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return calibration and held-out sequences [n, up to length], and where they are from."""
    if plan.text is None:
        made = []
        for text in default_texts():
            try:
                made.append(pack(tokenizer, text, length))
            except UserError as error:
                raise UserError(
                    f"the packaged text gives no sequence of {length} tokens, which a window of "
                    f"{max(plan.windows)} takes",
                    "use a smaller --kv-window, or give a long --calibration-text",
                ) from error
        return *made, "packaged"
    n_tokens = len(tokenize(tokenizer, plan.text))
    length = min(length, n_tokens // (MIN_SEQUENCES + 1))
    shortest = max(128, 4 * max(plan.windows) if KV in plan.units else 0)
    if length < shortest:
        need = shortest * (MIN_SEQUENCES + 1)
        fits = n_tokens // (MIN_SEQUENCES + 1) // 4
        narrower = f", or use --kv-window {fits} or less" if KV in plan.units and fits >= 32 else ""
        raise UserError(
            f"calibration text too short: {n_tokens} tokens where {need} are needed",
            f"give more text{narrower}",
        )
    sequences = pack(tokenizer, plan.text, length)
    kept = max(1, len(sequences) // 6)  # the end of the user's text is held out
    return sequences[:-kept], sequences[-kept:], "given"
