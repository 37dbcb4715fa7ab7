"""Decisions that gradients can flow through, for training; evaluation always uses the hard ones.

Two relaxations, both of the logit's distance z to the unit's threshold:

* gate of `attn`, `ffn`, `block`: forward the hard decision, backward as if it were sigmoid(z)
  (straight-through). Every
  token's delta is computed, so skipped tokens tell the router what they miss.
* keys, of `kv` and of the tokens without K/V in `attn` and `block`: log sigmoid((z + noise) /
  temperature), a
  Gumbel-sigmoid sample, is added to the attention scores of that key, for `kv` only beyond the
  window.

Sources: straight-through estimator, Bengio et al., arXiv 1308.3432; Gumbel-sigmoid as in DMS, arXiv
2506.05345.

    with relaxed(base):
        logits, trace = model(ids, trace=True, relax=Relax())
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

FLOOR = -30.0  # of a key's log weight: exp(-30) is nothing, and finite
# queries whose scores are in memory at a time: keys after them are left out, half of the work
CHUNK = 256
_NAME = "mod_relaxed"  # of our attention function in the registry of transformers


@dataclass(frozen=True)
class Relax:
    """temperature, noise: of the keys' samples; without noise they are deterministic.

    lever: of units, a zero that is added to each z: its gradient is that of all of them together
    """

    temperature: float = 0.3
    noise: bool = True
    lever: Mapping[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def gate(self, z: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """1 where active, 0 elsewhere, with the gradient of sigmoid(z); [B, T]."""
        soft = torch.sigmoid(z)
        return active.to(soft.dtype) + (soft - soft.detach())

    def key(self, z: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of a key, [B, T], at most 0; 0 for sinks."""
        if self.noise:
            u = torch.rand_like(z).clamp(1e-6, 1 - 1e-6)
            z = z + torch.log(u) - torch.log1p(-u)
        return F.logsigmoid(z / self.temperature).clamp(min=FLOOR).masked_fill(sink, 0.0)


@dataclass(frozen=True)
class KeyBias:
    """Of one layer. stored, kept: what is added to the scores of its keys, [B, T] or None; kept:
    beyond the window.
    """

    stored: torch.Tensor | None
    kept: torch.Tensor | None
    window: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Additive mask [B, 1, stop - start, stop] of the queries start..stop; a query always sees
        itself.
        """
        some = self.kept if self.stored is None else self.stored
        at = torch.arange(stop, device=some.device)
        distance = at[start:, None] - at
        bias = some.new_zeros(1) if self.stored is None else self.stored[:, None, :stop]
        if self.kept is not None:
            bias = bias + torch.where(distance >= self.window, self.kept[:, None, :stop], 0.0)
        bias = torch.where(distance == 0, 0.0, bias)
        return bias.masked_fill(distance < 0, float("-inf"))[:, None]


@contextmanager
def relaxed(base: nn.Module) -> Iterator[None]:
    """Lets the model's attention read the key biases that its layers set (layers.py). Undone at the
    end.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def is_relaxed(base: nn.Module) -> bool:
    return base.config._attn_implementation == _NAME


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention function of transformers: SDPA, or a chunk of queries at a time where keys have
    a bias.

    query: [B, n_head, T, head_dim] -> [B, T, n_head, head_dim].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as inner

    keys: KeyBias | None = module.__dict__.get("_mod_keys")
    if keys is None:
        return inner(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    kwargs.pop("is_causal", None)
    if (
        query.is_cuda
        and torch.is_grad_enabled()
        and not any(x.requires_grad for x in (query, key, value))
    ):
        query = (
            query.detach().requires_grad_()
        )  # else torch's kernel does not keep what the bias's gradient needs
    n, parts = query.shape[2], []
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        bias = keys.rows(start, stop).to(query.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask[:, :, start:stop, :stop], float("-inf"))
        some = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], bias)
        parts.append(inner(module, *some, scaling=scaling, is_causal=False, **kwargs)[0])
    return torch.cat(parts, dim=1), None
