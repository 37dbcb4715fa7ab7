"""Routers beside a model, and whether llama.cpp opens a file without reading its weights.

check_opens(Path("base.gguf"), "get it again")
put_routers(model, Path("routers.gguf"))
"""

from __future__ import annotations

import os
from pathlib import Path

from mod_export.errors import UserError
from mod_export.formats import gguf_adapter
from mod_export.runtime import bindings
from mod_export.runtime.assertions import AssertionFailure, guarded
from mod_export.runtime.log import kept_log, reason, routers_error

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

NO_MAPPING = 0  # LLAMA_LOAD_MODE_NONE


class RoutersRefusedError(Exception):
    """llama.cpp does not put the routers beside the model; its log says why (log.routers_error)."""


def put_routers(model: _internals.LlamaModel, file: Path) -> None:
    """Put the routers of a file beside a model that has no context yet.

    Raises RoutersRefusedError, and UserError where the library is too old or not the patched one.
    """
    if bindings.llama_mod_adapter_load(model.model, os.fsencode(file)):
        raise RoutersRefusedError


def check_opens(
    path: Path, cure: str, mod: str | os.PathLike | None = None, name: str = ""
) -> None:
    """Raise UserError with llama.cpp's reason where it refuses the file, or routers beside it.

    mod: the routers, as gguf_adapter.locate takes them. name: what the message calls the file, by
    default its own name.
    """
    routers = None if mod is None else gguf_adapter.locate(mod)
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = NO_MAPPING
    with kept_log() as log:
        try:
            guarded(lambda: _open(path, params, routers))
        except RoutersRefusedError as exc:
            raise routers_error(mod or "", path, log) from exc
        except (AssertionFailure, ValueError) as exc:
            why = str(exc) if isinstance(exc, AssertionFailure) else reason(log) or str(exc)
            raise UserError(f"llama.cpp does not open {name or path.name}: {why}", cure) from exc


def _open(path: Path, params: llama_cpp.llama_model_params, routers: Path | None) -> None:
    model = _internals.LlamaModel(path_model=str(path), params=params, verbose=False)
    try:
        if routers is not None:
            put_routers(model, routers)
    finally:
        model.close()
