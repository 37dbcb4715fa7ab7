"""Rows of numbers to ggml's types and back: ggml's own quantiser by ctypes, gguf-py to dequantise.

type = type_named("q4_K")
rows = quantize(values, type)        # float32 [n, cols] -> uint8 [n, row_bytes(cols, type)]
dequantize(rows, type)               # float32 [n, cols], the values that llama.cpp computes with
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize as _dequantize

from mod_export.errors import UserError

_F = LlamaFileType
# what ggml quantises to by the numbers alone -> general.file_type of a file whose weights have this
# type
QUANTS = {
    "f32": _F.ALL_F32,
    "f16": _F.MOSTLY_F16,
    "bf16": _F.MOSTLY_BF16,
    "q8_0": _F.MOSTLY_Q8_0,
    "q4_0": _F.MOSTLY_Q4_0,
    "q4_1": _F.MOSTLY_Q4_1,
    "q5_0": _F.MOSTLY_Q5_0,
    "q5_1": _F.MOSTLY_Q5_1,
    "q2_K": _F.MOSTLY_Q2_K,
    "q3_K": _F.MOSTLY_Q3_K_S,
    "q4_K": _F.MOSTLY_Q4_K_S,
    "q5_K": _F.MOSTLY_Q5_K_S,
    "q6_K": _F.MOSTLY_Q6_K,
    "iq3_s": _F.MOSTLY_IQ3_S,
    "iq4_nl": _F.MOSTLY_IQ4_NL,
    "iq4_xs": _F.MOSTLY_IQ4_XS,
}
# llama.cpp refuses these without importance data (tensor_requires_imatrix in llama-quant.cpp)
NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")


def type_named(quant: str) -> GGMLQuantizationType:
    """The type of a name in QUANTS, in any case. Raises UserError for another, saying why where it
    is known.
    """
    if quant.lower() in NEED_IMPORTANCE:
        raise UserError(
            f"{quant} needs importance data, which random weights have not",
            f"use {', '.join(QUANTS)}",
        )
    if quant.lower() not in map(str.lower, QUANTS):
        raise UserError(f"unknown quantisation {quant!r}", f"use {', '.join(QUANTS)}")
    return GGMLQuantizationType[quant.upper()]


def file_type(type: GGMLQuantizationType) -> LlamaFileType:
    """general.file_type of a file whose weights are of this type."""
    return next(value for name, value in QUANTS.items() if name.upper() == type.name)


def block_size(type: GGMLQuantizationType) -> int:
    """Numbers that are quantised together; a row consists of whole blocks."""
    return GGML_QUANT_SIZES[type][0]


def row_bytes(cols: int, type: GGMLQuantizationType) -> int:
    """Bytes of a row of `cols` numbers."""
    block, size = GGML_QUANT_SIZES[type]
    return cols // block * size


def bytes_per_value(type: int) -> float:
    """Of a ggml type, given by its number: 2 for f16, 1.0625 for q8_0."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type)]
    return size / block


@functools.cache
def _quantize_chunk() -> Callable[..., int]:
    """ggml_quantize_chunk of the library that llama_cpp has loaded. Raises UserError where there is
    none.
    """
    from llama_cpp import llama_cpp

    from mod_export.runtime import (
        bindings,  # noqa: F401  its import tells a missing library apart from a broken one
    )

    # size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start,
    # int64_t nrows, int64_t n_per_row, const float * imatrix);
    arguments = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return llama_cpp.ctypes_function("ggml_quantize_chunk", arguments, ctypes.c_size_t)(
        lambda *_: 0
    )


def quantize(values: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """float32 [n, cols] -> uint8 [n, row_bytes], without importance data; cols is a multiple of the
    block size.
    """
    values = np.ascontiguousarray(values, np.float32)
    (n, cols), out = (
        values.shape,
        np.empty((len(values), row_bytes(values.shape[1], type)), np.uint8),
    )
    written = _quantize_chunk()(int(type), values.ctypes.data, out.ctypes.data, 0, n, cols, None)
    assert written == out.nbytes, f"{type.name}: {written} bytes instead of {out.nbytes}"
    return out


def dequantize(rows: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """uint8 [n, row_bytes] -> float32 [n, cols]."""
    return _dequantize(rows, type).astype(np.float32, copy=False)
