"""Hold the mean activation at its target, and find the price at which units share it out.

The controller does two things for each group of units, so that neither has to be tuned. A group is
a kind, or a single unit where each unit has its target.

* The thresholds of a group follow the running quantile of its logits, all alike. The quantile is
  that of text which does not repeat itself (repeats.py), so the activation is the target's there.
* The load term of the loss, `price * mean sigmoid(z)`, is the cost of being active, in nats. At
  the fair price the term cancels what the loss falls by if all logits of the group rise together.
  So routers are left to tell tokens and layers apart. The price is the ratio of two slopes,
  Lagrange's multiplier of the constraint, measured in each step.

    control = Controller(groups, targets, starts, anneal=200)
    loss, seen = student(ids, counts, novel, control.prices(step), control.shares(step))
    shift = control.update(step, seen["quantile"], rise, seen["slope"])
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mod_export.units import Unit, by_kind

# Share of the running slopes that a step keeps, because the slopes of one sequence are noisy.
SLOPE_MEMORY = 0.95
# Share of the way to a step's quantile. The activation of one sequence may be five times that of
# the next.
QUANTILE_SHARE = 0.05


@dataclass
class Controller:
    """The state of the control.

    groups: units whose mean activation has one target. targets, starts: activation of each group at
    the end and at the beginning. anneal: steps from one to the other. fixed: a constant price
    instead of the fair one. rise, slope: the running slopes.
    """

    groups: list[list[Unit]]
    targets: list[float]
    starts: list[float]
    anneal: int = 0
    fixed: float | None = None
    rise: torch.Tensor = field(default=None)
    slope: torch.Tensor = field(default=None)

    def __post_init__(self):
        self.rise, self.slope = torch.zeros(len(self.groups)), torch.zeros(len(self.groups))

    @property
    def names(self) -> list[str]:
        """Return the names of the groups: the kind, or the unit where each is a group."""
        return [group[0].kind if len(group) > 1 else _name(group[0]) for group in self.groups]

    def target(self, step: int) -> torch.Tensor:
        """Return the activation that each group is to have at this step."""
        share = min(1.0, step / self.anneal) if self.anneal else 1.0
        start, end = torch.tensor(self.starts), torch.tensor(self.targets)
        return start + share * (end - start)

    def prices(self, step: int) -> torch.Tensor:
        """Return the price of each group's activation, in nats; the first price is 0."""
        if self.fixed is not None:
            return torch.full((len(self.groups),), self.fixed)
        return torch.where(self.slope > 0, -self.rise / self.slope.clamp(min=1e-12), 0.0)

    def shares(self, step: int) -> torch.Tensor:
        """Return [n_groups, 2]: the activation of this step and the next.

        `update` needs the quantiles of both.
        """
        return torch.stack([self.target(step), self.target(step + 1)], dim=1)

    def update(
        self, step: int, quantile: torch.Tensor, rise: torch.Tensor, slope: torch.Tensor
    ) -> torch.Tensor:
        """Return what to add to the thresholds' logits, [n_groups].

        quantile: [n_groups, 2], the z that the shares reach; z is a logit's distance to the
        threshold. rise: the slope of the loss without the load term, if all z of a group rise.
        slope: the slope of mean sigmoid(z).
        """
        self.rise = SLOPE_MEMORY * self.rise + (1 - SLOPE_MEMORY) * rise
        self.slope = SLOPE_MEMORY * self.slope + (1 - SLOPE_MEMORY) * slope
        now, then = quantile.unbind(1)
        return then - now + QUANTILE_SHARE * now

    def state_dict(self) -> dict:
        return {"rise": self.rise, "slope": self.slope}

    def load_state_dict(self, state: dict) -> None:
        self.rise, self.slope = state["rise"], state["slope"]


def groups_of(units: list[Unit], per_layer: bool) -> list[list[Unit]]:
    """Return the groups: all units of a kind, or each unit alone with `per_layer`.

    Layers and heads share the budget of a kind whose units are one group.
    """
    if per_layer:
        return [[unit] for unit in units]
    return list(by_kind(units).values())


def _name(unit: Unit) -> str:
    """Return `kv 2`, or `kv 2.1` of head 1."""
    return f"{unit.kind} {'.'.join(map(str, unit[::2]))}"
