"""A GGUF file in llama.cpp, without torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mod_export.runtime.llama import MoDLlama

__all__ = ["MoDLlama"]


def __getattr__(name: str):
    """Import MoDLlama when it is asked for (PEP 562), because that import is slow."""
    if name == "MoDLlama":
        from mod_export.runtime.llama import MoDLlama

        return MoDLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
