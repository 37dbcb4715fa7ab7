"""What drifts in the inputs of routers: statistics over chunks of text and over positions.

A router sees more than the token. The kind of text, and how much text came before, move the hidden
states of hundreds of tokens together, and with them the share of tokens that reaches p. Two
covariances measure this: that of the inputs' means over chunks of text, and, above all, that of
what all texts have in common at a position. Calibration adds both to its ridge
(ridge.Ridge.solve), and training takes their directions out of router weights
(training/steady_router.py).

    statistics = router_inputs(model, sequences, ChunkMeans)
    statistics[Unit(5, "kv")].drift()                            # [k, n_embd]
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mod_export.common.progress import Progress
from mod_export.model.mod_model import MoDModel
from mod_export.model.router import rms_norm
from mod_export.units import Unit

CHUNK_TOKENS = 256  # a mean over so many tokens shows what drifts
# Weight of the covariance of the position buckets over that of the chunks. The first is known less
# well and does more: it has one sign at the beginning of each text, and the other thousands of
# tokens later.
BUCKET_WEIGHT = 500.0


class ChunkMeans:
    """The means of a router's inputs over chunks, and the position bucket of each chunk."""

    def __init__(self):
        self.means: list[torch.Tensor] = []
        self.position_buckets: list[int] = []

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs x [T, n_embd] of one sequence from its beginning."""
        for number, chunk in enumerate(x.split(CHUNK_TOKENS)):
            self.means.append(chunk.mean(0))
            # Buckets hold 1, 1, 2, 4, ... chunks, because what moves slows down.
            self.position_buckets.append(number.bit_length())

    def mean(self) -> torch.Tensor:
        """Return the mean [n_embd], in which each chunk counts alike."""
        return torch.stack(self.means).mean(0)

    def drift(self) -> torch.Tensor:
        """Return rows [k, n_embd] whose Gram matrix is the covariance of what drifts.

        This is the covariance of the chunks' means, plus BUCKET_WEIGHT times that of the means of
        the position buckets.
        """
        means, buckets = torch.stack(self.means), torch.tensor(self.position_buckets)
        of_buckets = torch.stack(
            [means[buckets == bucket].mean(0) for bucket in sorted(set(self.position_buckets))]
        )
        parts = ((means, 1.0), (of_buckets, BUCKET_WEIGHT))
        return torch.cat([(x - x.mean(0)) * (weight / len(x)) ** 0.5 for x, weight in parts])


class ChunkMoments(ChunkMeans):
    """The means over chunks, and the covariance within chunks, which lies on the CPU.

    The covariances of all layers together are larger than some GPUs.
    """

    def __init__(self):
        super().__init__()
        self.n = 0
        self.squares: torch.Tensor | float = 0.0  # [n_embd, n_embd]

    def add(self, x: torch.Tensor) -> None:
        super().add(x)
        chunks = [chunk - chunk.mean(0) for chunk in x.split(CHUNK_TOKENS)]
        centered = torch.cat(chunks)
        self.squares = self.squares + (centered.T @ centered).cpu()
        self.n += len(centered)

    def within(self) -> torch.Tensor:
        """Return the covariance within chunks, [n_embd, n_embd]."""
        return self.squares / self.n


@torch.no_grad()
def router_inputs(
    model: MoDModel,
    sequences: torch.Tensor,
    statistic: type[ChunkMeans],
    forward: Callable | None = None,
) -> dict[Unit, ChunkMeans]:
    """Read sequences [n, T], and return a statistic of the inputs of the routers of each layer.

    The result is {Unit(layer, kind): statistic}: the units of the heads of a layer read the same.
    forward: a forward of the model; None is the model's own.
    """
    statistics, hooks = {}, []
    for place, units in model.config.by_layer().items():
        statistics[place] = found = statistic()

        def add(router, args, found=found):
            with torch.autocast(args[0].device.type, enabled=False):
                found.add(rms_norm(args[0][0], router.eps))

        hooks.append(model.router(units[0]).register_forward_pre_hook(add))
    try:
        for ids in Progress().count("measuring what drifts", sequences):
            (forward or model)(ids[None].to(model.base.device), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics
