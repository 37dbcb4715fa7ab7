"""Set routers and thresholds without training: measure costs, fit routers, choose thresholds.

1. Each unit's router is fitted to the logarithm of what skipping would cost (costs.py, ridge.py).
2. One affine map for all units of a kind turns the predicted log cost into a logit. So a logit
   means the same cost in every layer, and layers share the budget as they need it.
3. One quantile over all (token, unit) pairs of a kind gives the threshold (thresholds.py).

docs/log.md has the comparison behind the defaults.

    config, routers = calibrate(base, tokenizer, CalibrationPlan(units={"kv": range(2, 30)}))
    model = MoDModel.from_base(base, tokenizer, config, routers)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mod_export.calibration.costs import CostMeter
from mod_export.calibration.drift import ChunkMeans, router_inputs
from mod_export.calibration.ridge import Ridge
from mod_export.calibration.thresholds import routing_of, set_thresholds
from mod_export.config import KV_WINDOW, SINK_TOKENS, MoDConfig, UnitConfig
from mod_export.data.text import default_texts, pack, tokenize
from mod_export.errors import UserError
from mod_export.model import architectures
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit, deciding_order, shares_by_kind

logger = logging.getLogger(__name__)

DEFAULT_SCORES = {KV: "max_relative", BLOCK: "size", ATTN: "gradient_keys", FFN: "gradient"}
# Penalties of the ridge, against inputs of variance 1.
PENALTIES = {
    KV: 0.01,
    BLOCK: 0.3,
    ATTN: 0.3,
    FFN: 0.3,
}
# Weight of how much a router follows the kind of text and its length (drift.py).
DRIFT_PENALTY = 3.0
# Tokens of a sequence: fewer where the text is short, more for a wide window.
SEQUENCE_TOKENS = 1024
# Tokens of a sequence to see what drifts, as far as the model's context goes.
LONG_TOKENS = 4096
MIN_SEQUENCES = 4
# A standard deviation of predicted log cost in logits. With this value p is close to the share
# that is skipped.
LOGIT_SPREAD = 1.7
# Keys after this part of a sequence without its last window have too few later queries to judge
# them by.
JUDGED_SHARE = 0.75


@dataclass(frozen=True)
class CalibrationPlan:
    """What to calibrate.

    units: kind -> layers. target: share of (token, unit) pairs that are to run, one number or kind
    -> number. text: None is the packaged text. scores: kind -> score (costs.SCORES).
    """

    units: Mapping[str, Sequence[int]]
    target: float | Mapping[str, float] = 0.5
    kv_window: int = KV_WINDOW
    sink_tokens: int = SINK_TOKENS
    text: str | None = None
    scores: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_SCORES))
    rounds: int = 4

    def routed(self) -> list[Unit]:
        """Units in deciding order."""
        units = [Unit(layer, kind) for kind, layers in self.units.items() for layer in layers]
        return sorted(units, key=deciding_order)


@torch.no_grad()
def calibrate(base: nn.Module, tokenizer, plan: CalibrationPlan) -> tuple[MoDConfig, dict]:
    """Return config and routers {Unit: (weight [n_embd], bias [1])}.

    Raises UserError for a text too short, an unknown score, or layers the model does not have.
    """
    sequences, held_out, source = _texts(tokenizer, plan, _sequence_length(base, plan))
    first = _first_config(base, plan)
    fits = measure(base, sequences, plan)
    logger.info("measuring what drifts from one part of a text to the next")
    routers, explained = solve(fits, drift=drift(base, tokenizer, sequences, plan))
    model = MoDModel.from_base(base, tokenizer, first, routers)
    try:
        subset = sequences[:: math.ceil(len(sequences) / 6)]
        groups = first.by_kind()
        activation = set_thresholds(
            model, subset, groups, shares_by_kind(plan.target, groups), plan.rounds
        )
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
                "activation": round(activation[unit], 4),
                "held_out": round(held[unit], 4),
                "explained": round(explained[unit], 4),
            }
            for unit in plan.routed()
        ],
    }
    return _config(base, plan, thresholds, activation, record), routers


def measure(base: nn.Module, sequences: torch.Tensor, plan: CalibrationPlan) -> dict[Unit, Ridge]:
    """Run the original model over sequences [n, T], and gather what each router is fitted to."""
    meter = CostMeter(base, plan.kv_window)
    wanted = {unit: [plan.scores[unit.kind]] for unit in plan.routed()}
    fits = {unit: Ridge(architectures.n_embd(base)) for unit in wanted}
    eps = architectures.norm_eps(base)
    for number, ids in enumerate(sequences):
        logger.info(f"measuring costs: sequence {number + 1} of {len(sequences)}")
        for unit, (h, costs) in meter.measure(ids, wanted):
            rows = judged_rows(unit.kind, len(h), plan.sink_tokens, plan.kv_window)
            (cost,), x = costs.values(), rms_norm(h, eps)
            fits[unit].add(x[rows], log_cost(cost[rows]))
    return fits


def drift(
    base: nn.Module, tokenizer, sequences: torch.Tensor, plan: CalibrationPlan
) -> dict[Unit, torch.Tensor]:
    """Return the drift of the inputs of each router, [k, n_embd] (drift.py).

    sequences: [n, T], consecutive parts of a text.
    """
    blank = {
        unit: (torch.zeros(architectures.n_embd(base)), torch.zeros(1)) for unit in plan.routed()
    }
    model = MoDModel.from_base(base, tokenizer, _first_config(base, plan), blank)
    try:
        n, length = sequences.shape
        many = sequences_joined(base, length, n)
        joined = sequences[: n // many * many].reshape(-1, many * length)
        with model.forced("active"):
            return {
                unit: seen.drift()
                for unit, seen in router_inputs(model, joined, ChunkMeans).items()
            }
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


def solve(
    fits: dict[Unit, Ridge],
    penalties: Mapping[str, float] = PENALTIES,
    drift_penalty: float = DRIFT_PENALTY,
    drift: Mapping[Unit, torch.Tensor] | None = None,
) -> tuple[dict[Unit, tuple], dict[Unit, float]]:
    """Return routers in logits common to all units of a kind, and the variance each explains.

    drift: of each unit's inputs, as `drift` returns it; None lets routers follow it. drift_penalty:
    how much the drift weighs.
    """
    drifts = {unit: drift[unit] * math.sqrt(drift_penalty) if drift else None for unit in fits}
    routers = {unit: fit.solve(penalties[unit.kind], drifts[unit]) for unit, fit in fits.items()}
    spreads = {unit: fit.spread(*routers[unit]) for unit, fit in fits.items()}
    for kind in {unit.kind for unit in fits}:
        of_kind = [spread for unit, spread in spreads.items() if unit.kind == kind]
        center = sum(mean for mean, _, _ in of_kind) / len(of_kind)
        variance = sum(var + (mean - center) ** 2 for mean, var, _ in of_kind) / len(of_kind)
        scale = LOGIT_SPREAD / math.sqrt(max(variance, 1e-12))
        for unit in [unit for unit in fits if unit.kind == kind]:
            weight, bias = routers[unit]
            routers[unit] = (weight * scale, (bias - center) * scale)
    return routers, {unit: explained for unit, (_, _, explained) in spreads.items()}


def _mean(activation: dict[Unit, float], kind: str) -> float:
    values = [value for unit, value in activation.items() if unit.kind == kind]
    return round(sum(values) / len(values), 4)


def _first_config(base: nn.Module, plan: CalibrationPlan) -> MoDConfig:
    """Return the configuration before there are thresholds."""
    return _config(base, plan, dict.fromkeys(plan.units, 0.5), None, {})


def _config(
    base: nn.Module, plan: CalibrationPlan, thresholds: dict, activation: dict | None, record: dict
) -> MoDConfig:
    n_layer = len(architectures.decoder_layers(base))
    units = {}
    for kind, layers in plan.units.items():
        if beyond := [layer for layer in layers if not 0 <= layer < n_layer]:
            raise UserError(
                f"there is no layer {beyond[0]}", f"the model has layers 0 to {n_layer - 1}"
            )
        units[kind] = UnitConfig(
            threshold=tuple(
                thresholds[kind] if layer in layers else 0.0 for layer in range(n_layer)
            ),
            activation=tuple(
                (activation or {}).get((layer, kind), 1.0) for layer in range(n_layer)
            ),
        )
    config = MoDConfig(
        sink_tokens=plan.sink_tokens, kv_window=plan.kv_window, units=units, calibration=record
    )
    return config.validate(n_layer)


def _sequence_length(base: nn.Module, plan: CalibrationPlan) -> int:
    """Return the tokens of a sequence.

    Raises UserError where the model's own context is too short for the window.
    """
    needed = 4 * plan.kv_window if KV in plan.units else 0
    limit = architectures.context_length(base) or max(SEQUENCE_TOKENS, needed)
    if limit < needed:
        raise UserError(
            f"a window of {plan.kv_window} is too wide for a context of {limit} tokens",
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
                    f"{plan.kv_window} takes",
                    "use a smaller --kv-window, or give a long --calibration-text",
                ) from error
        return *made, "packaged"
    n_tokens = len(tokenize(tokenizer, plan.text))
    length = min(length, n_tokens // (MIN_SEQUENCES + 1))
    shortest = max(128, 4 * plan.kv_window if KV in plan.units else 0)
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
