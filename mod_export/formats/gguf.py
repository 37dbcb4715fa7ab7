"""Read the header of a GGUF file, whatever its state, and write the file again with more keys and
tensors.

Everything is copied as bytes: keys keep their exact types, tensors their data, and memory use does
not grow
with the file. Format: ggml/include/gguf.h of llama.cpp; little-endian, versions 2 and 3.

    file = GGUFFile.open("model.gguf")                # mapped as long as it is referred to
    file.get("general.architecture")                   # "llama"
    file.tensors["output_norm.weight"].array()         # numpy, where the type is a plain one
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mod_export.errors import UserError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# enum gguf_type -> struct format, numpy dtype
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TYPE_NAMES = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split()
MAX_DIMS = 4
F32 = 0
PLAIN = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}
CHUNK = 16 << 20  # bytes copied at once


@dataclass(frozen=True)
class Key:
    """A key's type name (`u32`, `string`, `f32[]`, ...) and its value; arrays of numbers are numpy
    arrays.
    """

    type: str
    value: object


@dataclass(frozen=True)
class Tensor:
    """Shape in GGUF order (fastest dimension first), number of the ggml type, place of the data in
    the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int
    data: memoryview

    def array(self) -> np.ndarray:
        """The values, for the plain types (f32, f16, integers); shape in numpy order."""
        return np.frombuffer(self.data, dtype=PLAIN[self.type]).reshape(self.shape[::-1])


@dataclass
class GGUFFile:
    """A mapped file and its header; `key_bytes` and `tensor_bytes` are the header's sections as
    they are there.
    """

    path: Path
    version: int
    alignment: int
    keys: dict[str, Key]
    tensors: dict[str, Tensor]
    key_bytes: memoryview
    tensor_bytes: memoryview
    data_start: int
    view: memoryview

    @classmethod
    def open(cls, path: str | os.PathLike) -> GGUFFile:
        """Map and check `path`. Raises UserError if it is missing, no GGUF, truncated or damaged."""
        path = Path(path)
        if path.is_dir():
            raise UserError(
                f"{path} is a directory", "give a GGUF file; `mod-export export` makes one from it"
            )
        if not path.is_file():
            raise UserError(f"no such file: {path}", "give a GGUF file")
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise UserError(f"{path} is not a GGUF file", "give a GGUF file")
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _parse(path, view)

    def get(self, name: str, default: object = None) -> object:
        """Value of a key, or the default."""
        return self.keys[name].value if name in self.keys else default

    @property
    def architecture(self) -> str:
        """`general.architecture`, without which no key of a model can be found."""
        arch = self.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise UserError(
                f"{self.path} has no key general.architecture", "give the GGUF file of a model"
            )
        return arch


class Cursor:
    """Reads forward through the header; running out of bytes is the user's truncated file."""

    def __init__(self, path: Path, view: memoryview):
        self.path, self.view, self.at = path, view, 4

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.view):
            raise UserError(
                f"{self.path} is truncated or damaged at byte {self.at}", "get the file again"
            )
        self.at += size
        return self.view[self.at - size : self.at]

    def number(self, format: str) -> int | float | bool:
        return struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", "replace")

    def key(self) -> Key:
        kind = self.number("I")
        if kind == STRING:
            return Key("string", self.string())
        if kind in SCALARS:
            return Key(TYPE_NAMES[kind], self.number(SCALARS[kind]))
        if kind != ARRAY:
            raise self.damaged(f"has a key of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == STRING:
            if 8 * count > len(self.view):  # each string has a length, so the count cannot be right
                raise self.damaged(f"has an array of {count} strings")
            return Key("string[]", [self.string() for _ in range(count)])
        if item not in SCALARS:
            raise self.damaged(f"has an array of unknown type {item}")
        dtype = np.dtype(SCALARS[item]).newbyteorder("<")
        return Key(f"{TYPE_NAMES[item]}[]", np.frombuffer(self.take(dtype.itemsize * count), dtype))

    def damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is damaged: it {what} at byte {self.at}", "get the file again"
        )


