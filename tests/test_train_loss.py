"""The losses in one pass against the plain formulas, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from mod_export import train_loss
from mod_export.train_control import Controller, groups_of
from mod_export.train_loss import hidden_loss, logit_loss

N, VOCAB = 37, 50


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, VOCAB, generator=g).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(VOCAB, (N,), generator=g), torch.rand(N, generator=g) > 0.3


def plain(student, teacher, targets, counts, kl_weight, lm_weight):
    q, p = student.float().log_softmax(-1)[counts], teacher.float().log_softmax(-1)[counts]
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean")
    nll = F.nll_loss(q, targets[counts])
    return kl_weight * kl + lm_weight * nll, kl, nll


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)], ids=["kl", "lm", "both"])
def test_losses_and_gradients(weights, monkeypatch):
    monkeypatch.setattr(train_loss, "ROWS", 8)
    student, teacher, targets, counts = inputs()
    for expected, found in zip(plain(student, teacher, targets, counts, *weights),
                               logit_loss(student, teacher, targets, counts, *weights), strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected)
    (expected,) = torch.autograd.grad(3 * plain(student, teacher, targets, counts, *weights)[0], student)
    (found,) = torch.autograd.grad(3 * logit_loss(student, teacher, targets, counts, *weights)[0], student)
    torch.testing.assert_close(found, expected)
    assert not found[~counts].any()


def test_without_a_teacher_and_in_half_precision():
    student, teacher, targets, counts = inputs(torch.bfloat16)
    loss, kl, nll = logit_loss(student, None, targets, counts, 1.0, 1.0)
    assert kl == 0 and loss == nll
    torch.testing.assert_close(nll, plain(student, teacher, targets, counts, 0, 1)[2])
    loss.backward()
    assert student.grad.dtype == torch.bfloat16 and student.grad.abs().sum() > 0


def test_nothing_that_counts():
    student, teacher, targets, counts = inputs()
    loss = logit_loss(student, teacher, targets, torch.zeros_like(counts))[0]
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_hidden_states_are_compared_relative_to_their_size():
    g = torch.Generator().manual_seed(0)
    teacher = [torch.randn(2, 5, 8, generator=g) * scale for scale in (1, 1, 100)]
    student = [teacher[0] + 7, teacher[1] * 1.1, teacher[2] * 1.1]  # the embeddings are left out
    assert hidden_loss(student, teacher, torch.ones(2, 5)).item() == pytest.approx(0.01, rel=1e-4)
    weight = torch.zeros(2, 5)
    weight[0, 1] = 1
    student[1][0, 1] = teacher[1][0, 1] * 2
    assert hidden_loss(student, teacher, weight).item() == pytest.approx((1 + 0.01) / 2, rel=1e-4)


def simulate(control, steps, price, rate=0.02, noise=0.02):
    """Routers under Adam: the gradient of an activation is the load term's weight less what the activation is worth."""
    g, x, path = torch.Generator().manual_seed(0), torch.full((len(price),), 2.0), []
    mean, square = torch.zeros(len(price)), torch.zeros(len(price))
    for step in range(steps):
        activation = (torch.sigmoid(x) + noise * torch.randn(len(price), generator=g)).clamp(0, 1)
        worth = price * (1 - torch.sigmoid(x)) + price * torch.randn(len(price), generator=g)  # of one batch
        slope = torch.sigmoid(x) * (1 - torch.sigmoid(x)) * (control.weights(step) - worth)
        mean, square = 0.9 * mean + 0.1 * slope, 0.95 * square + 0.05 * slope**2
        x = x - rate * mean / (square.sqrt() + 1e-12)
        control.update(step, activation, loss=0.01)
        path.append(torch.sigmoid(x))
    return torch.stack(path)


def test_the_controller_reaches_its_targets_and_holds_them():
    groups = groups_of([(1, "kv"), (2, "kv"), (2, "ffn")], per_layer=False)
    assert groups == [[(1, "kv"), (2, "kv")], [(2, "ffn")]]
    control = Controller(groups, [0.5, 0.8], [0.88, 0.88], anneal=100)
    assert control.target(0).tolist() == pytest.approx([0.88, 0.88])
    assert control.target(50).tolist() == pytest.approx([0.69, 0.84])
    path = simulate(control, 1000, torch.tensor([0.05, 0.002]))
    assert (path[600:].mean(0) - torch.tensor([0.5, 0.8])).abs().max() < 0.03
    assert (path[600:] - torch.tensor([0.5, 0.8])).abs().max() < 0.1


def test_a_fixed_weight_stays_and_a_state_goes_on():
    groups = [[(1, "kv")], [(2, "kv")]]
    assert groups_of([(1, "kv"), (2, "kv")], per_layer=True) == groups
    fixed = Controller(groups, [0.5, 0.5], [0.5, 0.5], fixed=0.1)
    fixed.update(0, torch.tensor([0.9, 0.9]), 1.0)
    assert fixed.weights(1).tolist() == pytest.approx([0.1, 0.1])
    first, second = (Controller(groups, [0.5, 0.5], [0.9, 0.9], anneal=10) for _ in range(2))
    simulate(first, 5, torch.tensor([0.1, 0.1]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weights(5), second.weights(5)) and first.weights(5).abs().sum() > 0
