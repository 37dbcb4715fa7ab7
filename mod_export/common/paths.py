"""Where the package keeps files of its own."""

import os
from pathlib import Path

from mod_export.errors import UserError


def cache_dir() -> Path:
    """Return $MOD_EXPORT_CACHE, or `mod-export` in the user's cache directory.

    The directory is created where it is missing. Raises UserError where that fails.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("MOD_EXPORT_CACHE") or Path(base) / "mod-export"
    path = Path(chosen).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(
            f"cannot create the cache directory {path}: {exc.strerror}", "set MOD_EXPORT_CACHE"
        ) from exc
    return path
