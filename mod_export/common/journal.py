"""Records that are written one by one, in a JSONL file that outlives a stopped run.

The first line of the file says which run it belongs to.

    with Journal("out.jsonl.gz", {"seed": 1}) as journal:   # out.jsonl.gz.partial
        for number in range(journal.following, 10):
            journal.add({"id": number, ...})
        ...
        journal.done()                                      # removes the file
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mod_export.common.files import locked
from mod_export.errors import UserError


class Journal:
    """The file `out.partial`, whose records have an "id" that grows.

    count: the number of records; following: the id after the last one. A line at the end that is
    not whole is dropped. A file without records does not stay. Raises UserError where the file
    belongs to another run, and where another process writes it.
    """

    def __init__(self, out: str | Path, identity: dict):
        self.path = self.path_of(out)
        head = json.dumps(identity).encode() + b"\n"
        self.count = self.following = 0
        self._start = len(head)
        try:
            self._file = open(self.path, "a+b")  # The file stays open as long as the journal does.
        except OSError as exc:
            raise UserError(
                f"cannot write {self.path}: {exc.strerror}", "choose another output"
            ) from exc
        self._lock = locked(self.path, self._busy)
        self._lock.__enter__()
        try:
            self._start_from(head)
        except BaseException:
            self._close()
            raise

    @staticmethod
    def path_of(out: str | Path) -> Path:
        """The file of the journal of `out`."""
        return Path(f"{out}.partial")

    def _start_from(self, head: bytes) -> None:
        """Write the first line, or compare it with what is there, and find the end."""
        self._file.seek(0)
        if self.path.stat().st_size == 0:
            try:
                self._append(head)
            except UserError:
                self.path.unlink()
                raise
        else:
            found = self._file.readline()
            self._start = len(found)
            if difference := _difference(found, json.loads(head)):
                raise UserError(
                    f"{self.path} is of a run with other options: {difference}",
                    "use the same options, or delete it",
                )
        self._find_end()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        if not self.count:
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._file.close()
        self._lock.__exit__(None, None, None)

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
        """Yield the lines of the records, from the first one on."""
        self._file.seek(self._start)
        # `yield from self._file` would close the file with the generator
        yield from iter(self._file.readline, b"")

    def add(self, record: dict) -> None:
        """Append a record, at once. Raises UserError where the disk is full."""
        self._append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.count += 1

    def _append(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as exc:
            self._file.raw.close()  # what did not fit would be tried again when the file is closed
            cure = "make room; the same command goes on from there"
            raise UserError(f"cannot write {self.path}: {exc.strerror}", cure) from exc

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
