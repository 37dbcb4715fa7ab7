"""The router of one unit and the one rule by which it decides.

Everything is float32 whatever the model's type, as in the runtime. The rule is the threshold-p of
docs/explanation/semantics.md, sigmoid(logit) >= p, compared as logits: that is exact where a sigmoid would
saturate, and one number can shift all thresholds of a model.

    router = Router(weight, bias, threshold=0.5, eps=1e-5)
    active = is_active(router(h), router.threshold)
"""

from __future__ import annotations

import math

import torch
from torch import nn

Whole = tuple[torch.Tensor, torch.Tensor]  # a router's parameters: weight [n_embd], bias [1]


class Router(nn.Module):
    """Linear router on the RMS-normed residual stream.

    weight: [n_embd], bias: [1]; eps: the model's own norm eps; threshold: p in (0, 1). Training may
    reparametrise it (steady.py): then center, [n_embd], is taken from the normed input, weight v
    stands for start + v - back^T drift v, and bias for bias + offset; `plain` has the weight and
    bias of files.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, threshold: float, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = nn.Parameter(bias.detach().float().reshape(1).clone())
        for name in ("start", "center"):
            self.register_buffer(name, torch.zeros_like(self.weight), persistent=False)
        self.register_buffer("offset", torch.zeros_like(self.bias), persistent=False)
        for name in ("drift", "back"):
            self.register_buffer(name, self.weight.new_zeros(0, len(self.weight)), persistent=False)
        self.threshold = threshold
        self.eps = eps

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Residual stream [..., n_embd] -> router logits [...], float32; the score is their
        sigmoid.
        """
        with torch.autocast(h.device.type, enabled=False):
            weight = self.start + self._steady(self.weight)
            return (rms_norm(h, self.eps) - self.center) @ weight + (self.bias + self.offset)

    @torch.no_grad()
    def reparametrise(
        self,
        whole: Whole,
        center: torch.Tensor,
        drift: torch.Tensor,
        back: torch.Tensor,
        lose: bool = False,
    ) -> None:
        """The same logits from buffers that give a step of the parameters another effect;
        parameters stay as they are.

        whole: of `whole`; center: [n_embd]; drift, back: [k, n_embd], as of steady.damp. lose: take
        the drift out of the weight; logits of inputs whose mean is center keep theirs.
        """
        weight, bias = self.plain(whole)
        at_center = bias + center @ weight
        if lose:
            weight = weight - (drift @ weight) @ back
        self.center, self.drift, self.back = (x.clone() for x in (center, drift, back))
        self.start = weight - self._steady(whole[0])
        self.offset = at_center - whole[1]

    @torch.no_grad()
    def whole(self) -> Whole:
        """The parameters, which may be in pieces (sharding.py) but while a forward runs."""
        return self.weight.detach().clone(), self.bias.detach().clone()

    @torch.no_grad()
    def plain(self, whole: Whole | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the router without these."""
        v, bias = whole or (self.weight.detach(), self.bias.detach())
        weight = self.start + self._steady(v)
        return weight, bias + self.offset - self.center @ weight

    def _steady(self, v: torch.Tensor) -> torch.Tensor:
        return v - (self.drift @ v) @ self.back if len(self.drift) else v


def rms_norm(h: torch.Tensor, eps: float) -> torch.Tensor:
    """h / sqrt(mean(h^2) + eps) over the last axis, without a weight, in float32."""
    x = h.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def threshold_logit(p: float) -> float:
    """logit of p, which is rounded to 32 bits first, as the file stores it."""
    p = torch.tensor(p, dtype=torch.float32).double().item()
    return math.log(p) - math.log1p(-p)


def logit_threshold(logit: float) -> float:
    """p of a logit: the inverse of threshold_logit."""
    return torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()


def is_active(logit: torch.Tensor, p: float, shift: float = 0.0) -> torch.Tensor:
    """The threshold rule: logit >= logit(p) + shift, in float32. A positive shift makes fewer
    tokens active.
    """
    # a number and no tensor: making one on a GPU would wait for all that the GPU has still to do
    return logit >= torch.tensor(threshold_logit(p) + shift, dtype=torch.float32).item()
