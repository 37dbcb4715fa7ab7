"""llama.cpp's log as errors of ours, and the checks that llama.cpp itself does not make.

Example:

    with kept_log() as log:
        ...                      # what llama.cpp reports as an error is appended to `log`
    reason(log)                  # the line that says what is wrong
"""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError

from mod_export.common.system import available_memory
from mod_export.common.text import check_name
from mod_export.errors import UserError
from mod_export.formats.base_identity import RIGHT_MODEL
from mod_export.formats.gguf import GIVE_FILE, GGUFFile
from mod_export.formats.kv_size import kv_layers
from mod_export.formats.model_checks import check_content, check_model
from mod_export.runtime import bindings  # first: it says what to do where llama_cpp is missing
from mod_export.runtime.assertions import AssertionFailure

import llama_cpp  # isort: skip
from llama_cpp import _logger  # isort: skip

GGML_LOG_LEVEL_ERROR = 4  # ggml.h; llama_cpp has no name for it
# A context up to this many tokens is not checked: most machines have the memory for it.
UNCHECKED_CONTEXT_TOKENS = 1 << 16
# Bytes of a cell's position, shift and sequences, in each cache (llama-kv-cells.h).
CELL_LIST_BYTES = 48
MAX_CONTEXT_TOKENS = 1 << 31
OUT_OF_MEMORY = re.compile("alloc|out of memory|not enough memory|mmap failed|mlock", re.IGNORECASE)
SAY_SO = "please report it, with the file's `mod-export inspect`"
GET_OR_MAKE_AGAIN = "get or make the file again"
# The reasons that llama.cpp logs, and what helps; for all others the file is at fault.
LOAD_CURES = (
    (
        re.compile("unknown model architecture"),
        "use a model of an architecture that llama.cpp knows; a newer mod-export may know it",
    ),
    (
        re.compile("cannot have (routers|these routers|a router)"),
        "use the model without routers (`mod-export export --dense`), or with the units that "
        "its architecture can have (docs/reference/architectures.md)",
    ),
    (re.compile("this build (reads|knows)"), "use a newer mod-export"),
    (OUT_OF_MEMORY, "free some memory, or use a smaller quantisation"),
    (re.compile("failed to open|Permission denied"), "check its permissions"),
)
REASON_PREFIXES = (
    "error loading model: ",
    "error loading model hyperparameters: ",
    "error loading model vocabulary: ",
    "error loading state: ",
    "error loading routers: ",
)


