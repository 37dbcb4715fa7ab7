"""Hold costs and router inputs of some text in memory.

Many ways to score and fit can then be compared.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from mod_export.calibration.measuring import judged_rows, log_cost
from mod_export.calibration.ridge import Ridge
from mod_export.calibration.routers import PENALTIES, LayerFit, solve
from mod_export.model import architectures
from mod_export.model.router import rms_norm
from mod_export.units import Unit
from scripts.studies.scores import StudyMeter, logistic, with_repetition

logger = logging.getLogger(f"mod_export.{__name__}")  # the handler of mod_export prints it

METHODS = (
    "ridge",
    "ridge per-layer scale",
    "ridge per-layer threshold",
    "ridge other penalty",
    "logistic",
)
OTHER_PENALTIES = {kind: 0.3 if kind == "kv" else 0.01 for kind in PENALTIES}


@dataclass
class Samples:
    """Costs and router inputs of each unit.

    x: router inputs [N, n_embd], float16. cost: score -> [N].
    """

    x: dict
    cost: dict


def collect(base, tokenizer, sequences, kinds: dict, layers, kv_window: int, sinks: int) -> Samples:
    """Measure all scores in `kinds` {kind: scores} on sequences [n, T]."""
    x, cost = {}, {}
    meter, eps = StudyMeter(base, (kv_window,)), architectures.norm_eps(base)
    once = {
        kind: [name for name in names if not name.startswith("repeat_")]
        for kind, names in kinds.items()
    }
    plain = {Unit(layer, kind): names for kind, names in once.items() for layer in layers}
    again = {
        Unit(i, "kv"): [name for name in kinds.get("kv", []) if name.startswith("repeat_")]
        for i in layers
    }
    for number, ids in enumerate(sequences):
        logger.info(f"measuring costs: sequence {number + 1} of {len(sequences)}")
        rows = {kind: judged_rows(kind, len(ids), sinks, kv_window) for kind in kinds}
        for unit, (h, costs) in meter.measure(ids, plain):
            x.setdefault(unit, []).append(rms_norm(h[rows[unit.kind]], eps).half())
            _append(cost, unit, costs, rows[unit.kind])
        if any(again.values()):
            text, context = with_repetition(tokenizer, ids)
            for unit, (_, costs) in meter.measure(text, again, context):
                _append(cost, unit, costs, rows["kv"])
    joined = {
        unit: {n: torch.cat(parts) for n, parts in named.items()} for unit, named in cost.items()
    }
    return Samples({unit: torch.cat(parts) for unit, parts in x.items()}, joined)


def _append(cost: dict, unit, costs: dict, rows: slice) -> None:
    for name, values in costs.items():
        of_window = values.flatten()  # there is one window
        cost.setdefault(unit, {}).setdefault(name, []).append(of_window[rows])


def routers_of(samples: Samples, kind: str, score: str, method: str, target: float) -> dict:
    """Return routers {Unit: (weight, bias)}.

    A common threshold belongs to all methods but the per-layer one.
    """
    units = [unit for unit in samples.x if unit.kind == kind]
    costs = {unit: log_cost(samples.cost[unit][score]) for unit in units}
    if method == "logistic":
        cut = torch.cat(list(costs.values())).quantile(1 - target)
        return {
            u: logistic([(samples.x[u].float(), (costs[u] > cut).float())], PENALTIES[kind] / 4)
            for u in units
        }
    fits = []
    for unit in units:
        y = costs[unit]
        if method == "ridge per-layer scale":
            y = (y - y.mean()) / y.std().clamp(min=1e-6)
        ridge = Ridge(samples.x[unit].shape[1])
        ridge.add(samples.x[unit].float(), y[:, None])
        fits.append(LayerFit([unit], (0,), ridge))
    penalties = OTHER_PENALTIES if "other" in method else PENALTIES
    return solve(fits, {kind: target}, n_token=1, penalties=penalties).routers


def mean_cost(samples: Samples, kind: str, score: str = "gradient") -> dict:
    """Return the mean cost of each unit of a kind: the cost of dropping it, to first order."""
    return {
        unit: named[score].mean().item()
        for unit, named in samples.cost.items()
        if unit.kind == kind
    }
