"""A K/V cache for one sequence that stores what a later query can still see, and nothing else.

Each layer has cells of its own, and each K/V head where the heads of a layer decide apart: a token
that is not active in a layer's attention gets none, and a cell whose token the `kv` router did not
keep is freed as soon as the cell is out of the window. Keys carry their RoPE already, so cells can
stand in any order. Positions are kept beside the cells. A recurrent state is that of transformers,
and all tokens go into it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import Cache

from mod_export.model.masks import Kept


@dataclass
class Cells:
    """The cells of one layer, or of one of its K/V heads.

    key, value: [1, n_head_kv or 1, n, head_dim]. position: [n]. keep: bool [n], cells that stay
    beyond the window. window: in tokens.
    """

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    position: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    window: int = 1

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def append(
        self, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, keep: torch.Tensor
    ) -> None:
        if self.key is None:
            self.key, self.value, self.position, self.keep = key, value, position, keep
            return
        self.key = torch.cat((self.key, key), dim=2)
        self.value = torch.cat((self.value, value), dim=2)
        self.position = torch.cat((self.position, position))
        self.keep = torch.cat((self.keep, keep))

    def with_new(
        self, position: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return position and `keep` of the cells and of new ones behind them."""
        if self.position is None:
            return position, keep
        return torch.cat((self.position, position)), torch.cat((self.keep, keep))

    def select(self, index: torch.Tensor) -> None:
        self.key, self.value = self.key[:, :, index], self.value[:, :, index]
        self.position, self.keep = self.position[index], self.keep[index]


class MoDCache(Cache):
    """A cache that looks to the model like a complete one of `n_tokens` tokens.

    heads: for each layer the K/V heads that store apart, 1 where they all store the same tokens.
    recurrent: the layers that have a recurrent state.

    layers.py cuts the masks to the cells. MoDModel calls `start`, the routed layers call `begin`,
    all layers call `update`, and MoDModel calls `finish`.
    """

    is_compileable = False

    def __init__(self, heads: Sequence[int], recurrent: Collection[int] = ()):
        super().__init__(layers=_states(len(heads), recurrent) if recurrent else [])
        self.heads = tuple(heads)
        self.cells = [[Cells() for _ in range(n)] for n in heads]
        self.n_tokens = 0
        self.cell_positions: torch.Tensor | None = None
        self._step: torch.Tensor | None = None
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fork(self) -> MoDCache:
        """Return a cache of the same sequence, to which each of the two appends for itself."""
        other = MoDCache(self.heads)
        # Shallow copies are enough: tensors are replaced, never written to. States are written to.
        other.cells = [[copy.copy(cells) for cells in heads] for heads in self.cells]
        other.layers = copy.deepcopy(self.layers)
        other.n_tokens = self.n_tokens
        return other

    def counts(self) -> list[list[int]]:
        """Return the number of cells in use of each layer, for each head that stores apart."""
        return [[len(cells) for cells in heads] for heads in self.cells]

    def start(self, position: torch.Tensor) -> None:
        """Begin a step with the tokens at `position` [T]."""
        self._step = position
        self._pending.clear()

    def is_partial(self, layer: int) -> bool:
        """Return whether the layer lacks cells of earlier tokens.

        Then the model's own mask does not fit it.
        """
        return any(len(cells) != self.n_tokens for cells in self.cells[layer])

    def begin(self, layer: int, rows: torch.Tensor | None, kept: Kept | None) -> torch.Tensor:
        """Announce what the layer stores of the step's tokens, and what it keeps.

        rows: indices of the stored tokens, None for all. kept: of all tokens, None for all. Returns
        which cells each stored token sees, [H, n_rows, n], where H is the number of heads that
        store apart and n that of the cells of the head with most, new ones included. The positions
        of these cells are in `cell_positions`, [H, n], until the next call. `update` returns K and
        V in the same order: the cells of a head, its new ones, and room that nothing sees.
        """
        heads = self.cells[layer]
        if kept is None:
            kept = Kept(torch.ones_like(self._step, dtype=torch.bool)[None, None], (1,))
        keep = kept.keep[0].expand(len(heads), -1)
        position, keep = (self._step, keep) if rows is None else (self._step[rows], keep[:, rows])
        self._pending[layer] = (position, keep)
        visible, positions = [], []
        for head, cells in enumerate(heads):
            cells.window = kept.windows[head if len(kept.windows) > 1 else 0]
            at, stays = cells.with_new(position, keep[head])
            distance = position[:, None] - at[None, :]
            visible.append((distance >= 0) & (stays[None, :] | (distance < cells.window)))
            positions.append(at)
        longest = max(map(len, positions))
        self.cell_positions = torch.stack([pad(at, (0, longest - len(at))) for at in positions])
        return torch.stack([pad(seen, (0, longest - seen.shape[1])) for seen in visible])

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Store the K and V of this step's tokens, and return those of all cells.

        The model's attention calls this.
        """
        heads = self.cells[layer_idx]
        position, keep = self._pending.get(
            layer_idx, (self._step, torch.ones_like(self._step, dtype=torch.bool)[None])
        )
        if len(heads) == 1:
            heads[0].append(key_states, value_states, position, keep[0])
            return heads[0].key, heads[0].value
        keys, values = key_states.split(1, dim=1), value_states.split(1, dim=1)
        for cells, key, value, of_head in zip(heads, keys, values, keep, strict=True):
            cells.append(key, value, position, of_head)
        longest = max(map(len, heads))
        return tuple(
            torch.cat([pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts], dim=1)
            for parts in ([cells.key for cells in heads], [cells.value for cells in heads])
        )

    def finish(self) -> None:
        """End a step: free the cells that the next query can no longer see."""
        self.n_tokens += len(self._step)
        for cells in (cells for heads in self.cells for cells in heads):
            if len(cells):
                visible = cells.keep | (self.n_tokens - cells.position < cells.window)
                if not bool(visible.all()):
                    cells.select(visible.nonzero()[:, 0])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise NotImplementedError: cells are freed for good, and states cannot go back."""
        raise NotImplementedError("a MoDCache takes no token back; fork it before the token")

    # Transformers asks a cache for the following when it builds its own mask.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0


def _states(n_layer: int, recurrent: Collection[int]) -> list:
    """Return what transformers keeps of recurrent states; of other layers it keeps nothing."""
    from transformers.cache_utils import DummyLayer, LinearAttentionLayer

    return [
        LinearAttentionLayer() if layer in recurrent else DummyLayer() for layer in range(n_layer)
    ]
