"""Keep rows of a study as lines of JSON, each written as soon as it is measured."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

logger = logging.getLogger(f"mod_export.{__name__}")  # the handler of mod_export prints it


def read(path: Path) -> list[dict]:
    """Return the rows of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict) -> None:
    """Write the row, and show it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


class NamedRows:
    """Rows in a file, each with a unique `name`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.done = {row["name"]: row for row in read(path)}

    def add(self, name: str, make, **more) -> dict:
        """Return the row of that name, which `make` makes as an object if it is not there."""
        if name not in self.done:
            start = time.process_time()
            row = {"name": name, **more, **vars(make())}
            row["cpu_seconds"] = round(time.process_time() - start, 1)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            logger.info(
                f"{name}: activation {row['activation']:.3f}, KV {row['kv_share']:.3f}, "
                f"KL {row['kl']:.4f}"
            )
            self.done[name] = row
        return self.done[name]
