"""How far a walk through the layers of a model has come, in a file, so that a stopped one goes on.

The file holds the residual streams behind a layer, and what was found up to there. It is written
after each layer, whole or not at all. Behind the last layer the streams are left out.

    state = WalkState(Path("mod.run"), "activation-1")
    state.layer, state.found             # 0 and {} at first; found: what torch.save takes
    for layer in walk.layers(state=state): ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mod_export.common.files import atomic_file
from mod_export.errors import UserError


class WalkState:
    """The file of one walk.

    layer: how many layers are done. found: what is kept with them, filled by who walks. Raises
    UserError for a file that is damaged.
    """

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}.pt"
        self.layer, self.found = 0, {}
        self._streams: torch.Tensor | None = None
        if self.path.is_file():
            held = self._read()
            self.layer, self.found, self._streams = held["layer"], held["found"], held["streams"]

    def _read(self) -> dict[str, Any]:
        try:
            held = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as exc:  # torch raises many kinds
            raise UserError(
                f"{self.path} is damaged ({str(exc).splitlines()[0]})", f"remove {self.path}"
            ) from exc
        if not isinstance(held, dict) or held.keys() != {"layer", "found", "streams"}:
            raise UserError(f"{self.path} is no state of a conversion", f"remove {self.path}")
        return held

    def restore(self, streams: torch.Tensor) -> None:
        """Fill the residual streams of all sequences, one after the other, with those of the file.

        Raises UserError where the file has others.
        """
        if self._streams is None:
            return
        if self._streams.shape != streams.shape or self._streams.dtype != streams.dtype:
            raise UserError(f"{self.path} is of other texts", f"remove {self.path}")
        streams.copy_(self._streams)
        self._streams = None

    def keep(self, layer: int, streams: torch.Tensor | None) -> None:
        """Write what there is behind a layer. streams: None behind the last one.

        Raises UserError where the disk is full.
        """
        self.layer = layer
        held = {"layer": layer, "found": self.found, "streams": streams}
        try:
            with atomic_file(self.path, force=True) as tmp:
                torch.save(held, tmp)
        except RuntimeError as exc:  # torch's writer raises it for a full disk
            raise UserError(
                f"cannot write {self.path}: {str(exc).splitlines()[0]}",
                "make room, then go on with --resume",
            ) from exc
