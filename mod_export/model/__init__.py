"""What a MoD model computes, in torch: the reference of docs/explanation/semantics.md."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mod_export.model.mod_model import MoDModel

__all__ = ["MoDModel"]


def __getattr__(name: str):
    """Import MoDModel when it is asked for (PEP 562), because that import is slow."""
    if name == "MoDModel":
        from mod_export.model.mod_model import MoDModel

        return MoDModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
