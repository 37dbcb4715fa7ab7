"""The router of one unit, and the one rule by which a router decides.

All numbers are float32 whatever the model's type, as in the runtime. The rule is the threshold-p of
docs/explanation/semantics.md: sigmoid(logit) >= p. The code compares logits instead of sigmoids,
because a sigmoid saturates in float32. The comparison of logits also lets one number shift all
thresholds of a model.

    router = Router(weight, bias, threshold=0.5, eps=1e-5)
    active = is_active(router(h), router.threshold)
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Router(nn.Module):
    """A linear function of the RMS-normed residual stream.

    weight: [n_embd]; bias: [1]; threshold: p in (0, 1); eps: the epsilon of the model's own norms.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, threshold: float, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = nn.Parameter(bias.detach().float().reshape(1).clone())
        self.threshold = threshold
        self.eps = eps

    def forward(self, h: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the router logits [...], float32, of the residual stream h [..., n_embd].

        The score of a token is the sigmoid of its logit. x: rms_norm(h), where it is known already.
        """
        with torch.autocast(h.device.type, enabled=False):
            return (rms_norm(h, self.eps) if x is None else x) @ self.weight + self.bias


def rms_norm(h: torch.Tensor, eps: float) -> torch.Tensor:
    """Return h / sqrt(mean(h^2) + eps) over the last axis, without a weight, in float32."""
    x = h.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def threshold_logit(p: float) -> float:
    """Return the logit of p, which is rounded to 32 bits first, as the file stores it."""
    p = torch.tensor(p, dtype=torch.float32).double().item()
    return math.log(p) - math.log1p(-p)


def logit_threshold(logit: float) -> float:
    """Return the p of a logit: the inverse of threshold_logit."""
    return torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()


def is_active(logit: torch.Tensor, p: float, shift: float = 0.0) -> torch.Tensor:
    """Apply the threshold rule: logit >= logit(p) + shift, in float32.

    A positive shift makes fewer tokens active.
    """
    # The cut is a number and no tensor. To make a tensor on a GPU would wait for all that the GPU
    # has still to do.
    return logit >= torch.tensor(threshold_logit(p) + shift, dtype=torch.float32).item()
