"""A GGUF file from the Hugging Face hub, as llama_cpp.Llama.from_pretrained gets it.

    path = download("org/name-GGUF", "*q8_0.gguf")

llama_cpp's own passes an option that huggingface_hub has dropped, and needs the network for files
that are in the hub's cache.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

from mod_export.errors import UserError

GLOB_CHARACTERS = frozenset("*?[")
SHOWN_FILES = 8


def download(repo_id: str, filename: str, more: Sequence[str] = (), **options: Any) -> str:
    """The path of the one file that `filename`, a name or a glob pattern, matches.

    The files of `more`, such as other parts of a split model, come to the same folder. options:
    local_dir and cache_dir of huggingface_hub.hf_hub_download. Raises UserError where the hub
    cannot be reached or refuses, and where none or several files match.
    """
    try:
        import huggingface_hub
    except ImportError as exc:
        raise UserError("huggingface_hub is missing", "pip install huggingface_hub") from exc

    names: list[str] = []
    try:
        if any(GLOB_CHARACTERS & set(pattern) for pattern in (filename, *more)):
            names = huggingface_hub.HfApi().list_repo_files(repo_id)
        path, *_ = [
            huggingface_hub.hf_hub_download(repo_id, _match(repo_id, pattern, names), **options)
            for pattern in (filename, *more)
        ]
    except UserError:
        raise
    except Exception as exc:  # of the hub's library, of HTTP libraries, of the system
        line = str(exc).strip().partition("\n")[0] or type(exc).__name__
        raise UserError(
            f"cannot get {filename} of {repo_id} from the hub: {line}",
            "check the name and the network, or give a file",
        ) from exc
    return os.fspath(path)


def _match(repo_id: str, pattern: str, names: list[str]) -> str:
    """The one name that the pattern matches; a pattern without wildcards is a name."""
    if not GLOB_CHARACTERS & set(pattern):
        return pattern
    found = fnmatch.filter(names, pattern)
    if len(found) == 1:
        return found[0]
    shown = found or names
    listed = ", ".join(shown[:SHOWN_FILES]) + (" ..." if len(shown) > SHOWN_FILES else "")
    what = "several files match" if found else "no file matches"
    raise UserError(f"{what} {pattern} in {repo_id}: {listed}", "name one file")
