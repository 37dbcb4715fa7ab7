"""The header of a GGUF file, read strictly, and the file written again with changes.

All that does not change is copied as bytes: keys keep their exact types, tensors keep their data,
and memory use does not grow with the file. The format is that of ggml/include/gguf.h in llama.cpp:
little-endian, versions 2 and 3.

    file = GGUFFile.open("model.gguf")                 # mapped as long as something refers to it
    file.get("general.architecture")                   # "llama"
    file.tensors["output_norm.weight"].array()         # numpy, where the type is a plain one
    rewrite(file, output, added_keys=[("llama.mod.version", "u32", 1)])
    write(output, [("general.type", "string", "adapter")], {"blk.0.mod_kv.bias": array})
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mod_export.common.files import give_back
from mod_export.errors import UserError
from mod_export.formats import ggml_types
from mod_export.formats.ggml_types import F32_TYPE, split_parts

MAGIC = b"GGUF"
KNOWN_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes, where the key general.alignment is missing
MAX_DIMS = 4
MAX_MODEL_NUMBER = 1 << 24  # layers or width of a model; a larger number is damage
# enum gguf_type: names in the order of its values
TYPE_NAMES = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split()
STRING_TYPE = TYPE_NAMES.index("string")
ARRAY_TYPE = TYPE_NAMES.index("array")
# number in enum gguf_type -> struct format, which is numpy's name of the type as well
SCALAR_FORMATS = {
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
LENGTH = struct.Struct("<Q")  # of a string
COPY_BYTES = 16 << 20  # copied at once
SAMPLE_BYTES = 256  # of each tensor, for a digest
GET_AGAIN = "get the file again"
GIVE_FILE = (
    "give a GGUF file; `mod-export export` makes one from a MoD directory, and `mod-export "
    "convert` from another model"
)
# What the keys that we read are, in any file. Another kind is damage.
KINDS_OF_KEYS = {
    "text": r"general\.(architecture|name|type)|tokenizer\.(chat_template|ggml\.(model|pre))|"
    r"adapter\.type|adapter\.mod\.base\.(name|tokenizer)",
    "a number": r"general\.(alignment|file_type)|split\.(no|count)|tokenizer\.ggml\.\w+_token_id|"
    r"[^.]+\.(block_count|context_length|embedding_length|vocab_size)",
    "a list of texts": r"tokenizer\.ggml\.(tokens|merges)",
    "a list of numbers": r"tokenizer\.ggml\.(token_type|scores)|"
    r"adapter\.mod\.base\.(embedding|ffn)",
}


@dataclass(frozen=True)
class Key:
    """A key's type name (`u32`, `string`, `f32[]`, ...) and its value.

    Arrays of numbers are numpy arrays, arrays of strings are Strings.
    """

    type: str
    value: Any

    @property
    def kind(self) -> str:
        """One of KINDS_OF_KEYS."""
        element = "text" if self.type.startswith("string") else "number"
        if self.type.endswith("[]"):
            return f"a list of {element}s"
        return element if element == "text" else f"a {element}"


class Strings(Sequence[str]):
    """An array of strings, which are decoded when they are asked for.

    A vocabulary has up to some 300,000 of them, and most readers need few.
    """

    def __init__(self, data: memoryview, starts: list[int], end: int):
        """starts: position of each string in `data`; its length stands in the 8 bytes before."""
        self._data, self._starts, self._end = data, starts, end

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        (size,) = LENGTH.unpack_from(self._data, start - LENGTH.size)
        return str(self._data[start : start + size], "utf-8", "replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def raw(self) -> list[bytes]:
        """The bytes of each string, which need not be UTF-8 in a damaged file."""
        if not self._starts:
            return []
        first = self._starts[0]
        data = bytes(self._data[first : self._end])
        starts = [start - first for start in self._starts]
        return [
            data[start : following - LENGTH.size]
            for start, following in zip(starts, [*starts[1:], len(data) + LENGTH.size], strict=True)
        ]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    shape: in GGUF order, fastest dimension first
    type: number in enum ggml_type
    start, nbytes: where the data lie in the file
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int
    data: memoryview

    def array(self) -> np.ndarray:
        """The values, for the plain types (floats and integers); shape in numpy order."""
        return np.frombuffer(self.data, dtype=ggml_types.PLAIN_DTYPES[self.type]).reshape(
            self.shape[::-1]
        )


@dataclass
class GGUFFile:
    """A mapped file and its header.

    key_entries: the bytes of each key as they are in the file: name, type and value
    tensor_infos: the bytes of the header's section about tensors
    data_start: position of the first tensor's data
    """

    path: Path
    version: int
    alignment: int
    keys: dict[str, Key]
    tensors: dict[str, Tensor]
    key_entries: dict[str, memoryview]
    tensor_infos: memoryview
    data_start: int

    @classmethod
    def open(cls, path: str | os.PathLike) -> GGUFFile:
        """Map and check a file. Raises UserError if it is missing, no GGUF or damaged."""
        path = Path(path)
        if path.is_dir():
            raise UserError(f"{path} is a directory", GIVE_FILE)
        if not path.is_file():
            raise UserError(f"no such file: {path}", "give a GGUF file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path} is not a GGUF file", "give a GGUF file")
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _parse(path, view)

    def get(self, name: str, default: Any = None) -> Any:
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

    def model_number(self, name: str) -> int:
        """The key {architecture}.{name}. Raises UserError unless it is a sensible number."""
        value = self.get(f"{self.architecture}.{name}")
        if not isinstance(value, int) or not 1 <= value <= MAX_MODEL_NUMBER:
            raise UserError(
                f"{self.path}: key {self.architecture}.{name} is missing or no sensible number",
                GET_AGAIN,
            )
        return value

    def digest(self) -> str:
        """Tell files of one name and size apart: 32 hexadecimal digits.

        The digest takes all keys, the names, types and shapes of the tensors, and SAMPLE_BYTES in
        the middle of each. So models of the same shape differ in it, and no file is read whole.
        """
        digest = hashlib.sha256()
        for entry in (*self.key_entries.values(), self.tensor_infos):
            digest.update(entry)
        for tensor in self.tensors.values():
            start = max(0, tensor.nbytes - SAMPLE_BYTES) // 2
            digest.update(tensor.data[start : start + SAMPLE_BYTES])
        return digest.hexdigest()[:32]

    def check_parts(self) -> None:
        """Raise UserError where another of the files of a split model is missing.

        llama.cpp finds them beside the first one, by their names (llama_split_path in llama.cpp).
        """
        count = self.get("split.count", 0)
        if not isinstance(count, int) or count < 2:
            return
        for part in split_parts(self.path.name, count):
            if not self.path.with_name(part).is_file():
                raise UserError(
                    f"{self.path} is one of {count} files of a model, and {part} is missing",
                    "get it into the same directory",
                )

    def refuse_split(self) -> None:
        """Raise UserError for one of several files of a model: only whole models can be changed."""
        if self.get("split.count", 0) not in (0, 1):
            raise UserError(
                f"{self.path} is one of several pieces of a model",
                "merge them with llama-gguf-split",
            )


class Cursor:
    """Reads forward through the header. Running out of bytes is the user's truncated file."""

    def __init__(self, path: Path, view: memoryview):
        self.path = path
        self.view = view
        self.position = len(MAGIC)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if self.position + size > len(self.view):
            raise UserError(
                f"{self.path} is truncated or damaged at byte {self.position}", GET_AGAIN
            )
        self.position += size
        return self.view[self.position - size : self.position]

    def number(self, format: str) -> Any:
        """The next number, in a format of struct."""
        return struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")))[0]

    def string(self) -> str:
        """The next string: its length and its bytes, which the format wants to be UTF-8."""
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError:
            raise self.damaged("has a text that is not UTF-8") from None

    def key(self) -> Key:
        """Type and value of a key, whose name has been read."""
        type = self.number("I")
        if type == STRING_TYPE:
            return Key("string", self.string())
        if type in SCALAR_FORMATS:
            return Key(TYPE_NAMES[type], self.number(SCALAR_FORMATS[type]))
        if type != ARRAY_TYPE:
            raise self.damaged(f"has a key of unknown type {type}")
        return self._array()

    def _array(self) -> Key:
        item = self.number("I")
        count = self.number("Q")
        if item == STRING_TYPE:
            if 8 * count > len(self.view):  # each string has a length, so the count cannot be right
                raise self.damaged(f"has an array of {count} strings")
            return Key("string[]", self._strings(count))
        if item not in SCALAR_FORMATS:
            raise self.damaged(f"has an array of unknown type {item}")
        dtype = np.dtype(SCALAR_FORMATS[item]).newbyteorder("<")
        return Key(f"{TYPE_NAMES[item]}[]", np.frombuffer(self.take(dtype.itemsize * count), dtype))

    def _strings(self, count: int) -> Strings:
        """The next strings. A vocabulary has many, so that the loop does as little as it can."""
        view, position = self.view, self.position
        length = LENGTH.unpack_from
        starts = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length(view, position)[0]
                starts.append(start)
        except (struct.error, OverflowError):  # behind the end of the file
            position = len(view) + 1
        self.take(position - self.position)
        return Strings(view, starts, self.position)

    def damaged(self, what: str) -> UserError:
        """The error of a file that `what` is wrong with."""
        return UserError(f"{self.path} is damaged: it {what} at byte {self.position}", GET_AGAIN)


