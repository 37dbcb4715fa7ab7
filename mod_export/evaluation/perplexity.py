"""Perplexity of a text, and how far a model's next-token distributions are from the dense model's.

Example:

    found = loss(open_pair("mod.gguf"), pack(tokenizer, text, 2048, count=4))
    found.perplexity, found.kl
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import torch

from mod_export.evaluation.readers import Pair, Usage
from mod_export.metrics import divergence_sums


@dataclass(frozen=True)
class Loss:
    """Means over the tokens that count.

    kl: nats, of dense against MoD. kv_share: cells at the end over those of the dense model.
    Without a MoD model all but `tokens` and `perplexity_dense` are None.
    """

    tokens: int
    perplexity_dense: float
    perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    activation: float | None = None
    kv_share: float | None = None


def loss(pair: Pair, sequences: torch.Tensor, skip: int = 0, progress: Callable = iter) -> Loss:
    """Read the sequences [n, T] with both models.

    The first `skip` positions of each do not count, skip < T - 1: early tokens of a sequence lie
    within every window and tell little of what is forgotten later.
    """
    n, length = sequences.shape
    if not 0 <= skip < length - 1:
        raise ValueError(f"skip is {skip} of sequences of {length} tokens")
    sums, usage = torch.zeros(4, dtype=torch.float64), Usage()
    for ids in progress(sequences):
        sums += _read(pair, ids, skip)
        usage.add(pair.measured)
    count = n * (length - skip - 1)
    kl, nll_dense, nll, same = (sums / count).tolist()
    # torch, because a perplexity may be infinite.
    of_dense, perplexity = torch.tensor([nll_dense, nll], dtype=torch.float64).exp().tolist()
    if pair.mod is None:
        return Loss(count, of_dense)
    return Loss(count, of_dense, perplexity, kl, same, **usage.shares())


def _read(pair: Pair, ids: torch.Tensor, skip: int) -> torch.Tensor:
    """The sums of metrics.divergence over one sequence [T].

    Only readers.ROWS rows of logits of each model are in memory.
    """
    tokens, start = ids.tolist(), 0
    for reader in pair.readers().values():
        reader.reset()
    if skip and not any(reader.whole for reader in pair.readers().values()):
        # Logits that do not count are not computed.
        start = skip
        for reader in pair.readers().values():
            reader.last(tokens[:start])
    others = pair.mod.blocks(tokens[start:]) if pair.mod else repeat(None)
    sums = torch.zeros(4, dtype=torch.float64)
    for dense, other in zip(pair.dense.blocks(tokens[start:]), others, strict=False):
        first, stop = max(skip - start, 0), min(len(dense), len(tokens) - 1 - start)
        if first < stop:
            target = ids[start + first + 1 : start + stop + 1]
            rows = None if other is None else other[first:stop]
            sums += divergence_sums(dense[first:stop], rows, target)
        start += len(dense)
    return sums
