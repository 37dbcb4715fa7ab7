"""Losses of training: distillation on logits, the language-model loss, hidden states.

Logits of a vocabulary are the largest tensors of training, [tokens, n_vocab]. So both losses on
them are taken in one
pass over rows, and their gradient is made there and then: autograd would keep four copies.

    loss, kl, nll = logit_loss(logits, teacher, targets, weight, kl_weight=1.0, lm_weight=0.0)
"""

from __future__ import annotations

import torch

# rows of logits that are turned into probabilities at a time; few on a CPU, whose cache they then
# stay in: 5 x as fast
ROWS, CPU_ROWS = 256, 16


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
            gradient[rows] = (slope * w).to(
                gradient.dtype
            )  # not over total: float16 would lose most of it
        ctx.save_for_backward(gradient, total)
        kl, nll = kl / total, nll / total
        loss = lm_weight * nll + (kl_weight * kl if teacher is not None else 0.0)
        ctx.mark_non_differentiable(kl, nll)
        return loss, kl, nll

    @staticmethod
    def backward(ctx, outer, *_):
        gradient, total = ctx.saved_tensors
        scale, step = outer.float() / total, CPU_ROWS if gradient.device.type == "cpu" else ROWS
        scaled = torch.empty_like(gradient)
        for at in range(
            0, len(gradient), step
        ):  # in float32: the scale of float16 training is no number of float16
            scaled[at : at + step] = gradient[at : at + step].float() * scale
        return scaled, None, None, None, None, None, None


def logit_loss(
    logits, teacher, targets, weight, kl_weight: float = 1.0, lm_weight: float = 0.0, total=None
):
    """kl_weight KL(teacher || logits) + lm_weight NLL(targets), in nats per token; and both alone,
    without gradient.

    logits, teacher (or None): [N, n_vocab]; targets: [N] token ids; weight: [N], what each row
    counts; total: what the
    sum is divided by, None: the sum of the weights.
    """
    return _LogitLoss.apply(
        logits, teacher, targets, weight.float(), _total(weight, total), kl_weight, lm_weight
    )


def _total(weight: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    return (weight.float().sum() if total is None else total).clamp(min=1e-6)


def hidden_loss(
    states, teacher, weight: torch.Tensor, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared distance of hidden states [B, T, n_embd] of each layer to the teacher's, relative to
    their size.

    states, teacher: tuples as transformers gives them; weight: [B, T]; total: see logit_loss. Mean
    over layers.
    """
    total, parts = _total(weight, total), []
    for mine, other in zip(states[1:], teacher[1:], strict=True):
        distance = (mine.float() - other.float()).pow(2).sum(-1) / other.float().pow(2).sum(
            -1
        ).clamp(min=1e-6)
        parts.append((distance * weight).sum() / total)
    return torch.stack(parts).mean()
