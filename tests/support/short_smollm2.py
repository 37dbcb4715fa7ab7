"""The first layers of the embedded SmolLM2: real weights and a real vocabulary in less time.

    base = short_smollm2(tmp_path / "base.gguf", n_layer=9)

The inputs of the layers are those that they have in the whole model.
"""

from __future__ import annotations

from pathlib import Path

from mod_export.formats import hub
from mod_export.formats.gguf import GGUFFile, rewrite


def short_smollm2(path: Path, n_layer: int) -> Path:
    """Write the file, whose layers read what they read in the whole model."""
    source = GGUFFile.open(hub.embedded_gguf())
    kept = {name: name for name in source.tensors if _layer(name) < n_layer}
    with open(path, "wb") as out:
        rewrite(source, out, changed_keys={"llama.block_count": n_layer}, kept_tensors=kept)
    return path


def _layer(name: str) -> int:
    """Return the layer of a tensor, or -1 for tensors outside of layers."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1