def _parse(path: Path, view: memoryview) -> GGUFFile:
    cursor = Cursor(path, view)
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(
            f"{path} is a GGUF file of version {version}",
            "only little-endian versions 2 and 3 are known",
        )
    n_tensors, n_keys, start = cursor.number("Q"), cursor.number("Q"), cursor.at
    keys: dict[str, Key] = {}
    for _ in range(n_keys):
        name = cursor.string()
        if name in keys:
            raise cursor.damaged(f"has the key {name!r} twice")
        keys[name] = cursor.key()
    key_bytes, start = view[start : cursor.at], cursor.at
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    tensor_bytes = view[start : cursor.at]
    alignment = keys["general.alignment"].value if "general.alignment" in keys else 32
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise UserError(
            f"{path}: key general.alignment is {alignment!r}", "it must be a power of two"
        )
    base = pad(cursor.at, alignment)
    tensors = {info[0]: _tensor(path, view, base, *info) for info in infos}
    if len(tensors) != n_tensors:
        raise cursor.damaged("has a tensor twice")
    return GGUFFile(path, version, alignment, keys, tensors, key_bytes, tensor_bytes, base, view)


def _tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = cursor.string(), cursor.number("I")
    if n_dims > MAX_DIMS:
        raise cursor.damaged(f"has a tensor {name!r} of {n_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(n_dims))
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(
    path: Path, view: memoryview, base: int, name: str, shape: tuple, type: int, offset: int
) -> Tensor:
    from gguf.constants import GGML_QUANT_SIZES  # in values per block and bytes per block

    if type not in {int(known) for known in GGML_QUANT_SIZES}:
        raise UserError(
            f"{path}: tensor {name} has the unknown type {type}", "update the gguf package"
        )
    block, size = GGML_QUANT_SIZES[type]
    count = math.prod(shape)
    if block > 1 and (not shape or shape[0] % block):
        raise UserError(
            f"{path}: rows of tensor {name} are no multiple of {block} values", "get the file again"
        )
    start, nbytes = base + offset, count // block * size
    if start + nbytes > len(view):
        raise UserError(
            f"{path} is truncated: the data of tensor {name} is missing", "get the file again"
        )
    return Tensor(name, shape, type, start, nbytes, view[start : start + nbytes])


def rewrite(
    source: GGUFFile, target: BinaryIO, keys: Iterable[tuple], tensors: dict[str, np.ndarray]
) -> None:
    """Write `source` to `target` with more keys (name, type, value) and more f32 tensors at the
    end.

    keys: type is u32, bool, string or f32[]; tensors: float32 arrays, shape in numpy order.
    """
    added, infos, places = (
        [encode_string(name) + encode_value(type, value) for name, type, value in keys],
        [],
        [],
    )
    size = max(
        (tensor.start + tensor.nbytes for tensor in source.tensors.values()),
        default=source.data_start,
    )
    size -= source.data_start
    end = size
    for name, array in tensors.items():
        places.append(pad(end, source.alignment))
        infos.append(
            encode_string(name) + struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1])
        )
        infos[-1] += struct.pack("<IQ", F32, places[-1])
        end = places[-1] + array.nbytes
    counts = (len(source.tensors) + len(tensors), len(source.keys) + len(added))
    target.write(MAGIC + struct.pack("<IQQ", source.version, *counts))
    for part in (source.key_bytes, *added, source.tensor_bytes, *infos):
        target.write(part)
    fill(target, pad(target.tell(), source.alignment))
    start = target.tell()
    with source.path.open(
        "rb"
    ) as file:  # not through the map, whose pages would count as our memory
        file.seek(source.data_start)
        for at in range(0, size, CHUNK):
            target.write(file.read(min(CHUNK, size - at)))
    for place, array in zip(places, tensors.values(), strict=True):
        fill(target, start + place)
        target.write(np.ascontiguousarray(array, "<f4").tobytes())
    fill(
        target, start + pad(end, source.alignment)
    )  # as gguf-py does: the last tensor is padded too


def fill(target: BinaryIO, end: int) -> None:
    """Zeros up to the position `end`."""
    target.write(bytes(end - target.tell()))


def pad(value: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-value // alignment) * alignment


def encode_string(text: str) -> bytes:
    """A string as GGUF has it: its length and its bytes."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(type: str, value: object) -> bytes:
    """A key's type and value as bytes; type: as in Key, but for arrays of strings."""
    if type == "string":
        return struct.pack("<I", STRING) + encode_string(value)
    number = TYPE_NAMES.index(type.removesuffix("[]"))
    if type.endswith("[]"):
        array = np.asarray(value, np.dtype(SCALARS[number]).newbyteorder("<"))
        return struct.pack("<IIQ", ARRAY, number, len(array)) + array.tobytes()
    return struct.pack(f"<I{SCALARS[number]}", number, value)
