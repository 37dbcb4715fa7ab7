"""Which keys a query sees: the attention masks of one forward.

Knows nothing of routers: the callers say which tokens have K/V and which of those are kept.
Where the K/V heads of a layer keep different tokens, its mask has a plane for each query head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Kept:
    """The tokens whose K/V stay visible beyond the window, in one layer.

    keep: [B, H, T], where H is 1, or the number of K/V heads where each of them keeps its own
    tokens. windows: of these heads, in tokens.
    """

    keep: torch.Tensor
    windows: tuple[int, ...]

    def joined(self) -> Kept:
        """Return the same with one head where all heads keep the same tokens."""
        first = self.keep[:, :1]
        if len(self.windows) == 1 or len(set(self.windows)) > 1:
            return self
        return Kept(first, self.windows[:1]) if bool((self.keep == first).all()) else self


@dataclass
class MaskBuilder:
    """Makes the masks of all layers of one forward.

    position: [B, T] position of each token in its sequence. additive: the model's attention adds
    its mask to the scores (eager) instead of reading a boolean mask (SDPA). group: query heads that
    share a K/V head.
    """

    position: torch.Tensor
    additive: bool = False
    group: int = 1
    _far: dict[int, torch.Tensor] = field(default_factory=dict)

    def dense(
        self, mask: torch.Tensor | None, stored: torch.Tensor | None, kept: Kept | None
    ) -> torch.Tensor | None:
        """Hide in the model's own mask the keys that a query must not see.

        mask: [B or 1, 1, T, T], or None for a causal mask. stored: [B, T] tokens that have K/V.
        None stands for all tokens, also for `kept`. The result is [B or 1, 1, T, T], or
        [B or 1, n_head, T, T] where heads see different keys.

        The diagonal stays visible: the result of an inactive query is not used, and a row without a
        key would be NaN. Where no key is hidden, the mask is the model's own, so that the results
        are the same to the bit.
        """
        hidden = None
        if stored is not None and not bool(stored.all()):
            hidden = ~stored[:, None, None, :]
        if kept is not None and not bool(kept.keep.all()):
            kept = kept.joined()
            forgotten = ~kept.keep[:, :, None, :] & self.far(kept.windows)
            hidden = forgotten if hidden is None else hidden | forgotten
        if hidden is None:
            return mask
        visible = ~self._of_query_heads(hidden)
        if mask is None:
            return self._as_mask(visible & self.causal | self.diagonal)
        return _combine(mask, visible | self.diagonal)

    def sparse(
        self,
        mask: torch.Tensor | None,
        visible: torch.Tensor,
        rows: torch.Tensor | None,
        cell_positions: torch.Tensor,
    ) -> torch.Tensor:
        """Cut the model's own mask to the active rows and the stored cells, and apply `visible`.

        mask: over all positions, or None for a causal mask. visible: [H, n_rows, n_cells], where H
        is 1 or the number of K/V heads. rows: indices of the active tokens, None for all.
        cell_positions: [H, n_cells].
        """
        visible = self._of_query_heads(visible[None])
        if mask is None:
            return self._as_mask(visible)
        mask = mask if rows is None else mask[:, :, rows]
        planes = torch.cat([mask[..., positions] for positions in cell_positions], dim=1)
        return _combine(self._of_query_heads(planes), visible)

    def far(self, windows: tuple[int, ...]) -> torch.Tensor:
        """[B or 1, len(windows), T, T]: the query (row) is at least a window after the key."""
        if len(set(windows)) == 1:
            return self._at_least(windows[0])
        return torch.cat([self._at_least(window) for window in windows], dim=1)

    def _at_least(self, distance: int) -> torch.Tensor:
        """[B or 1, 1, T, T]: the query (row) is so many tokens after the key (column), or more."""
        if distance not in self._far:
            self._far[distance] = (self._distance >= distance)[:, None]
        return self._far[distance]

    @cached_property
    def _distance(self) -> torch.Tensor:
        """[B or 1, T, T]: tokens from the key (column) to the query (row)."""
        position = self.position.int()
        if bool((position == position[:1]).all()):
            position = position[:1]
        return position[:, :, None] - position[:, None, :]

    def _of_query_heads(self, planes: torch.Tensor) -> torch.Tensor:
        """[B, n_head_kv, ...] -> [B, n_head, ...]; one plane for all heads stays one."""
        return planes if planes.shape[1] == 1 else planes.repeat_interleave(self.group, dim=1)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """[T, T]: the query and the key are the same token."""
        return torch.eye(self.position.shape[1], dtype=torch.bool, device=self.position.device)

    @cached_property
    def causal(self) -> torch.Tensor:
        """[T, T]: the key is not later than the query."""
        return torch.ones_like(self.diagonal).tril()

    def _as_mask(self, visible: torch.Tensor) -> torch.Tensor:
        if not self.additive:
            return visible
        mask = torch.zeros_like(visible, dtype=torch.float32)
        return mask.masked_fill(~visible, torch.finfo(torch.float32).min)


def _combine(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
