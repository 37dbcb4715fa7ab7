"""One forward of training as a module: student, teacher and losses.

    student = Student(model, teacher=None, groups, weights)
    loss, seen = student(ids, counts, novel, prices, shares, total)   # counts, novel: [B, T]
    student.group_offset.grad      # [n_groups], slope of the loss if all logits of a group rise
    dense, logits, trace = student(ids)                 # hard decisions, for evaluation
    _, logits, trace = student(ids, teach=False, logits_to_keep=1)

Accelerate can wrap the module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mod_export.calibration.thresholds import quantile_logit
from mod_export.data.repeats import counted
from mod_export.model.lora import without_lora
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import threshold_logit
from mod_export.training.losses import hidden_loss, logit_loss
from mod_export.training.relaxation import HardDecisions, Relaxation, RelaxedDecisions


@dataclass(frozen=True)
class LossWeights:
    """The weights of the terms of the loss: logits, hidden states, language model."""

    kl: float = 1.0
    hidden: float = 0.0
    lm: float = 0.0

    @property
    def teacher(self) -> bool:
        return self.kl > 0 or self.hidden > 0


class Student(nn.Module):
    """The MoD model with its teacher, the original model.

    teacher: a frozen copy. None is the model itself with every unit active and LoRA off, which
    costs no memory; it needs base weights that stay as they are. groups: of each group of the load
    term, the indices of its units among the routed ones. group_offset: [n_groups], a zero that is
    added to z of all units of a group; its gradient is that of all logits of the group together.
    """

    def __init__(
        self,
        model: MoDModel,
        teacher: nn.Module | None,
        groups: list[list[int]],
        weights: LossWeights,
        relaxation: Relaxation | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        self.model, self.teacher, self.groups, self.weights = model, teacher, groups, weights
        self.relaxation, self.recompute = relaxation or Relaxation(), recompute
        self.group_offset = None

    @property
    def _no_split_modules(self):
        """Return the names of the modules that FSDP makes units of, as transformers has them."""
        return self.model.base._no_split_modules

    def forward(
        self,
        ids: torch.Tensor,
        counts: torch.Tensor | None = None,
        novel: torch.Tensor | None = None,
        prices: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
        teach: bool = True,
        **kwargs,
    ):
        """Return the loss and figures without gradient, or what the hard model gives.

        ids: [B, T]. counts: bool [B, T], tokens whose prediction counts. novel: bool [B, T], tokens
        whose activation counts; all where there are none. prices: [n_groups] of activation, nats.
        shares: [n_groups, 2]. total: what sums over tokens are divided by; None is the number of
        tokens that count here.

        The figures are kl, nll, hidden, the activation of each group and of each unit, and of each
        group the slope of mean sigmoid(z) and the quantiles of z that `shares` reach. Without
        prices the result is the dense logits (None without `teach`), the model's logits and its
        trace, all by hard decisions.
        """
        if prices is None:
            dense = self._dense(ids, kwargs)[0] if teach else None
            strategy = HardDecisions(self.model.strategy)
            return dense, *self.model(ids, trace=True, strategy=strategy, **kwargs)
        states = {"output_hidden_states": True} if self.weights.hidden else {}
        with torch.no_grad():
            dense, dense_states = self._dense(ids, states) if self.weights.teacher else (None, None)
        self.group_offset = torch.zeros(len(self.groups), device=ids.device, requires_grad=True)
        strategy = RelaxedDecisions(
            self.relaxation, self.model.strategy, self._group_offsets(), self.recompute
        )
        logits, trace = self.model(ids, trace=True, strategy=strategy, **states)
        weight = counts[:, 1:].float()
        loss, seen = self._logit_loss(logits, dense, ids, weight, total)
        if self.weights.hidden:
            distance = self._hidden_loss(trace.hidden, dense_states, weight, total)
            loss = loss + self.weights.hidden * distance
            seen["hidden"] = distance.detach()
        seen["loss"] = loss.detach()
        terms, activation = self._activation(trace, counted(novel), shares)
        return loss + (prices * terms).sum(), seen | activation

    def _logit_loss(
        self,
        logits: torch.Tensor,
        dense: torch.Tensor | None,
        ids: torch.Tensor,
        weight: torch.Tensor,
        total: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict]:
        """Return the loss on logits [B, T, n_vocab], and its parts kl and nll without gradient.

        dense: the teacher's logits. weight: [B, T - 1], what each prediction counts.
        """
        loss, kl, nll = logit_loss(
            logits[:, :-1].flatten(0, 1),
            None if dense is None else dense[:, :-1].flatten(0, 1),
            ids[:, 1:].flatten(),
            weight.flatten(),
            self.weights.kl,
            self.weights.lm,
            total,
        )
        return loss, {"kl": kl, "nll": nll}

    def _hidden_loss(
        self, hidden, dense_hidden, weight: torch.Tensor, total: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the loss on hidden states, without those of the last token.

        hidden, dense_hidden: the states [B, T, n_embd] of each layer, of student and teacher.
        """
        mine = [h[:, :-1] for h in hidden]
        other = [h[:, :-1] for h in dense_hidden]
        return hidden_loss(mine, other, weight, total)

    def _activation(
        self, trace, novel: torch.Tensor, shares: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        """Return mean sigmoid(z) of each group, [n_groups], and the figures of the activation."""
        z = trace.logit - self._thresholds(trace.logit.device)
        soft = torch.sigmoid(z)
        units = trace.active[novel].float().mean(0)
        terms = torch.stack([soft[..., group].mean() for group in self.groups])
        seen = {
            "units": units,
            "activation": torch.stack([units[group].mean() for group in self.groups]),
        }
        return terms, seen | self._slopes(z.detach().clone(), soft.detach(), novel, shares)

    def _slopes(
        self, z: torch.Tensor, soft: torch.Tensor, novel: torch.Tensor, shares: torch.Tensor
    ) -> dict:
        """Return the slope of the mean of `soft` and the quantiles of z, of each group.

        z, soft: [B, T, n_units].
        """
        z[:, : self.model.config.sink_tokens] = float("inf")  # always active
        z = z[novel]
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
        """Return the original model's logits, and its hidden states where they are asked for."""
        if self.teacher is not None:
            out = self.teacher(input_ids=ids, use_cache=False, **states)
            return out.logits, out.hidden_states
        with self.model.forced("active"), without_lora(self.model.base):
            logits, trace = self.model(ids, trace=True, **states)
        return logits, trace.hidden
