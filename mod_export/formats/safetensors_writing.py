"""Write safetensors files tensor by tensor, so that no more than one tensor is in memory.

Names, types and shapes are known before the values. The layout of the files and of their index is
that of transformers. This module imports neither torch nor transformers.

    write([[StoredTensor("model.norm.weight", "F32", (64,), chunks)], ...], Path("mod"))
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mod_export.formats.hf_directory import WEIGHTS_INDEX, tensor_index

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
SHARD_BYTES = 4 << 30
COPY_BYTES = 16 << 20  # read at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is to be written.

    dtype: as safetensors names it. values: gives the bytes in pieces, when they are written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Iterable[bytes | memoryview]]

    @property
    def n_bytes(self) -> int:
        """The bytes that `values` gives."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write(shards: Sequence[Sequence[StoredTensor]], directory: Path) -> None:
    """Write one file for each list of tensors, and their index where there are several."""
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, tensors)
        weight_map |= {tensor.name: name for tensor in tensors}
    total = sum(tensor.n_bytes for tensors in shards for tensor in tensors)
    _write_index(directory, total, weight_map)


def link(files: Sequence[Path], directory: Path) -> None:
    """Link the files of a model into a directory, with an index of their own for several."""
    names = ["model.safetensors"]
    if len(files) > 1:
        numbers = range(1, len(files) + 1)
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in numbers]
        new = dict(zip(files, names, strict=True))
        weight_map = {name: new[path] for name, path in tensor_index(list(files)).items()}
        _write_index(directory, sum(path.stat().st_size for path in files), weight_map)
    for path, name in zip(files, names, strict=False):
        (directory / name).symlink_to(path.resolve())


def add(tensors: Sequence[StoredTensor], directory: Path) -> None:
    """Write tensors to one more file of a directory's model, and an index of all files."""
    files = sorted(directory.glob("model*.safetensors"))
    names = [f"model-{number:05}-of-{len(files) + 1:05}" for number in range(1, len(files) + 2)]
    paths = [directory / f"{name}.safetensors" for name in names]
    write_file(paths[-1], tensors)
    for path, renamed in zip(files, paths, strict=False):
        path.rename(renamed)
    weight_map = {name: path.name for name, path in tensor_index(paths).items()}
    _write_index(directory, sum(path.stat().st_size for path in paths), weight_map)


def _write_index(directory: Path, n_bytes: int, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def in_shards(
    tensors: Iterable[StoredTensor], file_bytes: int = SHARD_BYTES
) -> list[list[StoredTensor]]:
    """Divide tensors among files of at most so many bytes, or of one tensor that is larger."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > file_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return shards


def piece_of(path: Path, start: int, n_bytes: int) -> Iterable[bytes]:
    """Yield bytes of a file."""
    with path.open("rb") as file:
        file.seek(start)
        while n_bytes:
            if not (data := file.read(min(n_bytes, COPY_BYTES))):
                raise OSError(f"{path} has become shorter")
            n_bytes -= len(data)
            yield data


def write_file(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Write one file, tensor by tensor."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    # The widest types first, so that every tensor is aligned to the size of its items.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    for tensor in ordered:
        offsets = [position, position + tensor.n_bytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            for piece in tensor.values():
                file.write(piece)