def _parse(path: Path, view: memoryview) -> GGUFFile:
    cursor = Cursor(path, view)
    version = cursor.number("I")
    if version not in KNOWN_VERSIONS:
        raise UserError(
            f"{path} is a GGUF file of version {version}",
            "only little-endian versions 2 and 3 are known",
        )
    n_tensors = cursor.number("Q")
    n_keys = cursor.number("Q")
    keys: dict[str, Key] = {}
    key_entries: dict[str, memoryview] = {}
    for _ in range(n_keys):
        start = cursor.position
        name = cursor.string()
        if name in keys:
            raise cursor.damaged(f"has the key {name!r} twice")
        keys[name] = cursor.key()
        _check_kind(path, name, keys[name])
        key_entries[name] = view[start : cursor.position]
    start = cursor.position
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    tensor_infos = view[start : cursor.position]
    alignment = (
        keys["general.alignment"].value if "general.alignment" in keys else DEFAULT_ALIGNMENT
    )
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise UserError(
            f"{path}: key general.alignment is {alignment!r}", "it must be a power of two"
        )
    data_start = pad(cursor.position, alignment)
    tensors = {info[0]: _tensor(path, view, data_start, *info) for info in infos}
    if len(tensors) != n_tensors:
        raise cursor.damaged("has a tensor twice")
    return GGUFFile(path, version, alignment, keys, tensors, key_entries, tensor_infos, data_start)


