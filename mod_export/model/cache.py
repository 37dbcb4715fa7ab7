"""A K/V cache for one sequence that stores what a later query can still see, and nothing else.

Each layer has cells of its own: a token that is not active in a layer's attention gets none, and a
cell whose token the `kv` router did not keep is freed as soon as the cell is out of the window.
Keys carry their RoPE already, so cells can stand in any order. Positions are kept beside the cells.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import Cache


@dataclass
class Cells:
    """The cells of one layer.

    key, value: [1, n_head_kv, n, head_dim]. position: [n]. keep: bool [n], cells that stay beyond
    the window.
    """

    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    position: torch.Tensor | None = None
    keep: torch.Tensor | None = None

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

    def select(self, index: torch.Tensor) -> None:
        self.key, self.value = self.key[:, :, index], self.value[:, :, index]
        self.position, self.keep = self.position[index], self.keep[index]


class MoDCache(Cache):
    """A cache that looks to the model like a complete one of `n_tokens` tokens.

    layers.py cuts the masks to the cells. MoDModel calls `start`, the routed layers call `begin`,
    all layers call `update`, and MoDModel calls `finish`.
    """

    is_compileable = False

    def __init__(self, n_layer: int):
        super().__init__(layers=[])
        self.cells = [Cells() for _ in range(n_layer)]
        self.n_tokens = 0
        self.cell_positions: torch.Tensor | None = None
        self._step: torch.Tensor | None = None
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fork(self) -> MoDCache:
        """Return a cache of the same sequence, to which each of the two appends for itself."""
        other = MoDCache(len(self.cells))
        # Shallow copies are enough: tensors are replaced, never written to.
        other.cells = [copy.copy(cells) for cells in self.cells]
        other.n_tokens = self.n_tokens
        return other

    def counts(self) -> list[int]:
        """Return the number of cells in use of each layer."""
        return [len(cells) for cells in self.cells]

    def start(self, position: torch.Tensor) -> None:
        """Begin a step with the tokens at `position` [T]."""
        self._step = position
        self._pending.clear()

    def is_partial(self, layer: int) -> bool:
        """Return whether the layer lacks cells of earlier tokens.

        Then the model's own mask does not fit it.
        """
        return len(self.cells[layer]) != self.n_tokens

    def begin(
        self, layer: int, rows: torch.Tensor | None, keep: torch.Tensor | None, window: int
    ) -> torch.Tensor:
        """Announce what the layer stores of the step's tokens, and what it keeps.

        rows: indices of the stored tokens, None for all. keep: [T], of all tokens. Returns which
        cells each stored token sees, [n_rows, n_cells + n_rows], their own cells last. The
        positions of these cells are in `cell_positions` until the next call.
        """
        keep = torch.ones_like(self._step, dtype=torch.bool) if keep is None else keep
        position, keep = (self._step, keep) if rows is None else (self._step[rows], keep[rows])
        self._pending[layer] = (position, keep)
        cells = self.cells[layer]
        self.cell_positions = position if not len(cells) else torch.cat((cells.position, position))
        kept = keep if not len(cells) else torch.cat((cells.keep, keep))
        distance = position[:, None] - self.cell_positions[None, :]
        return (distance >= 0) & (kept[None, :] | (distance < window))

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Store the K and V of this step's tokens, and return those of all cells.

        The model's attention calls this.
        """
        position, keep = self._pending.get(
            layer_idx, (self._step, torch.ones_like(self._step, dtype=torch.bool))
        )
        self.cells[layer_idx].append(key_states, value_states, position, keep)
        return self.cells[layer_idx].key, self.cells[layer_idx].value

    def finish(self, window: int) -> None:
        """End a step: free the cells that the next query can no longer see."""
        self.n_tokens += len(self._step)
        for cells in self.cells:
            if len(cells):
                visible = cells.keep | (self.n_tokens - cells.position < window)
                if not bool(visible.all()):
                    cells.select(visible.nonzero()[:, 0])

    # Transformers asks a cache for the following when it builds its own mask.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0
