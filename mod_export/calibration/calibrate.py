"""Set routers and thresholds without training: measure costs, fit routers, choose thresholds.

1. Each unit's router is fitted to the logarithm of what skipping would cost (costs.py, ridge.py).
   Where wanted, each kv unit gets the window with which it remembers the fewest tokens.
2. One affine map for all units of a kind turns the predicted log cost into a logit (routers.py). So
   a logit means the same cost in every layer and head, which share the budget as they need it.
3. One quantile over all (token, unit) pairs of a kind gives the threshold (thresholds.py).

The first two take one pass through the model, layer by layer (measuring.py). What the routers say
there gives the first threshold. Each pass that skips checks a threshold, and gives the next one.

docs/log.md has the comparison behind the defaults. Where a folder is given, each pass keeps there
what it has reached, layer by layer, so that a stopped calibration goes on.

    config, routers = calibrate(base, tokenizer, CalibrationPlan(units={"kv": range(2, 30)}))
    model = MoDModel.from_base(base, tokenizer, config, routers)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

import torch
from torch import nn

from mod_export.calibration import memory
from mod_export.calibration.measuring import CalibrationPlan, measure_layers, sample_numbers
from mod_export.calibration.routers import PENALTIES, Candidate, Solution, candidates, choose_all
from mod_export.calibration.thresholds import routing, settle
from mod_export.config import MoDConfig, UnitConfig
from mod_export.data.text import default_texts, pack, tokenize
from mod_export.errors import UserError
from mod_export.model import architectures
from mod_export.model.mod_model import MoDModel
from mod_export.model.walk_state import WalkState
from mod_export.units import KV, Unit, shares_by_kind, units_in

logger = logging.getLogger(__name__)

# Tokens of a sequence: fewer where the text is short, more for a wide window.
SEQUENCE_TOKENS = 1024
MIN_SEQUENCES = 4


@torch.no_grad()
def calibrate(
    base: nn.Module, tokenizer, plan: CalibrationPlan, folder: Path | None = None
) -> tuple[MoDConfig, dict]:
    """Return config and routers {Unit: (weight [n_embd], bias [1])}.

    folder: of what a stopped calibration with the same arguments has kept (run_folder.py). Raises
    UserError for a text too short, an unknown score, layers the model does not have, or where there
    is too little memory.
    """
    sequences, held_out, source = _texts(tokenizer, plan, _sequence_length(base, plan))
    sequences, held_out = _first_of(sequences, plan.tokens), _first_of(held_out, plan.tokens)
    _first_config(base, plan)  # an error is raised before the minutes of work
    memory.check(base, plan, sequences, held_out)
    targets = shares_by_kind(plan.target, plan.units)
    solution, logits = fit_routers(base, sequences, plan, targets, folder)
    if plan.kv_window is None:
        counts = sorted(Counter(solution.windows.values()).items())
        named = ", ".join(f"{window} ({n})" for window, n in counts)
        logger.info(f"windows of the kv units, and how many have them: {named}")
    first = _first_config(base, plan, solution.windows)
    groups = first.by_kind()
    model = MoDModel.from_base(base, tokenizer, first, solution.routers)
    try:
        sample = sequences[list(sample_numbers(len(sequences)))]
        both = SampleAndHeldOut(model, sample, held_out, folder)
        activation = settle(model, both.route, groups, targets, plan.rounds, logits)
        thresholds = {kind: model.router(units[0]).threshold for kind, units in groups.items()}
    finally:
        model.detach()
    held = both.held
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


def fit_routers(
    base: nn.Module,
    sequences: torch.Tensor,
    plan: CalibrationPlan,
    targets: Mapping[str, float],
    folder: Path | None = None,
) -> tuple[Solution, dict[Unit, torch.Tensor]]:
    """Return the routers, and their logits on the sample's tokens where nothing is skipped.

    Of each layer only the candidates and what they predict are kept.
    """
    state = WalkState(folder, "measured") if folder else None
    # (layer, kind, head) -> the candidates, and what they predict
    kept: dict[tuple, tuple[list[tuple], torch.Tensor]] = {} if state is None else state.found
    for layer in measure_layers(base, sequences, plan, state):
        place = layer.fit.place
        drift = layer.means.drift()
        for unit, some in candidates(layer.fit, PENALTIES[place.kind], drift).items():
            weight = torch.stack([one.weight for one in some]).to(base.device)
            bias = torch.stack([one.bias for one in some]).to(base.device)
            logs = [(weight @ x.T + bias).cpu() for x in layer.sample]
            # [n_candidate, n_sequence, T]
            kept[tuple(unit)] = [astuple(one) for one in some], torch.stack(logs, 1)
    found: dict[Unit, dict[Unit, list[Candidate]]] = {}
    for key, (some, _) in kept.items():
        found.setdefault(Unit(*key[:2]), {})[Unit(*key)] = [Candidate(*one) for one in some]
    solution = choose_all(found, targets, sequences.shape[1])
    logits = {}
    for unit, number in solution.chosen.items():
        center, scale = solution.scales[unit.kind]
        logit = (kept[tuple(unit)][1][number] - center) * scale
        logit[:, : plan.sink_tokens] = float("inf")
        logits[unit] = logit.flatten()
    return solution, logits


class SampleAndHeldOut:
    """Measures how a model routes a sample and held-out text [n, T], in one pass each time.

    held: activation of each unit on the held-out text, the last time. folder: of calibrate.
    """

    def __init__(
        self,
        model: MoDModel,
        sample: torch.Tensor,
        held_out: torch.Tensor,
        folder: Path | None = None,
    ):
        self.model, self.sample, self.held_out = model, sample, held_out
        self.folder, self.passes = folder, 0
        self.held: dict[Unit, float] = {}

    def route(self) -> tuple[dict[Unit, torch.Tensor], dict[Unit, float]]:
        """Return logits and activation on the sample, as routing_of does."""
        self.passes += 1
        kept = WalkState(self.folder, f"activation-{self.passes}") if self.folder else None
        sequences = [*self.sample, *self.held_out]
        traces = self.model.traces(sequences, "measuring activation", kept)
        n = len(self.sample)
        _, self.held = routing(self.model, traces[n:])
        return routing(self.model, traces[:n])


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


def _first_of(sequences: torch.Tensor, tokens: int | None) -> torch.Tensor:
    """Return the first of sequences [n, T]: those that have at most so many tokens together."""
    length = sequences.shape[1]
    if tokens is not None and tokens < length:
        raise UserError(
            f"{tokens} tokens to calibrate on are less than a sequence, which has {length}",
            f"use --calibration-tokens {length} or more, or a smaller --kv-window",
        )
    return sequences if tokens is None else sequences[: tokens // length]


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
