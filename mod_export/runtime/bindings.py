"""ctypes bindings of llama-mod.h, which the patched llama.cpp adds to llama_cpp's library.

A library without these symbols (a stock build) still runs dense models: only calling a binding
raises UserError. `patched()` tells which of the two libraries is loaded.

    from mod_export.runtime import bindings
    bindings.require()
    n = bindings.llama_mod_n_units(llm.model)
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import source as llama_source


def patched_cure() -> str:
    """What brings the patched library, where another one is loaded or none can be."""
    if os.environ.get("LLAMA_CPP_LIB_PATH"):
        return "unset LLAMA_CPP_LIB_PATH, which names another library"
    folders = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    if other := next((f for f in folders if any(Path(f).glob("libggml*"))), None):
        return f"take {other} out of LD_LIBRARY_PATH, which holds another llama.cpp"
    return "run `mod-export build`"


try:
    from llama_cpp import llama_cpp as _llama
except ModuleNotFoundError as exc:
    if not (exc.name or "").startswith("llama_cpp"):
        raise
    raise UserError("the runtime llama_cpp is not installed", "run `mod-export build`") from exc
except (FileNotFoundError, RuntimeError) as exc:
    # A variable names another library, or one that is none.
    raise UserError(f"cannot load llama.cpp: {exc}", patched_cure()) from exc

logger = logging.getLogger(__name__)

# LLAMA_MOD_API_VERSION: the interface that is bound here
API_VERSION = 2

# enum llama_mod_force
FORCES = ("none", "active", "inactive")

# enum llama_mod_err
ERRORS = {
    -1: "the model has no routers",
    -2: "no unit with this number",
    -3: "the value is out of its range",
    -4: "the routers cannot be put beside the model",
}

_model_p, _ctx_p = _llama.llama_model_p_ctypes, _llama.llama_context_p_ctypes
_missing: list[str] = []


# struct llama_mod_unit {
#     int32_t layer; enum llama_mod_kind kind; int32_t head; float threshold; float activation;
#     int32_t window; };
class llama_mod_unit(ctypes.Structure):  # noqa: N801
    """A routed unit of a file."""

    _fields_ = [
        ("layer", ctypes.c_int32),
        ("kind", ctypes.c_int),
        ("head", ctypes.c_int32),
        ("threshold", ctypes.c_float),
        ("activation", ctypes.c_float),
        ("window", ctypes.c_int32),
    ]


# struct llama_mod_unit_stats { uint64_t n_seen; uint64_t n_active; };
class llama_mod_unit_stats(ctypes.Structure):  # noqa: N801
    """Counters of a unit."""

    _fields_ = [("n_seen", ctypes.c_uint64), ("n_active", ctypes.c_uint64)]


# struct llama_mod_kv_stats {
#     uint64_t n_cells, n_used, bytes_per_cell, bytes_reserved, bytes_committed, bytes_used; };
class llama_mod_kv_stats(ctypes.Structure):  # noqa: N801
    """KV figures of a layer or of all layers."""

    _fields_ = [
        ("n_cells", ctypes.c_uint64),
        ("n_used", ctypes.c_uint64),
        ("bytes_per_cell", ctypes.c_uint64),
        ("bytes_reserved", ctypes.c_uint64),
        ("bytes_committed", ctypes.c_uint64),
        ("bytes_used", ctypes.c_uint64),
    ]


# struct llama_mod_kv_seq_stats { uint64_t n_tokens, bytes_used, bytes_dense; };
class llama_mod_kv_seq_stats(ctypes.Structure):  # noqa: N801
    """KV figures of a sequence."""

    _fields_ = [
        ("n_tokens", ctypes.c_uint64),
        ("bytes_used", ctypes.c_uint64),
        ("bytes_dense", ctypes.c_uint64),
    ]


# struct llama_mod_perf { uint64_t n_decode, n_tokens, n_graphs, ..., us_compute, us_read; };
class llama_mod_perf(ctypes.Structure):  # noqa: N801
    """Counters of decodes and graphs."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "n_decode",
            "n_tokens",
            "n_graphs",
            "n_graphs_reused",
            "n_graphs_small",
            "n_graphs_resized",
            "us_route",
            "us_slots",
            "us_build",
            "us_inputs",
            "us_compute",
            "us_read",
        )
    ]


