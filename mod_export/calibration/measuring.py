"""What the original model shows of each layer, in one pass: costs, router inputs, and what drifts.

Two sets of sequences go through the model together, layer by layer (model/layer_walk.py): those
that costs are measured on, and longer ones that show what drifts. When all have passed a layer, its
routers are fitted, and nothing of it is kept but what they say of a sample of the tokens.

Scores of `attn`, `ffn` and `block` that need gradients take a backward pass through the whole
model, which is run before, sequence by sequence.

    for layer in measure_layers(base, sequences, plan):
        layer.fit, layer.drift, layer.sample
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import nn

from mod_export.calibration.costs import CostMeter, needs_gradients
from mod_export.calibration.drift import ChunkMeans
from mod_export.calibration.ridge import Ridge
from mod_export.calibration.routers import LayerFit
from mod_export.common.progress import Progress
from mod_export.config import HEAD, KV_GRANULARITY, KV_WINDOW, SINK_TOKENS
from mod_export.model import architectures
from mod_export.model.layer_walk import LayerWalk
from mod_export.model.router import rms_norm
from mod_export.model.walk_state import WalkState
from mod_export.units import ATTN, BLOCK, FFN, KV, Unit, deciding_order, units_in

logger = logging.getLogger(__name__)

DEFAULT_SCORES = {KV: "max_relative", BLOCK: "size", ATTN: "gradient_keys", FFN: "gradient"}
# The windows that a kv unit gets one of, where each has its own.
OWN_WINDOWS = (16, 32, 64, 128, 256, 512)
# Tokens of a sequence to see what drifts, as far as the model's context goes.
LONG_TOKENS = 4096
# Sequences that the thresholds are chosen on, spread evenly over those of the costs.
SAMPLE_SEQUENCES = 6
# Keys after this part of a sequence without its last window have too few later queries to judge
# them by.
JUDGED_SHARE = 0.75


@dataclass(frozen=True)
class CalibrationPlan:
    """What to calibrate.

    units: kind -> layers. target: share of (token, unit) pairs that are to run, one number or kind
    -> number. kv_window: None gives each kv unit one of OWN_WINDOWS. kv_granularity: kv units
    decide for each K/V head, where layers have several, or for each layer. text: None
    is the packaged text. scores: kind -> score (costs.SCORES). tokens: of the text to calibrate
    on; None is all.
    """

    units: Mapping[str, Sequence[int]]
    target: float | Mapping[str, float] = 0.5
    kv_window: int | None = KV_WINDOW
    sink_tokens: int = SINK_TOKENS
    text: str | None = None
    scores: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_SCORES))
    rounds: int = 4
    kv_granularity: str = KV_GRANULARITY
    tokens: int | None = None

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows that a kv unit can have."""
        return OWN_WINDOWS if self.kv_window is None else (self.kv_window,)

    @property
    def needs_gradients(self) -> bool:
        """Whether a score needs a backward pass through the whole model."""
        return needs_gradients([[self.scores[kind] for kind in self.units]])

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


@dataclass(frozen=True)
class MeasuredLayer:
    """What the original model shows of the units of one layer and kind.

    fit: of log costs. means: of the inputs of the routers, over chunks of the longer sequences.
    sample: inputs of the routers on the sample's sequences, [T, n_embd] each.
    """

    fit: LayerFit
    means: ChunkMeans
    sample: list[torch.Tensor]


def measure_layers(
    base: nn.Module,
    sequences: torch.Tensor,
    plan: CalibrationPlan,
    state: WalkState | None = None,
) -> Iterator[MeasuredLayer]:
    """Run the original model over sequences [n, T], consecutive parts of a text.

    Yields what each layer and kind shows, in the order of the layers. state: of a stopped walk,
    whose layers are not yielded again. Raises UserError for a score that the kind does not have.
    """
    meter = CostMeter(base, plan.windows)
    units = plan.layer_units(base)
    meter.check_scores(wanted_scores(units.values(), plan))
    known = backward_fits(base, sequences, plan) if plan.needs_gradients else None
    longer = joined(base, sequences)
    costly, n_short = known is None, len(sequences)
    sample = sample_numbers(n_short)
    if not costly:
        sequences, n_short = sequences[list(sample)], len(sample)
        sample = range(n_short)
    last = max(place.layer for place in units)
    if state is not None and state.layer > last:
        return
    logger.info(f"measuring {sequences.numel()} tokens in layers 0 to {last}")
    with torch.no_grad(), meter.observer.prepared():
        walk = LayerWalk(base, [*sequences, *longer])
        for layer in walk.layers(last + 1, "measuring the original model", state):
            here = {place: some for place, some in units.items() if place.layer == layer}
            found = {
                place: MeasuredLayer(
                    known[place] if known else new_fit(base, place, some, plan), ChunkMeans(), []
                )
                for place, some in here.items()
            }
            for number in range(n_short):
                wanted = wanted_scores(here.values(), plan) if costly else {}
                _pass_shorter(walk, number, meter, wanted, found, plan, number in sample)
            for number in range(n_short, n_short + len(longer)):
                inputs, out = _inputs(walk, number, meter, here)
                for place, x in inputs.items():
                    found[place].means.add(x)
                walk.keep(number, out)
            yield from found.values()


