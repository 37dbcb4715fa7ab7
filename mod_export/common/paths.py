"""Where the package keeps files of its own."""

import os
from pathlib import Path

from mod_export.errors import UserError

SET_CACHE = "set MOD_EXPORT_CACHE to a directory that can be written to"


def cache_dir(part: str | None = None) -> Path:
    """Return $MOD_EXPORT_CACHE, or `mod-export` in the user's cache directory.

    part: a directory in it, which is returned instead and is to be written to. A directory that is
    missing is created. Raises UserError where that fails, where a user has no home directory (a
    container's user without a name), and for a part that cannot be written to.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("MOD_EXPORT_CACHE") or Path(base) / "mod-export"
    try:
        path = Path(chosen).expanduser().absolute() / (part or "")
    except RuntimeError as exc:
        raise UserError("there is no home directory for the cache", SET_CACHE) from exc
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(
            f"cannot create the cache directory {path}: {exc.strerror}", SET_CACHE
        ) from exc
    if part and not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the cache directory {path}", SET_CACHE)
    return path