def _symbol(argtypes: list, restype: Any, since: str = "") -> Callable:
    """Replace a function by the C symbol of its name.

    Where the library lacks the symbol, the function becomes one that raises UserError. since: what
    the symbol is for, where older patched libraries lack it and are of use all the same.
    """

    def bind(f: Callable) -> Callable:
        try:
            func = getattr(_llama._lib, f.__name__)
        except AttributeError:
            if not since:
                _missing.append(f.__name__)

            @functools.wraps(f)
            def absent(*_args):
                require()
                raise UserError(f"the loaded llama.cpp is too old for {since}", patched_cure())

            return absent
        func.argtypes, func.restype = argtypes, restype
        functools.wraps(f)(func)
        return func

    return bind


# LLAMA_API int32_t llama_mod_adapter_load(struct llama_model * model, const char * path);
@_symbol([_model_p, ctypes.c_char_p], ctypes.c_int32, since="routers beside a model's file")
def llama_mod_adapter_load(model, path):
    """Puts the routers of a file beside a model without context; 0 or an ERRORS key."""


# LLAMA_API int32_t llama_mod_n_units(const struct llama_model * model);
@_symbol([_model_p], ctypes.c_int32)
def llama_mod_n_units(model):
    """Number of routed units; 0 for a dense model."""


# LLAMA_API bool llama_mod_get_unit(
#     const struct llama_model * model, int32_t i, struct llama_mod_unit * unit);
@_symbol([_model_p, ctypes.c_int32, ctypes.POINTER(llama_mod_unit)], ctypes.c_bool)
def llama_mod_get_unit(model, i, unit):
    """Fills `unit`; False where there is no unit i."""


# LLAMA_API int32_t llama_mod_kv_window(const struct llama_model * model);
@_symbol([_model_p], ctypes.c_int32)
def llama_mod_kv_window(model):
    """Largest recent window of the kv units in tokens; 0: no kv units."""


# LLAMA_API int32_t llama_mod_n_sink(const struct llama_model * model);
@_symbol([_model_p], ctypes.c_int32)
def llama_mod_n_sink(model):
    """Number of first positions that are always active."""


# LLAMA_API int32_t llama_mod_layer_window(const struct llama_model * model, int32_t il);
@_symbol([_model_p, ctypes.c_int32], ctypes.c_int32)
def llama_mod_layer_window(model, il):
    """How many tokens the attention of layer il sees at most, in any model; 0: all of them."""


# LLAMA_API float llama_mod_get_threshold(const struct llama_context * ctx, int32_t i);
@_symbol([_ctx_p, ctypes.c_int32], ctypes.c_float)
def llama_mod_get_threshold(ctx, i):
    """Threshold p of unit i, without the shift."""


# LLAMA_API int32_t llama_mod_set_threshold(struct llama_context * ctx, int32_t i, float p);
@_symbol([_ctx_p, ctypes.c_int32, ctypes.c_float], ctypes.c_int32)
def llama_mod_set_threshold(ctx, i, p):
    """Sets p of unit i, 0 < p < 1, for the tokens decoded from now on; 0 or an ERRORS key."""


# LLAMA_API float llama_mod_get_shift(const struct llama_context * ctx);
@_symbol([_ctx_p], ctypes.c_float)
def llama_mod_get_shift(ctx):
    """Shift of all thresholds, in logit space."""


# LLAMA_API int32_t llama_mod_set_shift(struct llama_context * ctx, float shift);
@_symbol([_ctx_p, ctypes.c_float], ctypes.c_int32)
def llama_mod_set_shift(ctx, shift):
    """Sets the shift (finite); 0 or an ERRORS key."""


