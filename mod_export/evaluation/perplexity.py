"""Perplexity of a text, and how far a model's next-token distributions are from the dense model's.

Example:

    found = loss(open_pair("mod.gguf"), pack(tokenizer, text, 2048, count=4))
    found.perplexity, found.kl
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch

from mod_export.evaluation.readers import Pair, Reader, Usage
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
    others = [pair.mod] if pair.mod else []
    return losses(pair.dense, others, sequences, skip, progress)[-1]


def losses(
    dense: Reader,
    others: Sequence[Reader],
    sequences: torch.Tensor,
    skip: int = 0,
    progress: Callable = iter,
) -> list[Loss]:
    """Read the sequences [n, T] with several models beside the dense one, which reads them once.

    Returns the loss of the dense model alone, then that of each other one. skip: see `loss`.
    """
    n, length = sequences.shape
    if not 0 <= skip < length - 1:
        raise ValueError(f"skip is {skip} of sequences of {length} tokens")
    sums = torch.zeros(max(1, len(others)), 4, dtype=torch.float64)
    usages = [Usage() for _ in others]
    for ids in progress(sequences):
        sums += _read(dense, others, ids, skip)
        for usage, reader in zip(usages, others, strict=True):
            usage.add(reader)
    count = n * (length - skip - 1)
    # torch, because a perplexity may be infinite.
    perplexities = (sums / count).exp()
    of_dense = perplexities[0, 1].item()
    return [
        Loss(count, of_dense),
        *(
            Loss(
                count,
                of_dense,
                perplexities[i, 2].item(),
                (sums[i, 0] / count).item(),
                (sums[i, 3] / count).item(),
                **usage.shares(),
            )
            for i, usage in enumerate(usages)
        ),
    ]


def _read(dense: Reader, others: Sequence[Reader], ids: torch.Tensor, skip: int) -> torch.Tensor:
    """The sums of metrics.divergence over one sequence [T], for each of the others [n, 4].

    Without others there is one row. Only readers.ROWS rows of logits of each model are in memory.
    """
    tokens, start, readers = ids.tolist(), 0, [dense, *others]
    for reader in readers:
        reader.reset()
    if skip and not any(reader.whole for reader in readers):
        # Logits that do not count are not computed.
        start = skip
        for reader in readers:
            reader.last(tokens[:start])
    beside = [reader.blocks(tokens[start:]) for reader in others] or [repeat(None)]
    sums = torch.zeros(len(beside), 4, dtype=torch.float64)
    for rows, *rows_of_others in zip(dense.blocks(tokens[start:]), *beside, strict=False):
        first, stop = max(skip - start, 0), min(len(rows), len(tokens) - 1 - start)
        if first < stop:
            target = ids[start + first + 1 : start + stop + 1]
            for i, other in enumerate(rows_of_others):
                compared = None if other is None else other[first:stop]
                sums[i] += divergence_sums(rows[first:stop], compared, target)
        start += len(rows)
    return sums
