"""A head for multi-token prediction behind a model, whose drafts are right now and then.

    with_head(folder / "qwen35.gguf", folder / "mtp.gguf", layer=3)
    add_head(folder / "qwen35", layer=3)      # the same in a directory of transformers

The head is a copy of a layer with full attention, behind the last one, which adds little. It reads
the hidden state of the token before and hardly the token, so that it drafts the token once more.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mod_export.formats.gguf import GGUFFile, rewrite
from mod_export.formats.sliding_windows import draft_layers, main_layers
from tests.support.gguf_models import write_models
from tests.support.model_types import MODEL_TYPES

NAMES = ("qwen3_5", "glm4_moe")  # of models that have such heads; the first one is a hybrid
LAYER = 3  # with full attention in both
TOKEN_SHARE = 0.1  # of what the head reads
LAYER_SHARE = 0.1  # of what the layer adds
ADDS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")


def write_models_with_heads(folder: Path) -> dict[str, Path]:
    """Write random models with heads; name -> file."""
    files = write_models(folder, {name: MODEL_TYPES[name] for name in NAMES})
    return {
        name: with_head(path, folder / f"{name}-head.gguf", LAYER) for name, path in files.items()
    }


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


def tensors_of_head(path: Path) -> dict[str, tuple[int, bytes]]:
    """The name of each tensor behind a file's own layers -> type and bytes."""
    file = GGUFFile.open(path)
    assert draft_layers(file) == 1
    start = f"blk.{main_layers(file)}."
    found = {name: t for name, t in file.tensors.items() if name.startswith(start)}
    return {name: (t.type, bytes(t.data)) for name, t in found.items()}


# What a head has beside its layer, as checkpoints of GLM-4.5 name it, and those of Qwen
OF_QWEN = {
    "eh_proj": "fc",
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "shared_head.norm": "norm",
}


def add_head(directory: Path, layer: int) -> dict[str, np.ndarray]:
    """Add a head, a copy of `layer`, to the file of a directory, and return its tensors.

    A head of GLM-4.5 has copies of the model's embedding and output matrix too.
    """
    config = json.loads((directory / "config.json").read_text())
    file, width = directory / "model.safetensors", config["hidden_size"]
    is_qwen, count = config["model_type"].startswith("qwen"), config["num_hidden_layers"]
    tensors, start = load_file(file), f"model.layers.{layer}."
    place = "mtp.layers.0." if is_qwen else f"model.layers.{count}."
    head = {}
    for name, value in tensors.items():
        if name.startswith(start):
            part = name.removeprefix(start)
            adds = any(part.endswith(f"{last}_proj.weight") for last in ("o", "down"))
            head[place + part] = value * np.float32(LAYER_SHARE if adds else 1)
    identity = np.eye(width, dtype=np.float32)
    norm = np.full(width, 0 if is_qwen else 1, np.float32)  # llama.cpp's converter adds 1
    more = dict.fromkeys(OF_QWEN, norm)
    more["eh_proj"] = np.concatenate([TOKEN_SHARE * identity, identity], axis=1)
    for part, value in more.items():
        name = f"mtp.{OF_QWEN[part]}" if is_qwen else place + part
        head[f"{name}.weight"] = value
    if not is_qwen:
        head[f"{place}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        head[f"{place}shared_head.head.weight"] = tensors["lm_head.weight"]
    save_file(tensors | head, file, metadata={"format": "pt"})
    config["mtp_num_hidden_layers" if is_qwen else "num_nextn_predict_layers"] = 1
    (directory / "config.json").write_text(json.dumps(config))
    return head
