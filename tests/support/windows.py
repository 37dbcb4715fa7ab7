"""What a layer's attention sees of a text: a sliding window, or the chunk of the query."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The last `size` positions, or with `chunked` those of the query's chunk of `size` positions.

    start: the position that a test counts as 0. Chunks are counted from the real one.
    """

    size: int
    chunked: bool = False
    start: int = 0

    def first(self, query: int) -> int:
        """Return the first position that a query sees; negative where it sees all of them."""
        if not self.chunked:
            return query - self.size + 1
        at = query + self.start
        return at - at % self.size - self.start

    def last(self, position: int) -> int:
        """Return the last query that sees a position."""
        first = self.first(position) if self.chunked else position
        return first + self.size - 1
