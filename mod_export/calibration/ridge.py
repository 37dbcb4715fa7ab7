"""Fit linear routers to measured costs, in closed form and in one pass over the data.

Knows nothing of models. Inputs are RMS-normed hidden states, as the routers will see them. Routers
that read the same inputs, such as those of the K/V heads of a layer, share one matrix.

    fit = Ridge(n_embd=576, n_target=3)
    fit.add(x, cost.log())       # x [N, n_embd], targets [N, n_target]; for each piece of data
    weight, bias = fit.solve(penalty=0.01)       # x @ weight.T + bias predicts the targets
"""

from __future__ import annotations

import torch


class Ridge:
    """Least squares with a penalty on standardised inputs.

    Memory is one matrix [n_embd, n_embd], whatever N and n_target. device: where the data are,
    unless it lacks the type float64; solutions are on the CPU.
    """

    def __init__(self, n_embd: int, n_target: int = 1, device: torch.device | str = "cpu"):
        self.n = 0
        self.device = "cpu" if torch.device(device).type == "mps" else device
        of = {"dtype": torch.float64, "device": self.device}
        self.xx = torch.zeros(n_embd, n_embd, **of)
        self.x = torch.zeros(n_embd, **of)
        self.xy = torch.zeros(n_embd, n_target, **of)
        self.y, self.yy = torch.zeros(2, n_target, **of)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the rows x [N, n_embd] with the targets y [N, n_target]."""
        x, y = x.to(self.device).double(), y.to(self.device).double()
        self.n += len(x)
        self.xx += x.T @ x
        self.x += x.sum(0)
        self.xy += x.T @ y
        self.y += y.sum(0)
        self.yy += y.pow(2).sum(0)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the mean of x, the covariance of x, and that of x with y.

        The shapes are [n_embd], [n_embd, n_embd] and [n_embd, n_target].
        """
        mean = self.x / self.n
        return (
            mean.cpu(),
            (self.xx / self.n - mean.outer(mean)).cpu(),
            (self.xy / self.n - mean.outer(self.y / self.n)).cpu(),
        )

    def solve(
        self, penalty: float, drift: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight [n_target, n_embd] and bias [n_target], float32.

        penalty: the penalty is set against a variance of 1 of each input.

        drift: [k, n_embd]; the squares of drift @ weight are added to what is minimised.
        """
        mean, cov, cross = self.moments()
        scale = cov.diagonal().clamp(min=1e-12).sqrt()
        if drift is not None:
            drift = drift.cpu().double()
            cov = cov + drift.T @ drift
        gram = cov / scale.outer(scale)
        gram.diagonal().add_(penalty)
        weight = torch.linalg.solve(gram, cross / scale[:, None]) / scale[:, None]
        bias = self.y.cpu() / self.n - mean @ weight
        return weight.T.float(), bias.float()

    def spread(
        self, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean and variance of x @ weight.T + bias over all data, and the explained share.

        The explained share is the part of the target's variance that the fit explains. All three
        are [n_target], as bias; weight is [n_target, n_embd].
        """
        mean, cov, cross = self.moments()
        weight = weight.T.double()
        variance = (self.yy / self.n - (self.y / self.n) ** 2).clamp(min=1e-12).cpu()
        predicted = (weight * (cov @ weight)).sum(0)
        explained = (2 * (weight * cross).sum(0) - predicted) / variance
        return mean @ weight + bias.double(), predicted, explained
