"""Fit a linear router to measured costs, in closed form and in one pass over the data.

Knows nothing of models. Inputs are RMS-normed hidden states, as the router will see them.

    fit = Ridge(n_embd=576)
    fit.add(x, cost.log())           # x [N, n_embd], target [N]; as often as there is data
    weight, bias = fit.solve()       # x @ weight + bias predicts the target
"""

from __future__ import annotations

import torch


class Ridge:
    """Least squares with a penalty on standardised inputs.

    Memory is one matrix [n_embd, n_embd], whatever N.
    """

    def __init__(self, n_embd: int):
        self.n = 0
        self.xx = torch.zeros(n_embd, n_embd, dtype=torch.float64)
        self.x, self.xy = torch.zeros(2, n_embd, dtype=torch.float64)
        self.y, self.yy = 0.0, 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the rows x [N, n_embd] with the targets y [N]."""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.xx += x.T @ x
        self.x += x.sum(0)
        self.xy += x.T @ y
        self.y += y.sum().item()
        self.yy += y.pow(2).sum().item()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean of x [n_embd], covariance of x [n_embd, n_embd], covariance of x with y [n_embd]."""
        mean = self.x / self.n
        return (
            mean,
            self.xx / self.n - mean.outer(mean),
            self.xy / self.n - mean * (self.y / self.n),
        )

    def solve(
        self, penalty: float, drift: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight [n_embd] and bias [1], float32.

        penalty: the penalty is set against a variance of 1 of each input.

        drift: [k, n_embd]; the squares of drift @ weight are added to what is minimised.
        """
        mean, cov, cross = self.moments()
        scale = cov.diagonal().clamp(min=1e-12).sqrt()
        if drift is not None:
            cov = cov + drift.double().T @ drift.double()
        gram = cov / scale.outer(scale)
        gram.diagonal().add_(penalty)
        weight = torch.linalg.solve(gram, cross / scale) / scale
        bias = self.y / self.n - mean @ weight
        return weight.float(), bias.reshape(1).float()

    def variance(self) -> float:
        """Variance of the target."""
        return max(self.yy / self.n - (self.y / self.n) ** 2, 1e-12)

    def spread(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[float, float, float]:
        """Return mean and variance of x @ weight + bias over all data, and the explained share.

        The explained share is the part of the target's variance that the fit explains.
        """
        mean, cov, cross = self.moments()
        weight = weight.double()
        predicted = (weight @ cov @ weight).item()
        explained = (2 * (weight @ cross).item() - predicted) / self.variance()
        return (mean @ weight).item() + bias.item(), predicted, explained
