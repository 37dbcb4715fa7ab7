"""ggml's own quantiser, called by ctypes in the library that llama_cpp has loaded.

    rows = quantize(values, type_named("q4_K"))     # float32 [n, cols] -> uint8 [n, row bytes]

Any build of llama_cpp has it. formats/ggml_types.py knows the types, their sizes and the way back.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mod_export.formats.ggml_types import row_bytes

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


def quantize(values: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """float32 [n, cols] -> uint8 [n, row_bytes(cols, type)], without importance data.

    cols is a multiple of the type's block size. Raises UserError where there is no llama_cpp.
    """
    values = np.ascontiguousarray(values, np.float32)
    n, cols = values.shape
    rows = np.empty((n, row_bytes(cols, type)), np.uint8)
    written = _quantize_chunk()(int(type), values.ctypes.data, rows.ctypes.data, 0, n, cols, None)
    assert written == rows.nbytes, f"{type.name}: {written} bytes instead of {rows.nbytes}"
    return rows


@functools.cache
def _quantize_chunk() -> Callable[..., int]:
    """ggml_quantize_chunk of the loaded library."""
    # this import tells a missing library apart from a broken one
    from mod_export.runtime import bindings  # noqa: F401

    # isort: split
    from llama_cpp import llama_cpp

    # size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start,
    # int64_t nrows, int64_t n_per_row, const float * imatrix);
    arguments = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    decorator = llama_cpp.ctypes_function("ggml_quantize_chunk", arguments, ctypes.c_size_t)
    return decorator(lambda *_: 0)
