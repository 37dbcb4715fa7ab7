"""One line that tells how far long work has come: in place on a terminal, else every now and then.

progress = Progress()
for i in progress.count("prefill 512", items): ...
progress.tell("tokenising", done, total, "2.1 million tokens")   # where the work is no list
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

EVERY = 15.0  # s between lines where there is no terminal


class Progress:
    """Shows `label: 3 of 12, note, 0:40 left` on a stream, by default stderr."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.start = self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.monotonic() - self.start

    def count(self, label: str, items: Iterable, weights: list[float] | None = None) -> Iterator:
        """Yields the items, telling how many are done. weights: how long each takes, in any unit."""
        items = list(items)
        weights = weights or [1.0] * len(items)
        start, done = time.monotonic(), 0.0
        try:
            for i, (item, weight) in enumerate(zip(items, weights, strict=True)):
                left = (time.monotonic() - start) / done * (sum(weights) - done) if done else None
                self.show(
                    f"{label}: {i + 1} of {len(items)}"
                    + (f", {clock(left)} left" if left is not None else "")
                )
                yield item
                done += weight
        finally:
            self.clear()

    def tell(
        self, label: str, done: float, total: float, note: str = "", before: float = 0.0
    ) -> None:
        """Shows `label: 34 %, note, 0:40 left`. before: how much of `done` was there when this
        progress was made.
        """
        share = min(1.0, done / total) if total else 1.0
        left = self.seconds / (done - before) * max(0.0, total - done) if done > before else None
        parts = [
            f"{share:.0%}",
            *filter(None, [note]),
            *([f"{clock(left)} left"] if left is not None else []),
        ]
        self.show(f"{label}: {', '.join(parts)}")

    def show(self, text: str) -> None:
        """Shows a line: at once on a terminal, elsewhere every EVERY seconds."""
        if self.terminal:
            print(f"\r{text}\033[K", end="", file=self.stream, flush=True)
        elif time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Wipes the terminal's line, so that other output can follow."""
        if self.terminal:
            print("\r\033[K", end="", file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
