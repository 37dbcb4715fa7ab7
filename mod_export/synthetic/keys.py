"""The keys of a synthetic model's file, which say its shape.

keys(preset_named("1b"))        # [("llama.block_count", "u32", 16), ...]
header(shape)                   # the same as the header of a file that need not exist
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mod_export.formats.gguf import GGUFFile, Key
from mod_export.synthetic.shape import ATTENTION_INTERVAL, Shape
from mod_export.synthetic.tensors import CONVOLVED_TOKENS

RMS_EPS = 1e-5
# of Qwen3.5: how many pairs turn by time, height and width, which are the same for text
ROPE_SECTIONS = [11, 11, 10, 0]


def keys(shape: Shape) -> list[tuple[str, str, object]]:
    """(key, type, value) of every key of the architecture, in the form of schema.to_keys."""
    found: dict[str, int | float | list[int]] = {
        "context_length": shape.ctx,
        "embedding_length": shape.embd,
        "block_count": shape.layers,
        "feed_forward_length": shape.ff,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads_kv,
        "attention.layer_norm_rms_epsilon": RMS_EPS,
        "rope.freq_base": float(shape.rope_base),
        "rope.dimension_count": shape.rotated,
        "vocab_size": shape.vocab,
    }
    if shape.head_size:
        found |= {"attention.key_length": shape.head, "attention.value_length": shape.head}
    if shape.experts:
        found |= {"expert_count": shape.experts, "expert_used_count": shape.used}
        found["expert_feed_forward_length"] = shape.ff
    if shape.shared_ff:
        found["expert_shared_feed_forward_length"] = shape.shared_ff
    if shape.window:
        found["attention.sliding_window"] = shape.window
    if shape.net_values:
        found |= {
            "full_attention_interval": ATTENTION_INTERVAL,
            "rope.dimension_sections": ROPE_SECTIONS,
            "ssm.conv_kernel": CONVOLVED_TOKENS,
            "ssm.state_size": shape.net_head,
            "ssm.group_count": shape.net_keys,
            "ssm.time_step_rank": shape.net_values,
            "ssm.inner_size": shape.net_inner,
        }
    types = {int: "u32", float: "f32", list: "i32[]"}
    return [(f"{shape.arch}.{name}", types[type(v)], v) for name, v in found.items()]


def header(shape: Shape) -> GGUFFile:
    """The keys as a file has them, for what asks a file about its layers."""
    found = {"general.architecture": Key("string", shape.arch)}
    for name, type_name, value in keys(shape):
        found[name] = Key(type_name, np.array(value) if isinstance(value, list) else value)
    return GGUFFile(Path("the shape"), 3, 32, found, {}, {}, memoryview(b""), 0)
