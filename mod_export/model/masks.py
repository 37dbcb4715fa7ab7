"""Which keys a query sees: the attention masks of one forward.

Knows nothing of routers: the callers say which tokens have K/V and which of those are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class MaskBuilder:
    """Makes the masks of all layers of one forward.

    position: [B, T] position of each token in its sequence. kv_window: recent tokens that stay
    visible. additive: the model's attention adds its mask to the scores (eager) instead of reading
    a boolean mask (SDPA).
    """

    position: torch.Tensor
    kv_window: int
    additive: bool = False

    def dense(
        self,
        mask: torch.Tensor | None,
        stored: torch.Tensor | None,
        keep: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Hide in the model's own mask the keys that a query must not see.

        mask: [B or 1, 1, T, T], or None for a causal mask. stored: [B, T] tokens that have K/V.
        keep: [B, T] tokens whose K/V stay beyond the window. None stands for all tokens.

        The diagonal stays visible: the result of an inactive query is not used, and a row without a
        key would be NaN. Where no key is hidden, the mask is the model's own, so that the results
        are the same to the bit.
        """
        hidden = None
        if stored is not None and not bool(stored.all()):
            hidden = ~stored[:, None, :]
        if keep is not None and not bool(keep.all()):
            forgotten = ~keep[:, None, :] & self.far
            hidden = forgotten if hidden is None else hidden | forgotten
        if hidden is None:
            return mask
        visible = ~hidden
        if mask is None:
            return self._as_mask((visible & self.causal | self.diagonal)[:, None])
        return _combine(mask, (visible | self.diagonal)[:, None])

    def sparse(
        self,
        mask: torch.Tensor | None,
        visible: torch.Tensor,
        rows: torch.Tensor | None,
        cell_positions: torch.Tensor,
    ) -> torch.Tensor:
        """Cut the model's own mask to the active rows and the stored cells, and apply `visible`.

        mask: over all positions, or None for a causal mask. visible: [n_rows, n_cells]. rows:
        indices of the active tokens, None for all. cell_positions: [n_cells].
        """
        if mask is None:
            return self._as_mask(visible[None, None])
        mask = mask if rows is None else mask[:, :, rows]
        return _combine(mask[..., cell_positions], visible[None, None])

    @cached_property
    def far(self) -> torch.Tensor:
        """[B or 1, T, T]: the query (row) and the key (column) are at least a window apart."""
        position = self.position.int()
        if bool((position == position[:1]).all()):
            position = position[:1]
        return position[:, :, None] - position[:, None, :] >= self.kv_window

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
