"""A head for multi-token prediction behind a model, whose drafts are right now and then.

    with_head(folder / "qwen35.gguf", folder / "mtp.gguf", layer=3)

The head is a copy of a layer with full attention, behind the last one, which adds little. It reads
the hidden state of the token before and hardly the token, so that it drafts the token once more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mod_export.formats.gguf import GGUFFile, rewrite

TOKEN_SHARE = 0.1  # of what the head reads
LAYER_SHARE = 0.1  # of what the layer adds
ADDS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")


def with_head(path: Path, target: Path, layer: int) -> Path:
    """Write the f32 file `path` with a head, a copy of `layer`, to `target`."""
    file = GGUFFile.open(path)
    arch = file.architecture
    count, width = file.model_number("block_count"), file.model_number("embedding_length")
    nextn, recurrent = f"{arch}.nextn_predict_layers", f"{arch}.attention.recurrent_layers"
    dropped = {nextn, recurrent} & file.keys.keys()
    added: list[tuple[str, str, object]] = [(nextn, "u32", 1)]
    if recurrent in file.keys:
        added.append((recurrent, "bool[]", [*file.keys[recurrent].value, False]))
    start = f"blk.{layer}."
    copied = {}
    for name, tensor in file.tensors.items():
        if name.startswith(start):
            part = name.removeprefix(start)
            share = LAYER_SHARE if part.removesuffix(".weight") in ADDS else 1
            copied[f"blk.{count}.{part}"] = share * tensor.array()
    identity = np.eye(width, dtype=np.float32)
    norm = np.ones(width, np.float32)
    head = {
        "eh_proj": np.concatenate([TOKEN_SHARE * identity, identity], axis=1),
        "enorm": norm,
        "hnorm": norm,
    }
    with target.open("wb") as out:
        rewrite(
            file,
            out,
            added_keys=added,
            changed_keys={f"{arch}.block_count": count + 1},
            dropped_keys=dropped,
            added_tensors=copied
            | {f"blk.{count}.nextn.{name}.weight": value for name, value in head.items()},
        )
    return target
