"""Routers from moments: a fit for each unit, a window for each kv unit, one scale for all.

Everything here is in closed form: what a router predicts is taken as normal, with the mean and the
variance that the moments give. So no input has to be kept.

    fits = [LayerFit([Unit(2, KV, 0), Unit(2, KV, 1)], windows=(128, 256), ridge)]
    solution = solve(fits, {"kv": 0.5}, n_token=2048)
    solution.routers[2, "kv", 1], solution.windows[2, "kv", 1]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from mod_export.calibration.ridge import Ridge
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit

# Penalties of the ridge, against inputs of variance 1.
PENALTIES = {
    KV: 0.01,
    BLOCK: 0.3,
    ATTN: 0.3,
    FFN: 0.3,
}
# Weight of how much a router follows the kind of text and its length (drift.py).
DRIFT_PENALTY = 3.0
# A standard deviation of predicted log cost in logits. With this value p is close to the share
# that is skipped.
LOGIT_SPREAD = 1.7
BISECTIONS = 50


@dataclass(frozen=True)
class LayerFit:
    """What the routers of one layer and kind are fitted to.

    units: those of the layer, which read the same inputs. windows: those that costs of kv units are
    known for; (0,) for other kinds. ridge: its targets are log costs, [n_window * n_unit].
    """

    units: Sequence[Unit]
    windows: Sequence[int]
    ridge: Ridge

    @property
    def place(self) -> Unit:
        """The layer and the kind."""
        return Unit(self.units[0].layer, self.units[0].kind)


@dataclass(frozen=True)
class Candidate:
    """A router that predicts the log cost of a unit beyond a window.

    mean, variance: of what it predicts. explained: share of the variance of the log cost.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    window: int
    mean: float
    variance: float
    explained: float

    @property
    def predicted(self) -> NormalDist:
        """The distribution of what the router predicts."""
        return NormalDist(self.mean, math.sqrt(max(self.variance, 1e-12)))

    def activation(self, cut: float) -> float:
        """Return the share of tokens whose predicted log cost reaches `cut`."""
        return 1 - self.predicted.cdf(cut)

    def cells(self, cut: float, n_token: int) -> float:
        """Return how many tokens of a sequence of n_token are remembered at its end."""
        return self.window + self.activation(cut) * max(0, n_token - self.window)


@dataclass(frozen=True)
class Solution:
    """The routers {unit: (weight [n_embd], bias [1])}, in logits common to all units of a kind.

    windows: of each kv unit. explained: share of the variance of the log cost that each router
    explains. remembered: share of a sequence that each kv unit is expected to remember at its end.
    chosen: the number of the candidate that each unit has. scales: center and factor of each kind,
    with which a predicted log cost becomes a logit.
    """

    routers: dict[Unit, tuple[torch.Tensor, torch.Tensor]]
    windows: dict[Unit, int]
    explained: dict[Unit, float]
    remembered: dict[Unit, float]
    chosen: dict[Unit, int]
    scales: dict[str, tuple[float, float]]


def solve(
    fits: Sequence[LayerFit],
    targets: Mapping[str, float],
    n_token: int,
    drift: Mapping[Unit, torch.Tensor] | None = None,
    drift_penalty: float = DRIFT_PENALTY,
    penalties: Mapping[str, float] = PENALTIES,
) -> Solution:
    """Return the routers of all units.

    targets: activation of each kind. n_token: length of the sequences whose cells the choice of
    windows counts. drift: Unit(layer, kind) -> drift of the inputs [k, n_embd], as drift.py gives
    it; None lets routers follow it. drift_penalty: how much it weighs. penalties: of each kind.
    """
    found = {}
    for fit in fits:
        rows = drift[fit.place] if drift else None
        found[fit.place] = candidates(fit, penalties[fit.place.kind], rows, drift_penalty)
    return choose_all(found, targets, n_token)


def choose_all(
    found: Mapping[Unit, Mapping[Unit, Sequence[Candidate]]],
    targets: Mapping[str, float],
    n_token: int,
) -> Solution:
    """Return one of the candidates of each unit, on one scale. found: place -> unit -> some."""
    solution = Solution({}, {}, {}, {}, {}, {})
    for kind, target in targets.items():
        of_kind = {
            unit: some
            for place, units in found.items()
            if place.kind == kind
            for unit, some in units.items()
        }
        chosen, cut = choose(of_kind, target, n_token)
        center, scale = solution.scales[kind] = common_scale(chosen)
        for unit, one in chosen.items():
            solution.routers[unit] = one.weight * scale, (one.bias - center) * scale
            numbers = [i for i, other in enumerate(of_kind[unit]) if other is one]
            solution.chosen[unit] = numbers[0]
            solution.explained[unit] = one.explained
            if kind == KV:
                solution.windows[unit] = one.window
                solution.remembered[unit] = one.cells(cut, n_token) / n_token
    return solution


def candidates(
    fit: LayerFit,
    penalty: float,
    drift: torch.Tensor | None,
    drift_penalty: float = DRIFT_PENALTY,
) -> dict[Unit, list[Candidate]]:
    """Return the routers of each unit of a layer, one for each window."""
    rows = None if drift is None else drift * math.sqrt(drift_penalty)
    weight, bias = fit.ridge.solve(penalty, rows)
    spread = zip(*(figures.tolist() for figures in fit.ridge.spread(weight, bias)), strict=True)
    found: dict[Unit, list[Candidate]] = {unit: [] for unit in fit.units}
    for number, (one, of_one, figures) in enumerate(zip(weight, bias, spread, strict=True)):
        window, unit = divmod(number, len(fit.units))
        candidate = Candidate(one, of_one.reshape(1), fit.windows[window], *figures)
        found[fit.units[unit]].append(candidate)
    return found


def choose(
    candidates: Mapping[Unit, Sequence[Candidate]], target: float, n_token: int
) -> tuple[dict[Unit, Candidate], float]:
    """Return the router of each unit whose window makes the fewest cells, and the cut.

    The cells are those of tokens whose log cost reaches one cut. The cut is the one at which the
    mean activation of all units is the target.
    """

    def best(cut: float) -> dict[Unit, Candidate]:
        return {
            unit: min(some, key=lambda one: one.cells(cut, n_token))
            for unit, some in candidates.items()
        }

    every = [one.predicted for some in candidates.values() for one in some]
    low = min(one.inv_cdf(1e-6) for one in every)
    high = max(one.inv_cdf(1 - 1e-6) for one in every)
    for _ in range(BISECTIONS):
        cut = (low + high) / 2
        activation = sum(one.activation(cut) for one in best(cut).values()) / len(candidates)
        low, high = (cut, high) if activation > target else (low, cut)
    return best(cut), cut


def common_scale(chosen: Mapping[Unit, Candidate]) -> tuple[float, float]:
    """Return center and factor of the affine map of all routers, from log cost to logits."""
    center = sum(one.mean for one in chosen.values()) / len(chosen)
    variance = sum(one.variance + (one.mean - center) ** 2 for one in chosen.values()) / len(chosen)
    return center, LOGIT_SPREAD / math.sqrt(max(variance, 1e-12))
