"""Ridge regression against textbook solutions."""

import pytest
import torch

from mod_export.calibration.drift import CHUNK_TOKENS, ChunkMoments
from mod_export.calibration.ridge import Ridge


def test_ridge_is_least_squares():
    """Of each target, as if it were the only one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) * torch.linspace(
        0.1, 30, 12
    )  # dimensions of very different size
    truth = torch.randn(12, 2, generator=generator)
    y = x @ truth + torch.tensor([3.0, -1]) + torch.randn(400, 2, generator=generator)
    fit = Ridge(12, n_target=2)
    fit.add(x[:150], y[:150])
    fit.add(x[150:], y[150:])
    weight, bias = fit.solve(penalty=0)
    ones = torch.cat((x, torch.ones(400, 1)), dim=1).double()
    expected = torch.linalg.lstsq(ones, y.double()).solution
    found = torch.cat((weight.T, bias[None])).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    mean, variance, explained = fit.spread(weight, bias)
    z = x @ weight.T + bias
    assert mean.tolist() == pytest.approx(z.mean(0).tolist(), rel=1e-3)
    assert variance.tolist() == pytest.approx(z.var(0).tolist(), rel=1e-2)
    assert explained.tolist() == pytest.approx((1 - (y - z).var(0) / y.var(0)).tolist(), abs=1e-3)


def test_ridge_tells_less_of_what_drifts():
    """The first input moves with the chunk, and the target with it: told apart within a chunk by
    the second alone.
    """
    torch.manual_seed(0)
    fit, seen = Ridge(6), ChunkMoments()
    for _ in range(8):
        x = torch.randn(CHUNK_TOKENS, 6)
        x[:, 0] = 0.1 * x[:, 0] + torch.randn(1)
        fit.add(x, x[:, :1] + x[:, 1:2])
        seen.add(x)
    drift = seen.drift()
    plain, corrected = (fit.solve(1e-6, rows)[0][0] for rows in (None, 10**0.5 * drift))
    assert torch.allclose(plain, torch.tensor([1.0, 1, 0, 0, 0, 0]), atol=1e-3)
    assert corrected[0].abs() < 0.15 and corrected[1] == pytest.approx(1.0, abs=0.1)
    assert (drift @ corrected).pow(2).sum() < 0.05 * (drift @ plain).pow(2).sum()
