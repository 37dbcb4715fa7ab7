"""Find files of training text, and read their documents and conversations in a mixed order.

This module knows nothing of tokens. A file is UTF-8 text with two empty lines between documents, or
JSONL with {"messages": [{"role": ..., "content": ...}, ...]} or {"text": ...} in each line. Both
can be gzipped.

    files = find(["books/", "chat.jsonl.gz"])
    pieces = Mixed(files)             # every prefix of this order holds all files in proportion
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mod_export.errors import UserError

PIECE = 16384  # characters after which a document is cut at the next end of a paragraph
LONGEST = (
    4 * PIECE
)  # characters after which it is cut at the end of a line; longer lines are cut there
SUFFIXES = (".txt", ".md", ".jsonl")  # Files taken from directories end so, with or without .gz.


@dataclass(frozen=True)
class Piece:
    """A document, a part of a document, or a conversation.

    line: the line of a JSONL file that holds the piece, or 0. text: of a document. messages: of a
    conversation.
    """

    file: Path
    line: int = 0
    text: str | None = None
    messages: list[dict] | None = None

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else str(self.file)


def find(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files of `paths`.

    A directory gives its text and JSONL files at any depth, sorted, without READMEs. Raises
    UserError where a path does not exist, or a directory holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist", "check the path")
        inside = [
            f for f in sorted(path.rglob("*")) if f.is_file() and _is_text(f.relative_to(path))
        ]
        if path.is_dir() and not inside:
            raise UserError(
                f"{path} holds no text",
                f"files there must end in {', '.join(SUFFIXES)} or in one of these and .gz",
            )
        files += inside if path.is_dir() else [path]
    if not files:
        raise UserError("there is no data", "give text or JSONL files, or directories of these")
    return files


def _is_text(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return (
        not hidden
        and not name.name.upper().startswith("README")
        and _plain(name).suffix in SUFFIXES
    )


def _plain(path: Path) -> Path:
    """Return the path without .gz."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents of the files, in order, and of how they are read.

    The names of the files do not count. Raises UserError for a file that cannot be read.
    """
    total = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}", "check the path") from exc
        total.update(f"{_plain(path).suffix == '.jsonl'} {path.suffix == '.gz'}".encode())
    return total.hexdigest()


def read(path: Path) -> Iterator[Piece]:
    """Yield the pieces of a file, one after the other.

    Raises UserError naming the file, and the line of a JSONL file.
    """
    if _plain(path).suffix != ".jsonl":
        for text in cut(_lines(path, LONGEST)):
            yield Piece(path, text=text)
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield from _from_json(path, number, line)


def cut(lines: Iterable[str]) -> Iterator[str]:
    """Yield the documents of some lines, the long ones in pieces.

    lines: with their ends. A piece has no empty lines around it, and is never empty.
    """
    part, size, empty = [], 0, 0
    for line in lines:
        part.append(line)
        size += len(line)
        empty = empty + 1 if line == "\n" else 0
        if empty == 2 or (empty and size >= PIECE) or size >= LONGEST:
            if text := "".join(part).strip("\n"):
                yield text
            part, size = [], 0
    if text := "".join(part).strip("\n"):
        yield text


def _lines(path: Path, longest: int = -1) -> Iterator[str]:
    """Yield the lines of a file, those above `longest` characters in parts.

    Each line ends with "\\n", whatever ends it in the file.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig"
        ) as file:
            while line := file.readline(longest):
                yield line
    except UnicodeDecodeError as exc:
        raise UserError(
            f"{path} is not UTF-8 text",
            "give plain text, JSONL, or these gzipped with a name in .gz",
        ) from exc
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise UserError(
            f"{path} is no gzip file, or a broken one", "fetch or make it again"
        ) from exc
    except OSError as exc:
        raise UserError(f"cannot read {path}: {exc.strerror}", "check the path") from exc


def _from_json(path: Path, number: int, line: str) -> Iterator[Piece]:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
        # Escapes can hide halves of surrogate pairs, which cannot be encoded.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as exc:
        # JSONDecodeError and UnicodeEncodeError are kinds of ValueError.
        raise UserError(f"{where}: no JSON: {exc}", "JSONL has one JSON object a line") from exc
    if isinstance(record, dict) and "messages" in record:
        yield Piece(path, number, messages=_checked(record["messages"], where))
    elif isinstance(record, dict) and isinstance(record.get("text"), str):
        for text in cut(io.StringIO(record["text"], newline=None)):
            yield Piece(path, number, text=text)
    else:
        raise UserError(
            f"{where}: neither messages nor text",
            'a line is {"messages": [...]} or {"text": "..."}',
        )


def _checked(messages, where: str) -> list[dict]:
    good = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
            for m in messages
        )
    )
    if not good:
        raise UserError(
            f"{where}: messages are not as they should be",
            'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    return messages


class Mixed(Sequence):
    """All pieces of some files, in a mixed order.

    The pieces lie in a nameless temporary file in `folder`, so memory stays small. sizes: int64
    [n], the bytes of each piece in that file, in the mixed order; a measure of work.
    """

    def __init__(self, files: Sequence[Path], folder: Path | None = None):
        self.files = list(files)
        self._spool = tempfile.TemporaryFile(dir=folder)
        sizes, counts = array("q"), []
        for index, file in enumerate(self.files):
            before = len(sizes)
            for piece in read(file):
                record = json.dumps(
                    [index, piece.line, piece.text, piece.messages], ensure_ascii=False
                )
                sizes.append(self._spool.write(record.encode()))
            counts.append(len(sizes) - before)
        all_sizes = np.array(sizes, np.int64)
        order = mixed_order(all_sizes, counts)
        self.sizes, self._starts = all_sizes[order], (np.cumsum(all_sizes) - all_sizes)[order]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, k: int) -> Piece:
        if not 0 <= k < len(self):
            raise IndexError(k)
        self._spool.seek(int(self._starts[k]))
        index, line, text, messages = json.loads(self._spool.read(int(self.sizes[k])))
        return Piece(self.files[index], line, text, messages)


def mixed_order(sizes: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return a fixed random order of pieces, int64 [n].

    Each file's pieces are shuffled and spread evenly over the whole. Every prefix holds the files
    in proportion to their sizes, to within a piece of each. So a short run, or a limit, sees all
    files.

    sizes: [n], the size of each piece, file by file. counts: the number of pieces of each file.
    """
    # The streams of RandomState are frozen. Those of numpy's newer generators may change with a
    # version.
    random, keys, start = np.random.RandomState(0), np.empty(len(sizes)), 0
    for count in counts:
        shuffled = start + random.permutation(count)
        own = sizes[shuffled]
        keys[shuffled] = (np.cumsum(own) - own / 2) / max(1, own.sum())
        start += count
    return np.argsort(keys, kind="stable")
