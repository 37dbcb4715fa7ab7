"""A dense GGUF without some of its layers: the floor of what skipping these layers can save.

    prune(GGUFFile.open("dense.gguf"), "floor.gguf", layers={3, 4, 5})

The remaining layers are numbered anew; tensors are copied as bytes, so any quantisation works and
memory does not grow with the file. What it computes is the model with these blocks left out, no
useful language model.
"""

import struct
from collections.abc import Set
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mod_export.common.files import atomic_file
from mod_export.errors import UserError
from mod_export.formats.gguf import (
    CHUNK,
    MAGIC,
    Cursor,
    GGUFFile,
    Tensor,
    encode_string,
    encode_value,
    fill,
    pad,
)

FIRST_KEY = 24  # bytes: magic, version, numbers of tensors and keys


def block_floor(mod: GGUFFile) -> set[int] | None:
    """Layers that do nothing when no unit of `mod` runs; None where more than whole layers would
    have to go.
    """
    from mod_export.formats import schema

    config = schema.from_keys(mod)
    if config is None:
        return None
    routed = {
        kind: {i for i, p in enumerate(unit.threshold) if p > 0}
        for kind, unit in config.units.items()
    }
    blocks = routed.get("block", set())
    return blocks if blocks and all(layers <= blocks for layers in routed.values()) else None


def prefill_work(floor: GGUFFile) -> float:
    """Share of its layers' matrices that a dense file applies to a prompt's token whose logits
    nobody asks for.

    llama.cpp leaves out the last layer's FFN there. A MoD model cannot, where that layer is not its
    last: routers read what it gives.
    """
    sizes = {
        name: t.nbytes
        for name, t in floor.tensors.items()
        if name.startswith("blk.") and len(t.shape) > 1
    }
    last = max(int(name.split(".")[1]) for name in sizes)
    return 1 - sum(n for name, n in sizes.items() if name.startswith(f"blk.{last}.ffn_")) / sum(
        sizes.values()
    )


def prune(source: GGUFFile, target: str | Path, layers: Set[int], force: bool = False) -> None:
    """Writes `source` without `layers`. Raises UserError where the target is there, or a layer is
    not.
    """
    count = source.get(f"{source.architecture}.block_count", 0)
    if missing := sorted(layer for layer in layers if not 0 <= layer < count):
        raise UserError(
            f"{source.path} has {count} layers, no layer {missing[0]}",
            "give the dense file of the same model",
        )
    rest = [layer for layer in range(count) if layer not in layers]
    tensors = [
        (name, tensor)
        for tensor in source.tensors.values()
        if (name := _renamed(tensor.name, rest))
    ]
    with atomic_file(target, force) as tmp, tmp.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", source.version, len(tensors), len(source.keys)))
        _write_keys(source, file, count, rest)
        _write_tensors(source, file, tensors)


def _renamed(name: str, rest: list[int]) -> str | None:
    """A tensor's new name; None where its layer goes."""
    parts = name.split(".")
    if parts[0] != "blk":
        return name
    return (
        ".".join(["blk", str(rest.index(int(parts[1]))), *parts[2:]])
        if int(parts[1]) in rest
        else None
    )


def _write_keys(source: GGUFFile, file: BinaryIO, count: int, rest: list[int]) -> None:
    """All keys as the bytes they are, but for the number of layers and arrays that have a value per
    layer.
    """
    cursor, start = Cursor(source.path, source.view), f"{source.architecture}."
    cursor.at = FIRST_KEY
    for _ in source.keys:
        begin = cursor.at
        name, key = cursor.string(), cursor.key()
        if name == f"{start}block_count":
            file.write(encode_string(name) + encode_value(key.type, len(rest)))
        elif (
            name.startswith(start) and isinstance(key.value, np.ndarray) and len(key.value) == count
        ):
            file.write(encode_string(name) + encode_value(key.type, key.value[rest]))
        else:
            file.write(source.view[begin : cursor.at])


def _write_tensors(source: GGUFFile, file: BinaryIO, tensors: list[tuple[str, Tensor]]) -> None:
    at, offsets = 0, []
    for name, tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        file.write(encode_string(name) + dims + struct.pack("<IQ", tensor.type, at))
        offsets.append(at)
        at = pad(at + tensor.nbytes, source.alignment)
    fill(file, pad(file.tell(), source.alignment))
    start = file.tell()
    with source.path.open(
        "rb"
    ) as origin:  # not through the map, whose pages would count as our memory
        for (_, tensor), offset in zip(tensors, offsets, strict=True):
            assert file.tell() == start + offset
            origin.seek(tensor.start)
            for done in range(0, tensor.nbytes, CHUNK):
                file.write(origin.read(min(CHUNK, tensor.nbytes - done)))
            fill(file, pad(file.tell(), source.alignment))
