"""Numbers and results as text, and text of bytes."""

import io
import json
import os
import re
from collections.abc import Callable

from mod_export.errors import UserError


def decode_text(data: bytes) -> str:
    """The text of bytes that a user gives: a prompt in a file, or on stdin.

    Bytes that are no UTF-8 become U+FFFD. A byte-order mark is left out, and every line ends in
    "\\n". A text that is read to learn from it is refused instead: see data/text.py.
    """
    return io.StringIO(data.decode("utf-8-sig", "replace"), newline=None).read()


def decode_argument(text: str) -> str:
    """The text of an argument of the command line, as decode_text would read its bytes.

    Python hands on bytes that it cannot decode as halves of surrogate pairs.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def check_name(path: str | os.PathLike) -> None:
    """Raise UserError for the name of a file that is no UTF-8.

    llama.cpp, JSON and GGUF take names in UTF-8 only.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as exc:
        raise UserError(f"the name {os.fsencode(path)!r} is no UTF-8", "rename the file") from exc


# It stands below a table in which K/V of a MoD model are those of dense.
NO_KV_SAVED = (
    "KV used is that of dense: kv units save nothing of a sequence that is no longer than sink "
    "tokens, window and rollback together, and ffn units save none at all."
)


def megabytes(size: float, decimals: int = 2) -> str:
    """A size in bytes as `12.34 MB`, where 1 MB is a million bytes."""
    return f"{size / 1e6:.{decimals}f} MB"


def short_bytes(size: float) -> str:
    """A size in bytes as `12.3 MB`, or below 1 MB as `123.4 kB`."""
    return megabytes(size, 1) if size >= 1e6 else f"{size / 1e3:.1f} kB"


def size(n_bytes: float) -> str:
    """A size in bytes as `12 MB`, or from a billion bytes on as `12.3 GB`."""
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def mebibytes(size: float) -> str:
    """A size in bytes as `12.3 MiB`, or from 4 GiB on as `12.34 GiB`."""
    return f"{size / 2**20:.1f} MiB" if size < 4 * 2**30 else f"{size / 2**30:.2f} GiB"


def clock(seconds: float) -> str:
    """A time as minutes and seconds, such as `2:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def json_text(
    value: object, indent: int | None = None, default: Callable[[object], object] | None = None
) -> str:
    """A value as JSON, in which numbers that are not finite are null: JSON has none of them.

    default: makes something that JSON knows of an object that it does not.
    """
    finite = json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent)


def result_as_json(result: dict) -> str:
    """A result as JSON: `about` is an object, every other entry a list with one row on each line.

    An object that JSON does not know is written as its text.
    """
    parts = [f'"about": {json_text(result["about"], 1, str)}']
    for key, rows in result.items():
        if key == "about":
            continue
        lines = ",\n".join(json_text(row, default=str) for row in rows)
        parts.append(f'"{key}": [\n{lines}\n]')
    return "{" + ",\n".join(parts) + "}"


def last_words(output: str) -> str:
    """Return the last line of a process's output that looks like an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\w+Error|ERROR|error|\w+: (error|failed))\b", line)
    ]
    return (errors or lines or [""])[-1]