# LLAMA_API enum llama_mod_force llama_mod_get_force(const struct llama_context * ctx);
@_symbol([_ctx_p], ctypes.c_int)
def llama_mod_get_force(ctx):
    """Index into FORCES."""


# LLAMA_API int32_t llama_mod_set_force(struct llama_context * ctx, enum llama_mod_force force);
@_symbol([_ctx_p, ctypes.c_int], ctypes.c_int32)
def llama_mod_set_force(ctx, force):
    """Sets the index into FORCES; 0 or an ERRORS key."""


# LLAMA_API int32_t llama_mod_get_kv_rollback(const struct llama_context * ctx);
@_symbol([_ctx_p], ctypes.c_int32)
def llama_mod_get_kv_rollback(ctx):
    """How many positions of a tail can be taken back exactly."""


# LLAMA_API int32_t llama_mod_set_kv_rollback(struct llama_context * ctx, int32_t n);
@_symbol([_ctx_p, ctypes.c_int32], ctypes.c_int32)
def llama_mod_set_kv_rollback(ctx, n):
    """Sets it, n >= 0; 0 or an ERRORS key."""


# LLAMA_API bool llama_mod_checkpoint_fits(
#     struct llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq_id);
@_symbol(
    [_ctx_p, ctypes.POINTER(ctypes.c_uint8), ctypes.c_size_t, _llama.llama_seq_id], ctypes.c_bool
)
def llama_mod_checkpoint_fits(ctx, src, size, seq_id):
    """Whether restoring a checkpoint (a partial state) would bring the sequence back."""


# LLAMA_API bool llama_mod_set_adaptive_threads(struct llama_context * ctx, bool enabled);
@_symbol([_ctx_p, ctypes.c_bool], ctypes.c_bool)
def llama_mod_set_adaptive_threads(ctx, enabled):
    """Lets graphs run with fewer threads while others need the processors; False on a GPU."""


# LLAMA_API int32_t llama_mod_n_threads(const struct llama_context * ctx);
@_symbol([_ctx_p], ctypes.c_int32)
def llama_mod_n_threads(ctx):
    """Threads of the last graph; 0 before the first."""


# LLAMA_API bool llama_mod_get_unit_stats(
#     const struct llama_context * ctx, int32_t i, struct llama_mod_unit_stats *);
@_symbol([_ctx_p, ctypes.c_int32, ctypes.POINTER(llama_mod_unit_stats)], ctypes.c_bool)
def llama_mod_get_unit_stats(ctx, i, stats):
    """Fills the counters of unit i; False where there is none."""


# LLAMA_API bool llama_mod_get_perf(const struct llama_context * ctx, struct llama_mod_perf * perf);
@_symbol([_ctx_p, ctypes.POINTER(llama_mod_perf)], ctypes.c_bool)
def llama_mod_get_perf(ctx, perf):
    """Fills the counters of decodes and graphs."""


# LLAMA_API void llama_mod_reset_stats(struct llama_context * ctx);
@_symbol([_ctx_p], None)
def llama_mod_reset_stats(ctx):
    """Sets all counters to 0."""


# LLAMA_API bool llama_mod_get_kv_stats(
#     const struct llama_context * ctx, int32_t il, struct llama_mod_kv_stats *);
@_symbol([_ctx_p, ctypes.c_int32, ctypes.POINTER(llama_mod_kv_stats)], ctypes.c_bool)
def llama_mod_get_kv_stats(ctx, il, stats):
    """Fills the KV figures of layer il, of all layers with il = -1."""


# LLAMA_API bool llama_mod_get_kv_seq_stats(
#     const struct llama_context * ctx, llama_seq_id seq_id, struct llama_mod_kv_seq_stats *);
@_symbol([_ctx_p, _llama.llama_seq_id, ctypes.POINTER(llama_mod_kv_seq_stats)], ctypes.c_bool)
def llama_mod_get_kv_seq_stats(ctx, seq_id, stats):
    """Fills the KV figures of a sequence; False where there is none."""


