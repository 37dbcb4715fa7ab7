"""The controller: targets are followed, and the price is found."""

import pytest
import torch

from mod_export.calibration.thresholds import quantile_logit
from mod_export.training.controller import Controller, groups_of
from mod_export.units import Unit


def train_biases(control, worth, steps, rate=0.02, tokens=64):
    """Units whose only parameters are biases, under Adam.

    worth: of each group, of each of its units. -> activation [steps, n_groups], and of the last
    step that of each unit.
    """
    g, path, threshold = torch.Generator().manual_seed(0), [], torch.zeros(len(worth))
    biases = [torch.nn.Parameter(torch.full_like(w, 2.0)) for w in worth]
    adam = torch.optim.Adam(biases, lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        of_text = torch.randn((), generator=g)  # moves the logits of a whole sequence
        z = [
            b - t + of_text + 2 * torch.randn(tokens, len(b), generator=g)
            for b, t in zip(biases, threshold, strict=True)
        ]
        soft = [torch.sigmoid(x) for x in z]
        # a loss whose gradient at an activation s is -worth (1 - s), with the noise of a batch
        gain = [
            -w * (1 - s.mean(0)).detach() * (1 + torch.randn(len(w), generator=g))
            for w, s in zip(worth, soft, strict=True)
        ]
        prices = control.prices(step)
        loss = sum(
            ((gains + price) * s.mean(0)).mean()
            for gains, price, s in zip(gain, prices, soft, strict=True)
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        slopes = [(s * (1 - s)).mean(0).detach() for s in soft]
        quantile = [
            [quantile_logit(x.detach(), share) for share in shares]
            for x, shares in zip(z, control.shares(step).tolist(), strict=True)
        ]
        rise = torch.stack([(a * b).mean() for a, b in zip(gain, slopes, strict=True)])
        slope = torch.stack([s.mean() for s in slopes])
        threshold = threshold + control.update(step, torch.tensor(quantile), rise, slope)
        path.append(torch.stack([(x >= 0).float().mean() for x in z]))
    return torch.stack(path), [(x >= 0).float().mean(0) for x in z]


def test_the_controller_follows_its_targets_and_finds_the_price():
    groups = groups_of(
        [Unit(1, "kv"), Unit(2, "kv"), Unit(2, "ffn"), Unit(3, "ffn")], per_layer=False
    )
    assert groups == [[(1, "kv"), (2, "kv")], [(2, "ffn"), (3, "ffn")]]
    control = Controller(groups, [0.5, 0.8], [0.84, 0.84], anneal=200)
    assert control.target(0).tolist() == pytest.approx([0.84, 0.84])
    assert control.target(100).tolist() == pytest.approx([0.67, 0.82])
    worth = [torch.tensor([0.04, 0.08]), torch.tensor([0.001, 0.004])]
    path, units = train_biases(control, worth, 1000)
    for start in (0, 50, 100, 200, 600):  # also on the way
        steps = range(start, start + 50)
        targets = torch.stack([control.target(step) for step in steps]).mean(0)
        assert (path[start : start + 50].mean(0) - targets).abs().max() < 0.06, start
    assert (path[600:].mean(0) - torch.tensor([0.5, 0.8])).abs().max() < 0.02
    for few, many in units:
        assert few < many - 0.1  # the budget goes where it is worth more
    # Each unit's worth (1 - s) is the price at its optimum. The values are the means of both units.
    assert control.prices(1000).tolist() == pytest.approx([0.028, 0.0004], rel=0.5)


def test_a_fixed_price_stays_and_a_state_goes_on():
    groups = [[(1, "kv")], [(2, "kv")]]
    assert groups_of([(1, "kv"), (2, "kv")], per_layer=True) == groups
    look, slopes = (
        torch.tensor([[0.3, 0.2], [0.3, 0.2]]),
        (torch.tensor([-0.2, 0.1]), torch.tensor([0.1, 0.1])),
    )
    fixed = Controller(groups, [0.5, 0.5], [0.5, 0.5], fixed=0.1)
    assert (
        fixed.update(0, look, *slopes).tolist()
        == Controller(groups, [0.5, 0.5], [0.5, 0.5]).update(0, look, *slopes).tolist()
    )  # thresholds follow all the same
    assert fixed.prices(1).tolist() == pytest.approx([0.1, 0.1])
    first, second = (Controller(groups, [0.5, 0.5], [0.9, 0.9], anneal=10) for _ in range(2))
    assert first.prices(0).tolist() == [0, 0]
    assert first.update(0, look, *slopes).tolist() == pytest.approx([-0.085, -0.085])
    second.load_state_dict(first.state_dict())
    assert first.prices(1).tolist() == second.prices(1).tolist() == pytest.approx([2, -1])
