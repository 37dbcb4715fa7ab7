"""Mixture-of-Depths for existing decoder models.

The package converts, calibrates, trains, exports to GGUF, and runs models on a patched llama.cpp.

    from mod_export import MoDConfig, MoDLlama, MoDModel

imports each class when it is asked for: importing the package imports nothing heavy. The functions
`convert`, `export`, `train` and `evaluate` are not here, because `mod_export.convert` and
`mod_export.export` are modules of the same names: `from mod_export.convert import convert`.

The package is silent by default. Its messages go to the logger `mod_export`.
"""

import importlib
import logging

__version__ = "0.2.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

# class -> its module
_CLASSES = {
    "MoDConfig": "mod_export.config",
    "MoDLlama": "mod_export.runtime",
    "MoDModel": "mod_export.model",
}

__all__ = ["MoDConfig", "MoDLlama", "MoDModel"]


def __getattr__(name: str):
    """Import a class of the package when it is asked for (PEP 562)."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
