"""Find the tokens of a text that repeat what the text has said before.

Such tokens are system prompts, headers, licences, copied passages. A router learns fast to skip
them. Short conversations consist of such tokens in large part. If the activation counts these,
thresholds come out too low for everything else (docs/how-to/prepare-training-data.md).

    marks = Repeats()
    marks.mark(ids), marks.mark(more_ids)       # bool, for parts of one long row of tokens
    active[counted(novel)]                      # decisions about tokens that are no repeats
"""

from __future__ import annotations

import numpy as np

# Tokens of a passage.
PASSAGE = 8
# Remembered passages, which take 32 MB. A passage that comes again is remembered anew. Others make
# room in time.
SLOTS = 1 << 22
# 2^64 over the golden ratio: an odd number with mixed bits.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def counted(novel):
    """Return the tokens whose activation counts: the novel ones, or all where none is novel.

    novel: bool, tensor or array.
    """
    return novel if novel.any() else ~novel


class Repeats:
    """Remembers hashes of the passages seen.

    Two passages that differ have the same hash with a chance of 2^-64.
    """

    def __init__(self):
        self._seen = np.zeros(SLOTS, np.uint64)
        self._tail = np.zeros(PASSAGE - 1, np.uint64)

    def mark(self, ids: np.ndarray) -> np.ndarray:
        """Return which tokens end a passage that has been seen before, bool [n].

        ids: [n], the next tokens of the row.
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