# LLAMA_API int32_t llama_mod_get_trace(
#     const struct llama_context *, const uint8_t ** active, const float ** score);
@_symbol(
    [
        _ctx_p,
        ctypes.POINTER(ctypes.POINTER(ctypes.c_uint8)),
        ctypes.POINTER(ctypes.POINTER(ctypes.c_float)),
    ],
    ctypes.c_int32,
)
def llama_mod_get_trace(ctx, active, score):
    """Points to the decisions of the last decode; the number of its tokens."""


# LLAMA_API int32_t llama_mod_api_version(void);
@_symbol([], ctypes.c_int32)
def llama_mod_api_version():
    """Version of llama-mod.h that the library was built from."""


def patched() -> bool:
    """Whether the loaded library has all symbols of llama-mod.h."""
    return not _missing


def require() -> None:
    """Raise UserError, naming a missing symbol, where the loaded library is not the patched one."""
    if _missing:
        more = f" and {len(_missing) - 1} others of llama-mod.h" if len(_missing) > 1 else ""
        raise UserError(
            f"the installed llama.cpp is not the patched one: it lacks {_missing[0]}{more}",
            patched_cure(),
        )


def check_version() -> None:
    """Raise UserError for a patched library whose interface is another one than the package's.

    A library without any of the symbols is a stock one, which opens dense files.
    """
    if not hasattr(_llama._lib, "llama_mod_n_units"):
        return
    version = getattr(_llama._lib, "llama_mod_api_version", lambda: 1)()
    if version != API_VERSION:
        raise UserError(
            f"the loaded llama.cpp has version {version} of the MoD interface, and this package "
            f"needs version {API_VERSION}",
            patched_cure(),
        )


@functools.cache
def warn_of_other_patches() -> None:
    """Log a line, once, where the loaded library was built from other patches than the package has.

    That happens after an upgrade of the package.
    """
    marker = Path(_llama._lib._name).parent / llama_build.MARKER
    with contextlib.suppress(OSError, ValueError, UserError):  # a library of the user's own
        built_from = json.loads(marker.read_text()).get("patches")
        if built_from != llama_source.patches_digest():
            logger.warning(
                "the loaded llama.cpp was built from other patches than this version has: "
                f"{patched_cure()}"
            )


def n_units(model) -> int:
    """Number of routed units; 0 on a stock library too, which opens dense files only."""
    return llama_mod_n_units(model) if patched() else 0


def get_kv_stats(ctx, layer: int = -1) -> llama_mod_kv_stats | None:
    """KV figures of a layer, or of all layers with -1.

    None for a dense model, and for a layer that does not exist.
    """
    stats = llama_mod_kv_stats()
    return stats if patched() and llama_mod_get_kv_stats(ctx, layer, ctypes.byref(stats)) else None


def get_kv_seq_stats(ctx, sequence: int = 0) -> llama_mod_kv_seq_stats | None:
    """KV figures of a sequence; None for a dense model, and for a sequence that does not exist."""
    stats = llama_mod_kv_seq_stats()
    done = patched() and llama_mod_get_kv_seq_stats(ctx, sequence, ctypes.byref(stats))
    return stats if done else None


def get_trace(model, ctx) -> tuple[np.ndarray, np.ndarray]:
    """Decisions (uint8) and router logits (float32) of the last decode, [n_tokens, n_units]."""
    active, score = ctypes.POINTER(ctypes.c_uint8)(), ctypes.POINTER(ctypes.c_float)()
    n, units = 0, n_units(model)
    if units:
        n = llama_mod_get_trace(ctx, ctypes.byref(active), ctypes.byref(score))
    if n <= 0:
        return np.zeros((0, units), np.uint8), np.zeros((0, units), np.float32)
    return (
        np.ctypeslib.as_array(active, (n, units)).copy(),
        np.ctypeslib.as_array(score, (n, units)).copy(),
    )