@contextmanager
def kept_log(keep: bool = True) -> Iterator[list[str]]:
    """Collect llama.cpp's errors inside the block instead of printing them.

    With keep=False llama.cpp prints as usual, and the list stays empty.
    """
    lines: list[str] = []
    if not keep:
        yield lines
        return

    @llama_cpp.llama_log_callback
    def collect(level, text, _data):
        if level == GGML_LOG_LEVEL_ERROR:
            lines.append((text or b"").decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def reason(log: list[str]) -> str:
    """The first line of the log that says what is wrong, without the name of a C function."""
    lines = [line for line in log if line]
    for prefix in REASON_PREFIXES:
        lines = [line.split(prefix)[-1] for line in lines]
    return lines[0] if lines else ""


def load_error(path: str | os.PathLike, n_ctx: int, exc: Exception, log: list[str]) -> UserError:
    """The error for a file or a context that llama.cpp refused, or that made an assertion fail."""
    if isinstance(exc, AssertionFailure):
        return UserError(
            f"{path} is damaged, or llama.cpp has a fault: {exc}", "get or make the file again"
        )
    if isinstance(exc, TemplateError):
        return UserError(f"{path} has a broken chat template: {exc}", "get the file again")
    why = reason(log) or str(exc)
    if "context" in str(exc):
        cure = "use a smaller context" if OUT_OF_MEMORY.search(why) else SAY_SO
        return UserError(f"cannot create a context of {n_ctx} tokens for {path}: {why}", cure)
    if not reason(log) and not str(exc).startswith("Failed"):  # llama_cpp never asked llama.cpp
        return UserError(f"cannot open {path}: {exc}", "check the arguments")
    return UserError(f"cannot load {path}: {why}", _cure_of_load(why))


def routers_error(mod: str | os.PathLike, path: str | os.PathLike, log: list[str]) -> UserError:
    """The error for routers that llama.cpp does not put beside the file of a model."""
    why = reason(log) or "llama.cpp refuses them"
    if "the routers are for" in why:
        cure = RIGHT_MODEL
    elif "routers already" in why:
        cure = "leave out the routers beside it, or give the model without routers"
    else:
        cure = _cure_of_load(why)
    return UserError(f"cannot put the routers of {mod} beside {path}: {why}", cure)


def _cure_of_load(why: str) -> str:
    """What helps where llama.cpp does not open a file, by the reason that it logged."""
    if not bindings.patched() and "wrong number of tensors" in why:
        return f"a MoD file needs the patched llama.cpp: {bindings.patched_cure()}"
    return next((cure for pattern, cure in LOAD_CURES if pattern.search(why)), GET_OR_MAKE_AGAIN)


def decode_error(exc: Exception, log: list[str]) -> UserError:
    """The error for a batch that llama.cpp could not decode."""
    if str(exc).endswith(" 1"):
        return UserError("llama.cpp cannot decode: no free KV cell", "use a larger context")
    return UserError(f"llama.cpp cannot decode: {reason(log) or exc}")


def check_file(path: str | os.PathLike, is_model: bool = True) -> None:
    """Raise UserError for a path that is no readable GGUF file, and for a file that is damaged.

    is_model: False for an adapter.
    """
    check_name(path)
    file = Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist", "check the path")
    if not file.is_file():
        raise UserError(f"{path} is not a file", GIVE_FILE)
    try:
        with file.open("rb") as f:
            magic = f.read(4)
    except OSError as exc:
        raise UserError(f"cannot read {path}: {exc.strerror}", "check its permissions") from exc
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file", GIVE_FILE)
    found = GGUFFile.open(path)
    (check_model if is_model else check_content)(found)
    found.check_parts()


def check_context(
    path: str | os.PathLike,
    n_ctx: int,
    has_mod: bool = False,
    sizes: tuple[float, float] | None = None,
) -> None:
    """Raise UserError for a context that cannot fit into the free memory.

    has_mod: routers are put beside the file.

    What counts is as long as the context, however little of the context is used: the lists of KV
    cells, and K and V of a dense file, whose values have `sizes` bytes. Without `sizes` they do not
    count. llama.cpp does not report a lack of memory for the lists, and where the system promises
    more memory than there is, none for K and V.
    """
    if 0 < n_ctx <= UNCHECKED_CONTEXT_TOKENS:
        return
    file = GGUFFile.open(path)
    n_ctx = n_ctx or file.get(f"{file.architecture}.context_length", 0)
    if not isinstance(n_ctx, int) or n_ctx <= UNCHECKED_CONTEXT_TOKENS:
        return
    layers = file.get(f"{file.architecture}.block_count", 0)
    is_mod = has_mod or f"{file.architecture}.mod.version" in file.keys
    caches = 1 + layers if is_mod and isinstance(layers, int) else 1
    need = n_ctx * caches * CELL_LIST_BYTES
    if sizes and not is_mod:
        need += round(sum(layer.dense_bytes(n_ctx) for layer in kv_layers(file, *sizes)))
    free = available_memory()
    if n_ctx >= MAX_CONTEXT_TOKENS or need > free:
        what = "K, V and its lists of cells" if sizes and not is_mod else "its lists of cells alone"
        raise UserError(
            f"a context of {n_ctx} tokens takes {need >> 20} MiB of memory for {what}, of "
            f"{free >> 20} MiB that are free",
            "use a smaller context",
        )