def _check_kind(path: Path, name: str, key: Key) -> None:
    for kind, pattern in KINDS_OF_KEYS.items():
        if kind != key.kind and re.fullmatch(pattern, name):
            raise UserError(f"{path}: key {name} is {key.kind}, not {kind}", GET_AGAIN)


def _tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset from the start of the data."""
    name = cursor.string()
    n_dims = cursor.number("I")
    if n_dims > MAX_DIMS:
        raise cursor.damaged(f"has a tensor {name!r} of {n_dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(n_dims))
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(
    path: Path,
    view: memoryview,
    data_start: int,
    name: str,
    shape: tuple[int, ...],
    type: int,
    offset: int,
) -> Tensor:
    if not ggml_types.is_known(type):
        raise UserError(
            f"{path}: tensor {name} has the unknown type {type}", "update the gguf package"
        )
    if 0 in shape:
        raise UserError(f"{path}: tensor {name} has no values", GET_AGAIN)
    block, block_bytes = ggml_types.block_layout(type)
    if block > 1 and (not shape or shape[0] % block):
        raise UserError(
            f"{path}: rows of tensor {name} are no multiple of {block} values", GET_AGAIN
        )
    start = data_start + offset
    nbytes = math.prod(shape) // block * block_bytes
    if start + nbytes > len(view):
        raise UserError(f"{path} is truncated: the data of tensor {name} is missing", GET_AGAIN)
    return Tensor(name, shape, type, start, nbytes, view[start : start + nbytes])


@dataclass(frozen=True)
class _Copy:
    """Bytes of the source's data and their offset in the target's data."""

    start: int
    nbytes: int
    offset: int


def rewrite(
    source: GGUFFile,
    target: BinaryIO,
    *,
    added_keys: Iterable[tuple[str, str, object]] = (),
    changed_keys: Mapping[str, object] | None = None,
    dropped_keys: Collection[str] = (),
    added_tensors: Mapping[str, np.ndarray | Tensor] | None = None,
    kept_tensors: Mapping[str, str] | None = None,
    consume: bool = False,
) -> None:
    """Write `source` to `target`, from the start of the file, with keys and tensors changed.

    added_keys: (name, type, value), at the end; types as in Key, arrays of strings excepted
    changed_keys: name -> value of keys that keep their type
    dropped_keys: names of keys that are left out
    added_tensors: name -> float32 array, shape in numpy order, or tensor of a file, at the end
    kept_tensors: name -> new name of the tensors that stay; by default all stay, where they are
    consume: the room of `source` on the disk is given back meanwhile, so that both files together
        take little more than one; whoever calls this removes `source` then
    """
    keys = _key_section(source, added_keys, changed_keys or {}, dropped_keys)
    if kept_tensors is None:
        kept = len(source.tensors)
        infos = bytes(source.tensor_infos)
        copies = _whole_data(source)
    else:
        kept = len(kept_tensors)
        infos, copies = _selected_data(source, kept_tensors)
    end = max((copy.offset + copy.nbytes for copy in copies), default=0)
    added_tensors = added_tensors or {}
    offsets = []
    for name, added in added_tensors.items():
        offsets.append(pad(end, source.alignment))
        if isinstance(added, Tensor):
            infos += encode_tensor_info(name, added.shape, added.type, offsets[-1])
        else:
            infos += encode_tensor_info(name, added.shape[::-1], F32_TYPE, offsets[-1])
        end = offsets[-1] + added.nbytes
    target.write(MAGIC)
    target.write(struct.pack("<IQQ", source.version, kept + len(added_tensors), len(keys)))
    for part in (*keys, infos):
        target.write(part)
    fill(target, pad(target.tell(), source.alignment))
    start = target.tell()
    _copy_data(source, target, start, copies, consume)
    for offset, added in zip(offsets, added_tensors.values(), strict=True):
        fill(target, start + offset)
        if isinstance(added, Tensor):
            target.write(added.data)
        else:
            target.write(np.ascontiguousarray(added, "<f4").tobytes())
    # gguf-py pads the last tensor too
    fill(target, start + pad(end, source.alignment))


def write(
    target: BinaryIO, keys: Iterable[tuple[str, str, object]], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a file of these keys and float32 tensors, as `rewrite` adds them, to its start."""
    nothing = GGUFFile(
        Path(), KNOWN_VERSIONS[-1], DEFAULT_ALIGNMENT, {}, {}, {}, memoryview(b""), 0
    )
    rewrite(nothing, target, added_keys=keys, added_tensors=tensors)


