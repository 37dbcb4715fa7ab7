"""Losses of training: distillation on logits, the language-model loss, hidden states.

Logits of a vocabulary are the largest tensors of training, [tokens, n_vocab]. So one pass over the
rows takes both losses and makes their gradient. Autograd would keep four copies.

    loss, kl, nll = logit_loss(logits, teacher, targets, weight, kl_weight=1.0, lm_weight=0.0)
"""

from __future__ import annotations

import torch

# Rows of logits that are turned into probabilities at a time.
ROWS = 256
# The same on a CPU: few rows stay in its cache, which is 5 times as fast.
CPU_ROWS = 16


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher, targets, weight, total, kl_weight, lm_weight):
        kl = nll = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits)
        step = CPU_ROWS if logits.device.type == "cpu" else ROWS
        for at in range(0, len(logits), step):
            rows = slice(at, at + step)
            w = weight[rows, None]
            log_q = logits[rows].float().log_softmax(-1)
            slope = log_q.exp()
            of_target = log_q.gather(1, targets[rows, None])
            nll = nll - (w * of_target).sum()
            slope *= (kl_weight if teacher is not None else 0.0) + lm_weight
            if teacher is not None:
                log_p = teacher[rows].float().log_softmax(-1)
                p = log_p.exp()
                kl = kl + (w * (p * (log_p - log_q))).sum()
                slope.sub_(p, alpha=kl_weight)
            slope.scatter_add_(1, targets[rows, None], torch.full_like(of_target, -lm_weight))
            # The division by total waits for the backward pass: float16 would lose most of it.
            gradient[rows] = (slope * w).to(gradient.dtype)
        ctx.save_for_backward(gradient, total)
        kl, nll = kl / total, nll / total
        loss = lm_weight * nll + (kl_weight * kl if teacher is not None else 0.0)
        ctx.mark_non_differentiable(kl, nll)
        return loss, kl, nll

    @staticmethod
    def backward(ctx, outer, *_):
        gradient, total = ctx.saved_tensors
        scale = outer.float() / total
        step = CPU_ROWS if gradient.device.type == "cpu" else ROWS
        scaled = torch.empty_like(gradient)
        # The product is made in float32: the scale of float16 training is no number of float16.
        for at in range(0, len(gradient), step):
            scaled[at : at + step] = gradient[at : at + step].float() * scale
        return scaled, None, None, None, None, None, None


def logit_loss(
    logits, teacher, targets, weight, kl_weight: float = 1.0, lm_weight: float = 0.0, total=None
):
    """Return the loss on logits, and its parts kl and nll without gradient.

    The loss is kl_weight KL(teacher || logits) + lm_weight NLL(targets), in nats per token.

    logits: [N, n_vocab]. teacher: the same, or None. targets: [N] token ids. weight: [N], what each
    row counts. total: what the sum is divided by; None is the sum of the weights.
    """
    return _LogitLoss.apply(
        logits, teacher, targets, weight.float(), _total(weight, total), kl_weight, lm_weight
    )


def _total(weight: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    return (weight.float().sum() if total is None else total).clamp(min=1e-6)


def hidden_loss(
    states, teacher, weight: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the squared distance of hidden states to the teacher's, relative to their size.

    The result is the mean over layers. states, teacher: the states [B, T, n_embd] before each layer
    and at the end, as transformers gives them. weight: [B, T]. total: see logit_loss.
    """
    total, parts = _total(weight, total), []
    for mine, other in zip(states[1:], teacher[1:], strict=True):
        distance = (mine.float() - other.float()).pow(2).sum(-1) / other.float().pow(2).sum(
            -1
        ).clamp(min=1e-6)
        parts.append((distance * weight).sum() / total)
    return torch.stack(parts).mean()
