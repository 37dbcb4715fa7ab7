"""An adapter made of the routers that a GGUF file has, without torch.

adapter = write_adapter(folder / "adapter", mod="mod.gguf", base="base.gguf")
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from mod_export.formats import adapter_files, schema
from mod_export.formats.base_identity import gguf_identity
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import bindings

needs_routers_beside = pytest.mark.skipif(
    not hasattr(bindings._llama._lib, "llama_mod_adapter_load"),
    reason="the patched llama.cpp is missing or older: run `mod-export build`",
)


def write_adapter(directory: Path, mod: Path, base: Path, **changes) -> Path:
    """Write the routers of `mod` as an adapter for `base`; changes: of the identity."""
    config, routers = schema.read_routers(GGUFFile.open(mod))
    assert config is not None
    directory.mkdir()
    tensors = schema.to_tensors(config, routers, schema.hf_tensor_names)
    save_file(tensors, directory / adapter_files.ROUTERS)
    identity = gguf_identity(GGUFFile.open(base)) | {"name": "tiny"} | changes
    data = {"mod": config.to_dict(), "base": identity}
    (directory / adapter_files.MOD_JSON).write_text(json.dumps(data))
    return directory
