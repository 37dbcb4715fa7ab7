"""Holds the mean activation at its target, and finds the price that lets units share it out.

Two things, for each group of units (a kind; a single unit with targets per layer), so that neither
has to be tuned:

* the thresholds of a group follow the running quantile of its logits where the text does not repeat
  itself
  (repeats.py), all alike: the activation is the target's there.
* the load term of the loss, `price * mean sigmoid(z)`, says what it costs to be active, in nats. At
  the fair price it
  cancels what the loss falls by if all logits of the group rise together: routers are left to tell
  tokens and layers apart. So the price is the ratio of two slopes, Lagrange's multiplier of the
  constraint, measured in each step.

    control = Controller(groups, targets, starts, anneal=200)
    loss, seen = student(ids, counts, fresh, control.prices(step), control.shares(step))   # shares: where to look
    shift = control.update(step, seen["quantile"], rise, seen["slope"])               # of the thresholds, in logits
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mod_export.units import Unit, by_kind

MEMORY = 0.95  # of the running slopes: those of one sequence are noisy
# of the way to a step's quantile; the activation of one sequence may be five times that of the next
FOLLOW = 0.05


@dataclass
class Controller:
    """groups: units whose mean activation has one target; fixed: a constant price instead of the
    fair one.

    targets, starts: activation of each group at the end and at the beginning; anneal: steps from
    one to the other.
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
        """Of the groups: the kind, and the layer where each unit is one."""
        return [
            group[0][1] if len(group) > 1 else f"{group[0][1]} {group[0][0]}"
            for group in self.groups
        ]

    def target(self, step: int) -> torch.Tensor:
        """Of each group at this step."""
        share = min(1.0, step / self.anneal) if self.anneal else 1.0
        start, end = torch.tensor(self.starts), torch.tensor(self.targets)
        return start + share * (end - start)

    def prices(self, step: int) -> torch.Tensor:
        """Of each group's activation, in nats; 0 before anything is known."""
        if self.fixed is not None:
            return torch.full((len(self.groups),), self.fixed)
        return torch.where(self.slope > 0, -self.rise / self.slope.clamp(min=1e-12), 0.0)

    def shares(self, step: int) -> torch.Tensor:
        """[n_groups, 2]: activation of this step and the next, whose quantiles `update` needs."""
        return torch.stack([self.target(step), self.target(step + 1)], dim=1)

    def update(
        self, step: int, quantile: torch.Tensor, rise: torch.Tensor, slope: torch.Tensor
    ) -> torch.Tensor:
        """-> what to add to the thresholds' logits, [n_groups].

        quantile: [n_groups, 2] of z, which is the logits' distance to the threshold, that the
        shares reach;
        rise: slope of the loss without the load term, if all z of a group rise; slope: that of mean
        sigmoid(z).
        """
        self.rise = MEMORY * self.rise + (1 - MEMORY) * rise
        self.slope = MEMORY * self.slope + (1 - MEMORY) * slope
        now, then = quantile.unbind(1)
        return then - now + FOLLOW * now

    def state_dict(self) -> dict:
        return {"rise": self.rise, "slope": self.slope}

    def load_state_dict(self, state: dict) -> None:
        self.rise, self.slope = state["rise"], state["slope"]


def groups_of(units: list[Unit], per_layer: bool) -> list[list[Unit]]:
    """All units of a kind together, so that layers share its budget; or each unit alone."""
    if per_layer:
        return [[unit] for unit in units]
    return list(by_kind(units).values())
