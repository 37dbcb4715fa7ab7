"""One line that tells how far long work has come.

On a terminal the line stays in place, with a bar. Elsewhere a line is printed after 5 seconds, and
then every 15. Work in one piece, of which nobody knows how far it has come, tells its time:

    with stage("loading mod"): ...

    progress = Progress()
    for item in progress.count("prefill 512", items): ...
    progress.tell("tokenising", done, total, "2.1 million tokens")   # where the work is no list
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

from mod_export.common.text import clock

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

FIRST_SECONDS = 5.0  # before the first line where there is no terminal
LINE_SECONDS = 15.0  # between two lines


@contextlib.contextmanager
def stage(label: str) -> Iterator[None]:
    """Log `label: 0:05 so far` as long as the block runs: after 5 seconds, and then every 15.

    A short block logs nothing.
    """
    start, done = time.monotonic(), threading.Event()

    def tell():
        wait = FIRST_SECONDS
        while not done.wait(wait):
            logger.info(f"{label}: {clock(time.monotonic() - start)} so far")
            wait = LINE_SECONDS

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Progress:
    """Shows `label: 3 of 12, note, 0:40 left` on a stream, by default stderr."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.start = time.monotonic()
        self.last = self.start + FIRST_SECONDS - LINE_SECONDS
        # Of several processes of a training run one speaks: the loggers of the others are off.
        self.silent = logging.getLogger("mod_export").level > logging.CRITICAL
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Seconds since this progress was made."""
        return time.monotonic() - self.start

    def count(self, label: str, items: Iterable, weights: list[float] | None = None) -> Iterator:
        """Yield the items and show how many are done.

        weights: the time that each item takes, in any unit; by default all take the same time.
        """
        items = list(items)
        weights = weights or [1.0] * len(items)
        start, done, total = time.monotonic(), 0.0, sum(weights)
        try:
            for i, (item, weight) in enumerate(zip(items, weights, strict=True)):
                text = f"{label}: {i + 1} of {len(items)}"
                if done:
                    left = (time.monotonic() - start) / done * (total - done)
                    text += f", {clock(left)} left"
                self.show(text, done / total)
                yield item
                done += weight
        finally:
            self.clear()

    def tell(
        self, label: str, done: float, total: float, note: str = "", before: float = 0.0
    ) -> None:
        """Show `label: 34 %, note, 0:40 left`.

        before: the part of `done` that was there when this progress was made.
        """
        share = min(1.0, done / total) if total else 1.0
        parts = [f"{share:.0%}"]
        if note:
            parts.append(note)
        if done > before:
            left = self.seconds / (done - before) * max(0.0, total - done)
            parts.append(f"{clock(left)} left")
        self.show(f"{label}: {', '.join(parts)}", share)

    def show(self, text: str, share: float | None = None) -> None:
        """Show a line: on a terminal at once, elsewhere now and then.

        share: how much is done, from 0 to 1; a terminal shows it as a bar.
        """
        if self.silent:
            return
        if self.terminal:
            self._draw(text, share)
        elif time.monotonic() - self.last > LINE_SECONDS:
            self.last = time.monotonic()
            print(text, file=self.stream, flush=True)

    def _draw(self, text: str, share: float | None) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=1.0, file=self.stream, leave=False, dynamic_ncols=True)
        self._bar.bar_format = "{desc}" if share is None else "{desc}  |{bar:20}|"
        self._bar.n = share or 0.0
        self._bar.set_description_str(text)

    def clear(self) -> None:
        """Wipe the line of the terminal, so that other output can follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