def _pass_shorter(
    walk: LayerWalk,
    number: int,
    meter: CostMeter,
    wanted: dict[Unit, list[str]],
    found: Mapping[Unit, MeasuredLayer],
    plan: CalibrationPlan,
    in_sample: bool,
) -> None:
    """Take a sequence through a layer, and add what it shows."""
    if wanted:
        measured, out = meter.measure_layer(walk, number, wanted)
        inputs = add_costs(measured, {place: one.fit for place, one in found.items()}, plan, meter)
    else:
        inputs, out = _inputs(walk, number, meter, found)
    if in_sample:
        for place, x in inputs.items():
            found[place].sample.append(x)
    walk.keep(number, out)


def _inputs(
    walk: LayerWalk, number: int, meter: CostMeter, places: Mapping[Unit, object]
) -> tuple[dict[Unit, torch.Tensor], torch.Tensor]:
    """Run a layer, and return what its routers read, [T, n_embd], and its output."""
    h, eps = walk.h(number), architectures.norm_eps(walk.base)
    ffn = [place for place in places if place.kind == FFN]
    x = rms_norm(h[0], eps) if len(places) > len(ffn) else None
    inputs = {place: x for place in places if place.kind != FFN}
    if not ffn:
        return inputs, walk.run(number, h)
    part = meter.parts[ffn[0].layer]
    with meter.observer.layer(part) as record:
        out = walk.run(number, h)
    record.note_layer(h, out, part)
    return inputs | {ffn[0]: rms_norm(record.mid, eps)}, out


def new_fit(base: nn.Module, place: Unit, units: list[Unit], plan: CalibrationPlan) -> LayerFit:
    """Return a fit without data for the units of a layer and kind."""
    windows = plan.windows if place.kind == KV else (0,)
    ridge = Ridge(architectures.n_embd(base), len(windows) * len(units), base.device)
    return LayerFit(units, windows, ridge)


def wanted_scores(units: Sequence[list[Unit]], plan: CalibrationPlan) -> dict[Unit, list[str]]:
    """Return the scores of units."""
    return {unit: [plan.scores[unit.kind]] for some in units for unit in some}


def add_costs(
    measured, fits: Mapping[Unit, LayerFit], plan: CalibrationPlan, meter: CostMeter
) -> dict[Unit, torch.Tensor]:
    """Add what a meter yields of a sequence to fits, and return the routers' inputs [T, n_embd]."""
    eps, inputs = architectures.norm_eps(meter.base), {}
    for place, of_place in groupby(measured, lambda pair: Unit(*pair[0][:2])):
        rows, targets = None, []
        for _, (h, costs) in of_place:
            if rows is None:
                rows = judged_rows(place.kind, len(h), plan.sink_tokens, max(plan.windows))
                inputs[place] = rms_norm(h, eps)
            (cost,) = costs.values()
            targets.append(torch.stack([log_cost(one[rows]) for one in torch.atleast_2d(cost)]))
        fits[place].ridge.add(inputs[place][rows], torch.stack(targets, 1).flatten(0, 1).T)
    return inputs


def backward_fits(
    base: nn.Module, sequences: torch.Tensor, plan: CalibrationPlan
) -> dict[Unit, LayerFit]:
    """Return the fits of all units, with scores of which some need gradients."""
    meter, units = CostMeter(base, plan.windows), plan.layer_units(base)
    fits = {place: new_fit(base, place, some, plan) for place, some in units.items()}
    wanted = wanted_scores(units.values(), plan)
    for ids in Progress().count("measuring costs", sequences):
        add_costs(meter.measure(ids.to(base.device), wanted), fits, plan, meter)
    return fits


def measure(base: nn.Module, sequences: torch.Tensor, plan: CalibrationPlan) -> list[LayerFit]:
    """Return what each router is fitted to."""
    return [one.fit for one in measure_layers(base, sequences, plan)]


def joined(base: nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    """Return consecutive sequences [n, T] joined to longer ones."""
    n, length = sequences.shape
    many = sequences_joined(base, length, n)
    return sequences[: n // many * many].reshape(-1, many * length)


def sequences_joined(base: nn.Module, length: int, n: int) -> int:
    """Return how many of n sequences of `length` tokens make one of LONG_TOKENS tokens."""
    return min(n, max(1, min(LONG_TOKENS, architectures.context_length(base) or length) // length))


def sample_numbers(n: int) -> range:
    """Return which of n sequences are in the sample."""
    return range(0, n, -(-n // SAMPLE_SEQUENCES))


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
