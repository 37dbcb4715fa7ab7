"""One forward of training as a module, so that Accelerate can wrap it: student, teacher, losses.

student = Student(model, teacher=None, groups, weights)
loss, seen = student(ids, counts, fresh, prices, shares, total)   # ids, counts, fresh [B, T]; backward through loss
student.group_offset.grad                                  # [n_groups] slope of the loss, if all logits of a group rise
dense, logits, trace = student(ids)                 # hard decisions, for evaluation
_, logits, trace = student(ids, teach=False, logits_to_keep=1)
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from mod_export.calibration.thresholds import quantile_logit
from mod_export.data.repeats import counted
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import threshold_logit
from mod_export.training.losses import hidden_loss, logit_loss
from mod_export.training.relaxation import Relaxation, RelaxedDecisions


@dataclass(frozen=True)
class Weights:
    """Of the terms of the loss: distillation on logits, hidden states, language model."""

    kl: float = 1.0
    hidden: float = 0.0
    lm: float = 0.0

    @property
    def teacher(self) -> bool:
        return self.kl > 0 or self.hidden > 0


class Student(nn.Module):
    """The MoD model with its teacher, the original model.

    teacher: a frozen copy; None: the model itself with every unit active (and LoRA off), which
    costs no memory, where
    the base weights stay as they are. groups: index into the routed units of each group of the load
    term.
    """

    def __init__(
        self,
        model: MoDModel,
        teacher: nn.Module | None,
        groups: list[list[int]],
        weights: Weights,
        relaxation: Relaxation | None = None,
        recompute: bool = False,
        original=contextlib.nullcontext,
    ):
        super().__init__()
        self.model, self.teacher, self.groups, self.weights = model, teacher, groups, weights
        self.relaxation, self.recompute = relaxation or Relaxation(), recompute
        self.original = original
        self.group_offset = None

    @property
    def _no_split_modules(self):
        """For Accelerate: what FSDP makes a unit of, as transformers has it."""
        return self.model.base._no_split_modules

    def forward(
        self,
        ids: torch.Tensor,
        counts: torch.Tensor | None = None,
        fresh: torch.Tensor | None = None,
        prices: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        teach: bool = True,
        **kwargs,
    ):
        """-> loss, and figures without gradient: kl, nll, hidden, activation of each group and of
        each unit, and of each group the slope of mean sigmoid(z), and the quantiles of z that
        `shares` reach.

        ids: [B, T]; counts: bool [B, T], tokens whose prediction counts; fresh: bool [B, T], tokens
        whose activation does, all where there are none; prices: [n_groups] of activation, nats;
        shares: [n_groups, 2]; total: what sums
        over tokens are divided by, None: the tokens that count here.
        """
        if prices is None:
            return self._dense(ids, kwargs)[0] if teach else None, *self.model(
                ids, trace=True, **kwargs
            )
        states = {"output_hidden_states": True} if self.weights.hidden else {}
        with torch.no_grad():
            dense, dense_states = self._dense(ids, states) if self.weights.teacher else (None, None)
        self.group_offset = torch.zeros(len(self.groups), device=ids.device, requires_grad=True)
        strategy = RelaxedDecisions(
            self.relaxation, self.model.strategy, self._group_offsets(), self.recompute
        )
        logits, trace = self.model(ids, trace=True, strategy=strategy, **states)
        weight = counts[:, 1:].float()
        rows = (
            logits[:, :-1].flatten(0, 1),
            None if dense is None else dense[:, :-1].flatten(0, 1),
        )
        of_loss = (self.weights.kl, self.weights.lm, total)
        loss, kl, nll = logit_loss(*rows, ids[:, 1:].flatten(), weight.flatten(), *of_loss)
        seen = {"kl": kl, "nll": nll}
        if self.weights.hidden:
            states = ([h[:, :-1] for h in parts] for parts in (trace.hidden, dense_states))
            distance = hidden_loss(*states, weight, total)
            loss = loss + self.weights.hidden * distance
            seen["hidden"] = distance.detach()
        seen["loss"] = loss.detach()
        z = trace.logit - self._thresholds(ids.device)
        fresh = counted(fresh)
        soft, units = torch.sigmoid(z), trace.active[fresh].float().mean(0)
        terms = torch.stack([soft[..., group].mean() for group in self.groups])
        seen |= {
            "units": units,
            "activation": torch.stack([units[group].mean() for group in self.groups]),
        }
        return loss + (prices * terms).sum(), seen | self._slopes(
            z.detach().clone(), soft.detach(), fresh, shares
        )

    def _slopes(
        self, z: torch.Tensor, soft: torch.Tensor, fresh: torch.Tensor, shares: torch.Tensor
    ) -> dict:
        """Of each group: slope of the mean of `soft`, and the quantiles of z. z, soft: [B, T,
        n_units].
        """
        z[:, : self.model.config.sink_tokens] = float("inf")  # always active
        z = z[fresh]
        quantiles = [
            [quantile_logit(z[..., group], share) for share in of_group]
            for group, of_group in zip(self.groups, shares.tolist(), strict=True)
        ]
        slope = soft * (1 - soft)
        return {
            "slope": torch.stack([slope[..., group].mean() for group in self.groups]),
            "quantile": torch.tensor(quantiles, device=z.device),
        }

    def _group_offsets(self) -> dict:
        units = self.model.config.routed()
        return {
            units[i]: self.group_offset[number]
            for number, group in enumerate(self.groups)
            for i in group
        }

    def _thresholds(self, device) -> torch.Tensor:
        routers = self.model.routers.values()
        return torch.tensor(
            [threshold_logit(r.threshold) + self.model.shift for r in routers], device=device
        )

    def _dense(self, ids: torch.Tensor, states: dict):
        """The original model's logits and hidden states (None where they were not asked for)."""
        if self.teacher is not None:
            out = self.teacher(input_ids=ids, use_cache=False, **states)
            return out.logits, out.hidden_states
        with self.model.forced("active"), self.original():
            logits, trace = self.model(ids, trace=True, **states)
        return logits, trace.hidden
