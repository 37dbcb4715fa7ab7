"""The losses in one pass against the plain formulas, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from mod_export.training import losses as train_losses
from mod_export.training.losses import hidden_loss, logit_loss

N, VOCAB = 37, 50


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, VOCAB, generator=g).to(dtype) for _ in range(2))
    return (
        student.requires_grad_(),
        teacher,
        torch.randint(VOCAB, (N,), generator=g),
        torch.rand(N, generator=g) > 0.3,
    )


def plain(student, teacher, targets, counts, kl_weight, lm_weight):
    q, p = student.float().log_softmax(-1)[counts], teacher.float().log_softmax(-1)[counts]
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean")
    nll = F.nll_loss(q, targets[counts])
    return kl_weight * kl + lm_weight * nll, kl, nll


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)], ids=["kl", "lm", "both"])
def test_losses_and_gradients(weights, monkeypatch):
    monkeypatch.setattr(train_losses, "ROWS", 8)
    student, teacher, targets, counts = inputs()
    for expected, found in zip(
        plain(student, teacher, targets, counts, *weights),
        logit_loss(student, teacher, targets, counts, *weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    (expected,) = torch.autograd.grad(
        3 * plain(student, teacher, targets, counts, *weights)[0], student
    )
    (found,) = torch.autograd.grad(
        3 * logit_loss(student, teacher, targets, counts, *weights)[0], student
    )
    torch.testing.assert_close(found, expected)
    assert not found[~counts].any()


def test_without_a_teacher_and_in_half_precision():
    student, teacher, targets, counts = inputs(torch.bfloat16)
    loss, kl, nll = logit_loss(student, None, targets, counts, 1.0, 1.0)
    assert kl == 0 and loss == nll
    torch.testing.assert_close(nll, plain(student, teacher, targets, counts, 0, 1)[2])
    loss.backward()
    assert student.grad.dtype == torch.bfloat16 and student.grad.abs().sum() > 0


def test_parts_of_a_step_add_up_where_they_share_a_total():
    student, teacher, targets, counts = inputs()
    (expected,) = torch.autograd.grad(
        logit_loss(student, teacher, targets, counts, 0.7, 0.2)[0], student
    )
    parts, total = (slice(0, 5), slice(5, None)), counts.sum() / 2
    assert counts[parts[0]].sum() != counts[parts[1]].sum()
    given = (student, teacher, targets, counts)
    losses = [logit_loss(*(x[rows] for x in given), 0.7, 0.2, total)[0] for rows in parts]
    (found,) = torch.autograd.grad(sum(losses) / 2, student)
    torch.testing.assert_close(found, expected)


def test_float16_keeps_small_gradients_and_takes_a_large_scale():
    g = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 20000, generator=g) for _ in range(2))
    targets, counts, total = torch.zeros(64, dtype=torch.long), torch.ones(64), torch.tensor(2048.0)
    found = []
    for dtype in (torch.float32, torch.float16):
        logits = student.clone().to(dtype).requires_grad_()
        loss = logit_loss(logits, teacher, targets, counts, total=total)[0]
        (65536.0 * loss).backward()  # the scale that float16 training begins with
        found.append(logits.grad.float())
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


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
