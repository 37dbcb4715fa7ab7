"""Mutations of a Hugging Face directory or an adapter: damaged files, and right files of nonsense.

name = mutate(directory, seed=3)             # changes one file in place, and returns what it did
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

VALUES = (None, True, -1, 0, 1, 3, 7, 1 << 31, 1e30, -2.5, float("nan"), "x", "", [], [1], {}, [[]])
DTYPES = ("F32", "F16", "BF16", "I64", "U8", "F64", "BOOL", "F9")


def mutate(directory: Path, seed: int) -> str:
    """Change one file of the directory."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in directory.iterdir() if path.suffix != ".md")
    path = files[rng.integers(len(files))]
    kinds = [_flip, _truncate, _remove]
    kinds += [_value] * 5 if path.suffix == ".json" else [_header] * 3 + [_numbers] * 2
    kind = kinds[rng.integers(len(kinds))]
    return f"{path.name}: {kind.__name__.strip('_')} {kind(rng, path) or ''}"


def _flip(rng, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(min(len(data), 4096))] = rng.integers(256)
    path.write_bytes(data)


def _truncate(rng, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def _remove(rng, path: Path) -> None:
    path.unlink()


def _value(rng, path: Path) -> str:
    """Give a key of a JSON file another value, or drop the key."""
    data = json.loads(path.read_text())
    done = _change(rng, data)
    path.write_text(json.dumps(data))
    return done


def _change(rng, data: Any) -> str:
    """Change one place in an object, deep or not."""
    holder, key = data, None
    for _ in range(8):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return ""
        key = keys[rng.integers(len(keys))]
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.15:
            break
        holder = holder[key]
    if rng.random() < 0.15:
        del holder[key]
        return f"without {key}"
    holder[key] = VALUES[rng.integers(len(VALUES))]
    return f"{key} = {holder[key]!r}"


def _header(rng, path: Path) -> str:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    entry = header[names[rng.integers(len(names))]]
    choice = rng.integers(4)
    if choice == 0:
        entry["dtype"] = DTYPES[rng.integers(len(DTYPES))]
        done = entry["dtype"]
    elif choice == 1 and entry["shape"]:
        entry["shape"] = [*entry["shape"][::-1], 1]
        done = "shape"
    elif choice == 2:
        first, second = (names[rng.integers(len(names))] for _ in range(2))
        header[f"{first}x"] = header.pop(first)
        done = f"{first} renamed {second}"
    else:
        done = _change(rng, header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return done


def _numbers(rng, path: Path) -> str:
    """Replace numbers of a tensor by what is not finite, or drop the tensor."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[rng.integers(len(tensors))]
    choice = rng.integers(3)
    if choice == 0:
        del tensors[name]
    elif choice == 1:
        tensors[name] = np.full_like(tensors[name], (np.nan, np.inf, 1e30)[rng.integers(3)])
    else:
        tensors[name] = tensors[name].astype((np.float16, np.int64, np.float64)[rng.integers(3)])
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {choice}"
