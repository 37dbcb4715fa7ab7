"""Brings the mean activation to its target and holds it there.

The load term of the loss is `weight * mean sigmoid(z)` of each group of units (a kind; a single unit with targets per
layer). Its weight is the price of activation, in nats; what a fair price is depends on the model, the text and the
target, so a controller finds it: proportional and integral, in units of loss / (1 - activation). That is half of what
the next skip costs where the cheapest ones are made first and the loss grows with the square of their number.

    control = Controller(groups, targets, starts, anneal=200)
    weights = control.weights(step)              # before the forward
    control.update(step, activation, loss)       # after it
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mod_export.config import Unit, by_kind

INTEGRAL, PROPORTIONAL = 0.18, 12.0  # of the error, in the unit of the price
SMOOTH = 0.9  # of the running means: the activation of one sequence may be five times that of the next
PRICE = 1.8  # of the first step's load term, in this unit: what calibrated kv units cost at the margin
EARLY = 0.6  # the same where the way to the target is still to go: what is lost at first heals, and more is too much
ROOM = 0.02  # the least 1 - activation that counts


@dataclass
class Controller:
    """groups: units whose mean activation has one target; fixed: a constant weight instead of a controlled one.

    targets, starts: activation of each group at the end and at the beginning; anneal: steps from one to the other.
    """

    groups: list[list[Unit]]
    targets: list[float]
    starts: list[float]
    anneal: int = 0
    fixed: float | None = None
    integral: torch.Tensor = field(default=None)
    seen: torch.Tensor = field(default=None)
    loss: float = 0.0

    def __post_init__(self):
        self.integral = torch.zeros(len(self.groups))
        self.seen = torch.tensor(self.starts)

    @property
    def names(self) -> list[str]:
        """Of the groups: the kind, and the layer where each unit is one."""
        return [group[0][1] if len(group) > 1 else f"{group[0][1]} {group[0][0]}" for group in self.groups]

    def target(self, step: int) -> torch.Tensor:
        """Of each group at this step."""
        share = min(1.0, step / self.anneal) if self.anneal else 1.0
        start, end = torch.tensor(self.starts), torch.tensor(self.targets)
        return start + share * (end - start)

    def weights(self, step: int) -> torch.Tensor:
        """Of each group's load term."""
        if self.fixed is not None:
            return torch.full((len(self.groups),), self.fixed)
        return self.integral + PROPORTIONAL * self._unit() * (self.seen - self.target(step))

    def update(self, step: int, activation: torch.Tensor, loss: float) -> None:
        """activation: of each group in this step, hard; loss: without the load term."""
        self.seen = SMOOTH * self.seen + (1 - SMOOTH) * activation
        if self.loss == 0:
            self.loss = loss
            there = torch.tensor(self.starts) == torch.tensor(self.targets)
            self.integral = self.integral + torch.where(there, PRICE, EARLY) * self._unit()
        self.loss = SMOOTH * self.loss + (1 - SMOOTH) * loss
        self.integral = self.integral + INTEGRAL * self._unit() * (self.seen - self.target(step))

    def _unit(self) -> torch.Tensor:
        """Of the price of each group, nats."""
        return self.loss / (1 - self.seen).clamp(min=ROOM)

    def state_dict(self) -> dict:
        return {"integral": self.integral, "seen": self.seen, "loss": self.loss}

    def load_state_dict(self, state: dict) -> None:
        self.integral, self.seen, self.loss = state["integral"], state["seen"], state["loss"]


def groups_of(units: list[Unit], per_layer: bool) -> list[list[Unit]]:
    """All units of a kind together, so that layers share its budget; or each unit alone."""
    if per_layer:
        return [[unit] for unit in units]
    return list(by_kind(units).values())
