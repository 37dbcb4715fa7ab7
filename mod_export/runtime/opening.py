"""Whether llama.cpp opens a GGUF file, without reading its weights.

check_opens(Path("base.gguf"))
"""

from __future__ import annotations

from pathlib import Path

from mod_export.errors import UserError
from mod_export.runtime.assertions import AssertionFailure, guarded
from mod_export.runtime.log import kept_log, reason

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

NO_MAPPING = 0  # LLAMA_LOAD_MODE_NONE


def check_opens(path: Path, cure: str) -> None:
    """Raise UserError with llama.cpp's reason where it refuses the file."""
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = NO_MAPPING
    with kept_log() as log:
        try:
            guarded(lambda: _open(path, params))
        except (AssertionFailure, ValueError) as exc:
            why = str(exc) if isinstance(exc, AssertionFailure) else reason(log) or str(exc)
            raise UserError(f"llama.cpp does not open {path.name}: {why}", cure) from exc


def _open(path: Path, params: llama_cpp.llama_model_params) -> None:
    _internals.LlamaModel(path_model=str(path), params=params, verbose=False).close()
