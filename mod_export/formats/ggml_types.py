"""The table of ggml's types: their names, their sizes, and the files that hold them.

    type = type_named("q4_K")            # gguf-py's GGMLQuantizationType
    row_bytes(4096, type)                # bytes of a row of 4096 numbers
    dequantize(rows, type)               # float32 [n, cols], the values that llama.cpp uses

The way from float32 to these types needs ggml itself: runtime/quantize.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mod_export.errors import UserError

# numpy and gguf are imported where they are needed: the command line reads the names at its start
if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class FileFormat:
    """A way to store a model's weights.

    name: what llama.cpp's quantiser calls it
    type_name: the ggml type of most matrices, as ggml writes it
    type: number of that type in enum ggml_type
    file_type: number in enum llama_ftype, the key general.file_type
    exported: `mod-export export` offers it
    kv_cache: the runtime can store K and V in this type
    precision: name under which evaluation/parity.py holds the bounds of the rounding
    """

    name: str
    type_name: str
    type: int
    file_type: int
    exported: bool = True
    kv_cache: bool = False
    precision: str = "lower"


# These formats need no importance data. The first row of a type stands for files that hold no
# matrices of other types.
FILE_FORMATS = (
    FileFormat("f32", "f32", 0, 0, kv_cache=True, precision="f32"),
    FileFormat("f16", "f16", 1, 1, kv_cache=True, precision="f16"),
    FileFormat("bf16", "bf16", 30, 32, kv_cache=True, precision="f16"),
    FileFormat("q8_0", "q8_0", 8, 7, kv_cache=True, precision="q8_0"),
    FileFormat("q4_0", "q4_0", 2, 2, kv_cache=True),
    FileFormat("q4_1", "q4_1", 3, 3, kv_cache=True),
    FileFormat("q5_0", "q5_0", 6, 8, kv_cache=True),
    FileFormat("q5_1", "q5_1", 7, 9, kv_cache=True),
    FileFormat("q2_k", "q2_K", 10, 10),
    FileFormat("q3_k_s", "q3_K", 11, 11),
    FileFormat("q3_k_m", "q3_K", 11, 12),
    FileFormat("q3_k_l", "q3_K", 11, 13),
    FileFormat("q4_k_s", "q4_K", 12, 14),
    FileFormat("q4_k_m", "q4_K", 12, 15),
    FileFormat("q5_k_s", "q5_K", 13, 16),
    FileFormat("q5_k_m", "q5_K", 13, 17),
    FileFormat("q6_k", "q6_K", 14, 18),
    FileFormat("iq3_s", "iq3_s", 21, 26, exported=False),
    FileFormat("iq4_nl", "iq4_nl", 20, 25, kv_cache=True),
    FileFormat("iq4_xs", "iq4_xs", 23, 30),
    FileFormat("mxfp4_moe", "mxfp4", 39, 38, exported=False),  # matrices of experts alone
)
# llama.cpp refuses these types without importance data (tensor_requires_imatrix in llama-quant.cpp)
IMPORTANCE_TYPES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")

# Number in enum ggml_type -> numpy's name of the types whose values need no dequantising.
PLAIN_DTYPES = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}
F32_TYPE = 0

# The end of the name of one of several files of a model
SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)

FLOAT_NAMES = ("f32", "f16", "bf16")  # what llama.cpp's converter writes itself
EXPORT_FORMATS = {format.name: format for format in FILE_FORMATS if format.exported}
TYPE_NAMES = tuple(dict.fromkeys(format.type_name for format in FILE_FORMATS))
# Those of llama.cpp's own command line (kv_cache_types in common/arg.cpp).
KV_TYPES = tuple(format.name for format in FILE_FORMATS if format.kv_cache)


def type_named(name: str) -> GGMLQuantizationType:
    """The type of a name in TYPE_NAMES, in any case. Raises UserError for another name."""
    from gguf import GGMLQuantizationType

    cure = f"use {', '.join(TYPE_NAMES)}"
    if name.lower() in IMPORTANCE_TYPES:
        raise UserError(f"{name} needs importance data, which random weights have not", cure)
    if name.lower() not in map(str.lower, TYPE_NAMES):
        raise UserError(f"unknown quantisation {name!r}", cure)
    return GGMLQuantizationType[name.upper()]


def enum_name(type: int) -> str:
    """The type's name in gguf-py, in capitals: Q4_K."""
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(type).name


def file_type(type: int) -> int:
    """general.file_type of a file whose weights are all of this type."""
    return next(format.file_type for format in FILE_FORMATS if format.type == type)


def precision(file_type: str | int) -> str:
    """Name of the rounding of a file's weights, from general.file_type: f32, f16, q8_0 or lower."""
    for format in FILE_FORMATS:
        if str(format.file_type) == str(file_type):
            return format.precision
    return "lower"


def block_size(type: int) -> int:
    """Numbers that are quantised together. A row consists of whole blocks."""
    return block_layout(type)[0]


def row_bytes(cols: int, type: int) -> int:
    """Bytes of a row of `cols` numbers."""
    block, block_bytes = block_layout(type)
    return cols // block * block_bytes


def bytes_per_value(type: int) -> float:
    """Bytes of one number, on average: 2 for f16, 1.0625 for q8_0."""
    block, block_bytes = block_layout(type)
    return block_bytes / block


def is_known(type: int) -> bool:
    """Whether gguf-py knows the type with this number."""
    from gguf.constants import GGML_QUANT_SIZES

    return type in GGML_QUANT_SIZES


def block_layout(type: int) -> tuple[int, int]:
    """Values per block and bytes per block, of the type with this number."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType(type)]


def dequantize(rows: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """uint8 [n, row_bytes] -> float32 [n, cols]."""
    import numpy as np
    from gguf.quants import dequantize

    return dequantize(rows, type).astype(np.float32, copy=False)


def split_parts(name: str, count: int | None = None) -> list[str]:
    """Return the names of all files of a split model, by the name of one of them.

    count: of the files, by default what the name says. None are returned for a name of another
    form. Source: llama_split_path in llama.cpp.
    """
    found = SPLIT_NAME.search(name)
    if found is None:
        return []
    start, count = name[: found.start()], count or int(found[2])
    return [f"{start}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
