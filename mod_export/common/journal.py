"""Records written one by one, in a file that outlives a stopped run: JSONL, after a line that says
what run it is.

with Partial("out.jsonl.gz", {"seed": 1}) as partial:   # out.jsonl.gz.partial
    for number in range(partial.following, 10): partial.add({"id": number, ...})
    ...
    partial.done()                                      # removes it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mod_export.common.files import lock
from mod_export.errors import UserError


class Partial:
    """The file beside `out`; records have an "id" that grows. A line that was being written at the
    end is dropped.

    count: records in it; following: the id after the last. A file without records does not stay.
    Raises UserError where the file is that of another run, or another process writes it.
    """

    def __init__(self, out: str | Path, identity: dict):
        self.path = Path(f"{out}.partial")
        head = json.dumps(identity).encode() + b"\n"
        self.count = self.following = 0
        self._start = len(head)
        try:
            self._file = open(self.path, "a+b")
        except OSError as exc:
            raise UserError(
                f"cannot write {self.path}: {exc.strerror}", "choose another output"
            ) from exc
        lock(self._file, self._busy)
        self._file.seek(0)
        if self.path.stat().st_size == 0:
            self._file.write(head)
            self._file.flush()
        else:
            found = self._file.readline()
            self._start = len(found)
            if difference := _difference(found, json.loads(head)):
                self._file.close()
                raise UserError(
                    f"{self.path} is of a run with other options: {difference}",
                    "use the same options, or delete it",
                )
        self._find_end()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if not self.count:
            self.path.unlink(missing_ok=True)

    def _busy(self) -> None:
        self._file.close()
        raise UserError(
            f"another process is writing {self.path}", "wait for it, or choose another output"
        )

    def _find_end(self) -> None:
        end = self._start
        for line in self.lines():
            try:
                following = json.loads(line)["id"] + 1
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            end += len(line)
            self.count, self.following = self.count + 1, following
        self._file.truncate(end)
        self._file.seek(end)

    def lines(self) -> Iterator[bytes]:
        """The records' lines, from the first one on."""
        self._file.seek(self._start)
        yield from iter(
            self._file.readline, b""
        )  # `yield from self._file` would close it with the generator

    def add(self, record: dict) -> None:
        """Append a record, at once."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.count += 1

    def done(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _difference(found: bytes, identity: dict) -> str:
    try:
        other = json.loads(found)
    except ValueError:
        return "it does not tell which"
    return ", ".join(
        f"{key} was {other.get(key)}, is {value}"
        for key, value in identity.items()
        if other.get(key) != value
    )
