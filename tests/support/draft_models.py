"""Draft models that read the inputs of their model's layers: EAGLE-3, DFlash, DSpark.

    with_layers(folder / "llama.gguf", folder / "draft.gguf", "eagle3", layers=[1, 2, 3])

Such a draft has one layer, and the output of its model. It passes on what the last one of the
layers reads, and adds little, so that it is right where the model says a token once more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mod_export.formats.gguf import GGUFFile, rewrite

ARCHITECTURES = {"eagle3": "eagle3", "dflash": "dflash", "dspark": "dflash"}
N_HEAD, N_FF, BLOCK, RANK = 4, 96, 6, 4
WINDOW = 4  # tokens that a block sees
MASK = 258  # the token in the places of a block that are to be filled
SHARE = 0.1  # of what is random


def with_layers(path: Path, target: Path, kind: str, layers: list[int]) -> Path:
    """Write a draft for the f32 file `path` to `target`.

    kind: one of ARCHITECTURES. layers: whose inputs the draft reads, 3 for eagle3; the number of
        layers stands for what the last layer puts out
    """
    file = GGUFFile.open(path)
    width, arch = file.model_number("embedding_length"), ARCHITECTURES[kind]
    numbers = {
        "block_count": 1,
        "context_length": 2048,
        "embedding_length": width,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
    }
    numbers |= {"target_hidden_size": width} if kind == "eagle3" else {"block_size": BLOCK}
    keys: list[tuple[str, str, object]] = [
        *((f"{arch}.{name}", "u32", number) for name, number in numbers.items()),
        (f"{arch}.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        (f"{arch}.target_layers", "i32[]", layers),
    ]
    if kind != "eagle3":
        keys += [
            (f"{arch}.attention.sliding_window", "u32", WINDOW),
            (f"{arch}.attention.sliding_window_pattern", "bool[]", [True]),
            ("tokenizer.ggml.mask_token_id", "u32", MASK),
        ]
    own = _eagle(width) if kind == "eagle3" else _block(file, width, kind)
    with target.open("wb") as out:
        rewrite(
            file,
            out,
            added_keys=keys,
            changed_keys={"general.architecture": arch},
            added_tensors=_common(width, len(layers)) | own,
            kept_tensors={"output_norm.weight": "output_norm.weight"},
        )
    return target


def _random(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    numbers = np.random.default_rng(rows + columns).standard_normal((rows, columns))
    return (scale / np.sqrt(columns) * numbers).astype(np.float32)


def _common(width: int, n_layers: int) -> dict[str, np.ndarray]:
    before = _random(width, (n_layers - 1) * width, SHARE)
    return {
        "fc.weight": np.concatenate([before, np.eye(width, dtype=np.float32)], axis=1),
        "blk.0.attn_norm.weight": np.ones(width, np.float32),
        "blk.0.ffn_norm.weight": np.ones(width, np.float32),
        "blk.0.ffn_gate.weight": _random(N_FF, width),
        "blk.0.ffn_up.weight": _random(N_FF, width),
        "blk.0.ffn_down.weight": _random(width, N_FF, SHARE),
    }


def _eagle(width: int) -> dict[str, np.ndarray]:
    """Attention that adds little; a token and a state side by side are its input."""
    read = {f"blk.0.attn_{name}.weight": _random(width, 2 * width) for name in "qkv"}
    return read | {
        "blk.0.attn_norm_2.weight": np.ones(width, np.float32),
        "blk.0.attn_output.weight": _random(width, width, SHARE),
    }


def _block(file: GGUFFile, width: int, kind: str) -> dict[str, np.ndarray]:
    """Attention whose result is the mean of what lies in the window; masks count for nothing."""
    identity = np.eye(width, dtype=np.float32)
    size = np.ones(width // N_HEAD, np.float32)
    embedding = file.tensors["token_embd.weight"].array().copy()
    output = file.tensors.get("output.weight", file.tensors["token_embd.weight"]).array()
    embedding[MASK] = 0
    tensors = {
        "enc.output_norm.weight": np.ones(width, np.float32),
        "blk.0.attn_q_norm.weight": size,
        "blk.0.attn_k_norm.weight": size,
        "blk.0.attn_q.weight": 0 * identity,
        "blk.0.attn_k.weight": _random(width, width),
        "blk.0.attn_v.weight": identity,
        "blk.0.attn_output.weight": identity,
        "token_embd.weight": embedding,
        "output.weight": output,
    }
    if kind == "dspark":
        tensors["markov_w1.weight"] = _random(len(embedding), RANK)
        tensors["markov_w2.weight"] = _random(len(embedding), RANK, SHARE)
    return tensors
