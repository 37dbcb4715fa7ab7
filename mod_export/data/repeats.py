"""Which tokens of a text say once more what it has said before: system prompts, headers, licences,
copied passages.

A router learns fast to skip such tokens, and of short conversations they are a large part. Counted
in the activation, they let thresholds come out too low for everything else (docs/how-to/prepare-training-data.md).

    marks = Repeats()
    marks.mark(ids), marks.mark(more_ids)       # bool, of parts of one long row of tokens
    active[counted(novel)]                      # of tokens that are none
"""

from __future__ import annotations

import numpy as np

PASSAGE = 8  # tokens
SLOTS = (
    1 << 22
)  # remembered passages: 32 MB; one that comes again is remembered anew, others make room in time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with mixed bits: 2^64 over the golden ratio


def counted(novel):
    """novel: bool, tensor or array -> the tokens whose activation counts: these, and all where
    there are none.
    """
    return novel if novel.any() else ~novel


class Repeats:
    """Remembers hashes of the passages seen; two that differ have the same with a chance of 2^-64."""

    def __init__(self):
        self._seen = np.zeros(SLOTS, np.uint64)
        self._tail = np.zeros(PASSAGE - 1, np.uint64)

    def mark(self, ids: np.ndarray) -> np.ndarray:
        """ids: [n], the next tokens -> bool [n]: the PASSAGE tokens that end here have been seen
        before.
        """
        row = np.concatenate((self._tail, np.asarray(ids).astype(np.uint64) + np.uint64(1)))
        self._tail = row[len(row) - (PASSAGE - 1) :]
        n, hashes = len(ids), np.zeros(len(ids), np.uint64)
        for k in range(PASSAGE):
            hashes = (hashes + row[k : k + n]) * _FACTOR
            hashes ^= hashes >> np.uint64(29)
        slots = hashes >> np.uint64(64 - SLOTS.bit_length() + 1)
        again = self._seen[slots] == hashes
        first = np.zeros(n, bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        self._seen[slots] = hashes
        return again | ~first
