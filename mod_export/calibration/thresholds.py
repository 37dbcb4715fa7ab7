"""Thresholds that meet an activation target.

One quantile over all (token, unit) pairs of a group gives its threshold. The quantile is taken on
what the routers say while the model skips, because skipping changes what later routers see. A few
rounds settle it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from mod_export.common.progress import Progress
from mod_export.data.repeats import counted
from mod_export.model.mod_model import MoDModel, RoutingTrace
from mod_export.model.router import logit_threshold
from mod_export.units import Unit

logger = logging.getLogger(__name__)

ACTIVATION_TOLERANCE = 0.005
MAX_LOGIT = 12.0  # thresholds stay within sigmoid(+-12), where float32 still tells them apart


def set_thresholds(
    model: MoDModel,
    sequences: torch.Tensor,
    groups: Mapping[str, Sequence[Unit]],
    targets: Mapping[str, float],
    rounds: int = 4,
    forward: Callable | None = None,
    novel: torch.Tensor | None = None,
) -> dict[Unit, float]:
    """Set one p for each group of units such that the model, as it skips, meets the group's target.

    groups: name -> units. targets: name -> activation. forward: what gives the model's trace last;
    None runs the model's layers one after the other. novel: bool [n, T], the tokens whose
    activation counts; None is all. Returns the activation of each unit.
    """
    route = functools.partial(routing_of, model, sequences, forward, novel)
    return settle(model, route, groups, targets, rounds)


def settle(
    model: MoDModel,
    route: Callable[[], tuple[dict[Unit, torch.Tensor], dict[Unit, float]]],
    groups: Mapping[str, Sequence[Unit]],
    targets: Mapping[str, float],
    rounds: int = 4,
    logits: Mapping[Unit, torch.Tensor] | None = None,
) -> dict[Unit, float]:
    """Do what set_thresholds does, with logits and activation as `route` returns them.

    logits: of the units where nothing is skipped, from which the first thresholds are taken; None
    begins with those that the model has.
    """
    if logits is not None:
        _take_quantiles(model, logits, groups, targets)
    for number in range(rounds + 1):
        found, activation = route()
        means = {
            name: sum(activation[unit] for unit in units) / len(units)
            for name, units in groups.items()
        }
        logger.info(
            f"choosing thresholds, round {number + 1}: activation "
            + ", ".join(f"{name} {mean:.3f}" for name, mean in list(means.items())[:4])
        )
        met = all(abs(mean - targets[name]) < ACTIVATION_TOLERANCE for name, mean in means.items())
        if number == rounds or met and (number or logits is not None):
            break
        _take_quantiles(model, found, groups, targets)
    return activation


def _take_quantiles(
    model: MoDModel,
    logits: Mapping[Unit, torch.Tensor],
    groups: Mapping[str, Sequence[Unit]],
    targets: Mapping[str, float],
) -> None:
    for name, units in groups.items():
        p = quantile_threshold(torch.stack([logits[unit] for unit in units]), targets[name])
        for unit in units:
            model.router(unit).threshold = p


def quantile_threshold(logits: torch.Tensor, target: float) -> float:
    """Return the p that the share `target` of the logits reaches."""
    return logit_threshold(quantile_logit(logits, target))


def quantile_logit(logits: torch.Tensor, target: float) -> float:
    """Return what the share `target` of the logits reaches, at most MAX_LOGIT from 0."""
    ordered = logits.flatten().sort().values
    skipped = min(max(round((1 - target) * len(ordered)), 0), len(ordered) - 1)
    lower = ordered[max(skipped - 1, 0)]
    # The middle of the gap between two tokens, so that float noise decides nothing.
    middle = (lower + ordered[skipped]) / 2
    return middle.double().clamp(-MAX_LOGIT, MAX_LOGIT).item()


def routing_of(
    model: MoDModel,
    sequences: torch.Tensor,
    forward: Callable | None = None,
    novel: torch.Tensor | None = None,
) -> tuple[dict[Unit, torch.Tensor], dict[Unit, float]]:
    """Return the logits of each unit, and the share of the novel tokens that are active in it.

    The logits are infinite at sinks, which always run. The arguments are those of set_thresholds.
    """
    novel = torch.ones_like(sequences, dtype=torch.bool) if novel is None else novel
    return routing(model, _traces(model, sequences, forward), counted(novel).cpu())


def routing(
    model: MoDModel, traces: Iterable[RoutingTrace], counts: Sequence[torch.Tensor] | None = None
) -> tuple[dict[Unit, torch.Tensor], dict[Unit, float]]:
    """Return what routing_of does, from the traces of sequences.

    counts: bool [T] of each sequence, the tokens that count; None is all.
    """
    units, parts, active = model.config.routed(), [], []
    for number, trace in enumerate(traces):
        some = slice(None) if counts is None else counts[number]
        trace.logit[0, : model.config.sink_tokens] = float("inf")
        active.append(trace.active[0].cpu()[some])
        parts.append(trace.logit[0].cpu()[some])
    logits, shares = torch.cat(parts).unbind(-1), torch.cat(active).float().mean(0).tolist()
    return dict(zip(units, logits, strict=True)), dict(zip(units, shares, strict=True))


def _traces(
    model: MoDModel, sequences: torch.Tensor, forward: Callable | None
) -> Iterator[RoutingTrace]:
    """Yield the trace of each sequence."""
    label = "measuring activation"
    if forward is None:
        yield from model.traces(list(sequences), label)
        return
    for ids in Progress().count(label, sequences):
        *_, trace = forward(ids[None].to(model.base.device), logits_to_keep=1)
        yield trace