def _key_section(
    source: GGUFFile,
    added: Iterable[tuple[str, str, Any]],
    changed: Mapping[str, Any],
    dropped: Collection[str],
) -> list[bytes | memoryview]:
    """The bytes of each key of the target."""
    entries: list[bytes | memoryview] = []
    for name, entry in source.key_entries.items():
        if name in dropped:
            continue
        if name in changed:
            type = source.keys[name].type
            entries.append(encode_string(name) + encode_value(type, changed[name]))
        else:
            entries.append(entry)
    for name, type, value in added:
        entries.append(encode_string(name) + encode_value(type, value))
    return entries


def _whole_data(source: GGUFFile) -> list[_Copy]:
    """All tensors with the gaps between them; what follows the last tensor is left out."""
    if not source.tensors:
        return []
    end = max(tensor.start + tensor.nbytes for tensor in source.tensors.values())
    return [_Copy(source.data_start, end - source.data_start, 0)]


def _selected_data(source: GGUFFile, names: Mapping[str, str]) -> tuple[bytes, list[_Copy]]:
    """Infos and data of the tensors in `names`, one after the other, each at the alignment."""
    infos = b""
    copies = []
    offset = 0
    for tensor in source.tensors.values():
        if tensor.name in names:
            infos += encode_tensor_info(names[tensor.name], tensor.shape, tensor.type, offset)
            copies.append(_Copy(tensor.start, tensor.nbytes, offset))
            offset = pad(offset + tensor.nbytes, source.alignment)
    return infos, copies


def _copy_data(
    source: GGUFFile, target: BinaryIO, start: int, copies: list[_Copy], consume: bool
) -> None:
    if not copies:
        return
    # the file is read again, because the pages of the map would count as our memory
    with source.path.open("r+b" if consume else "rb") as file:
        for copy in copies:
            fill(target, start + copy.offset)
            file.seek(copy.start)
            for done in range(0, copy.nbytes, COPY_BYTES):
                n_bytes = min(COPY_BYTES, copy.nbytes - done)
                target.write(file.read(n_bytes))
                if consume:
                    give_back(file, copy.start, done + n_bytes)


def fill(target: BinaryIO, end: int) -> None:
    """Write zeros up to the position `end`."""
    target.write(bytes(end - target.tell()))


def pad(value: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-value // alignment) * alignment


def encode_string(text: str) -> bytes:
    """A string as GGUF has it: its length and its bytes."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode_value(type: str, value: Any) -> bytes:
    """A key's type and value as bytes. Types are those of Key, arrays of strings excepted."""
    if type == "string":
        return struct.pack("<I", STRING_TYPE) + encode_string(value)
    number = TYPE_NAMES.index(type.removesuffix("[]"))
    if type.endswith("[]"):
        array = np.asarray(value, np.dtype(SCALAR_FORMATS[number]).newbyteorder("<"))
        return struct.pack("<IIQ", ARRAY_TYPE, number, len(array)) + array.tobytes()
    return struct.pack(f"<I{SCALAR_FORMATS[number]}", number, value)


def encode_tensor_info(name: str, shape: tuple[int, ...], type: int, offset: int) -> bytes:
    """A tensor's part of the header; shape in GGUF order, offset from the start of the data."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return encode_string(name) + dimensions + struct.pack("<IQ", type, offset)
