"""Numbers and results as text."""

import json


def megabytes(size: float, decimals: int = 2) -> str:
    """A size in bytes as `12.34 MB`, where 1 MB is a million bytes."""
    return f"{size / 1e6:.{decimals}f} MB"


def short_bytes(size: float) -> str:
    """A size in bytes as `12.3 MB`, or below 0.1 MB as `12.3 kB`."""
    return megabytes(size, 1) if size >= 1e5 else f"{size / 1e3:.1f} kB"


def mebibytes(size: float) -> str:
    """A size in bytes as `12.3 MiB`, or from 4 GiB on as `12.34 GiB`."""
    return f"{size / 2**20:.1f} MiB" if size < 4 * 2**30 else f"{size / 2**30:.2f} GiB"


def clock(seconds: float) -> str:
    """A time as minutes and seconds, such as `2:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def result_as_json(result: dict) -> str:
    """A result as JSON: `about` is an object, every other entry a list with one row on each line.

    An object that JSON does not know is written as its text.
    """
    parts = [f'"about": {json.dumps(result["about"], indent=1, default=str)}']
    for key, rows in result.items():
        if key == "about":
            continue
        lines = ",\n".join(json.dumps(row, default=str) for row in rows)
        parts.append(f'"{key}": [\n{lines}\n]')
    return "{" + ",\n".join(parts) + "}"
