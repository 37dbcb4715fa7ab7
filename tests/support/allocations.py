"""The bytes that torch's operations hold, at their largest, on any device.

with Allocations() as held:
    loss = model(ids).sum()
    loss.backward()
held.peak     # of what was made within the block; what was there before does not count
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Counts each storage from the operation that makes it until nothing refers to it any more."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_iter((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self._known.setdefault(x.untyped_storage(), 0)  # it was there before
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self._known:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        n_bytes = storage.nbytes()
        self._known[storage] = n_bytes
        self.now += n_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, n_bytes)

    def _remove(self, n_bytes: int) -> None:
        self.now -= n_bytes

    def restart(self) -> None:
        """Let the peak begin anew, from what is held now."""
        self.peak = self.now
