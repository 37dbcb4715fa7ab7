"""Which layers of a GGUF file have a recurrent state, and which attend to K and V.

    recurrent_layers(GGUFFile.open("qwen3.5.gguf"))     # (True, True, True, False, True, ...)
    attention_layers(GGUFFile.open("qwen3.5.gguf"))     # (False, False, False, True, False, ...)
    state_bytes(GGUFFile.open("qwen3.5.gguf"))          # 20201472, of one sequence

The layers of most models attend; those of hybrids have a state or attend, and some do both, or have
an FFN alone. llama.cpp has the rules in its source, as load_arch_hparams of each architecture
(src/models/*.cpp of llama.cpp) and as the filters of llama_model::create_memory().
"""

from __future__ import annotations

import numpy as np

from mod_export.formats.gguf import GGUFFile
from mod_export.formats.sliding_windows import main_layers, whole_number

# one layer of so many attends
BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
# no K/V heads: a state
BY_HEADS = {"bailingmoe3", "granitehybrid", "jamba", "kimi-linear", "lfm2", "lfm2moe", "plamo2"}
OR_FFN = {"nemotron_h", "nemotron_h_moe"}  # so, where the layer is no FFN
BOTH = {"falcon-h1"}  # each layer has both
CONVOLUTIONS = {"lfm2", "lfm2moe"}  # their states are the last tokens that one sees
DELTA_ATTENTION = {"bailingmoe3", "kimi-linear"}
LIGHTNING_ATTENTION = {"minimax-01"}
F32_BYTES = 4


def recurrent_layers(file: GGUFFile) -> tuple[bool, ...]:
    """Whether each layer has a recurrent state, [n_layer].

    Raises UserError for keys that are no numbers.
    """
    n_layer, n_main = file.model_number("block_count"), main_layers(file)
    if file.architecture in BY_INTERVAL:
        found = _by_interval(file, n_main)
    elif file.architecture in BY_HEADS:
        found = [not heads for heads in _of_layers(file, "attention.head_count_kv", n_main)]
    elif file.architecture in OR_FFN:
        kv, ffn = (
            _of_layers(file, name, n_main)
            for name in ("attention.head_count_kv", "feed_forward_length")
        )
        found = [not heads and not size for heads, size in zip(kv, ffn, strict=True)]
    else:
        found = [file.architecture in BOTH] * n_main
    return (*found, *[False] * (n_layer - n_main))


def attention_layers(file: GGUFFile) -> tuple[bool, ...]:
    """Whether each layer has K and V, [n_layer].

    Raises UserError for keys that are no numbers.
    """
    recurrent = recurrent_layers(file)
    if file.architecture in BOTH:
        return (True,) * len(recurrent)
    if file.architecture in OR_FFN:
        return tuple(
            not state and not ffn for state, ffn in zip(recurrent, ffn_layers(file), strict=True)
        )
    return tuple(not state for state in recurrent)


def ffn_layers(file: GGUFFile) -> tuple[bool, ...]:
    """Whether each layer has an FFN, [n_layer].

    Raises UserError for keys that are no numbers.
    """
    n_layer = file.model_number("block_count")
    if file.architecture not in OR_FFN:
        return (True,) * n_layer
    return tuple(size > 0 for size in _of_layers(file, "feed_forward_length", n_layer))


def state_bytes(file: GGUFFile) -> int:
    """Bytes of the recurrent states of one sequence, which are f32; 0 without recurrent layers.

    As llama_hparams::n_embd_r and n_embd_s of llama.cpp say. A MoD model holds them twice, because
    a decode that fails must find the state before it. Raises UserError for keys that are no
    numbers.
    """
    n_recurrent = sum(recurrent_layers(file))
    if not n_recurrent:
        return 0
    conv = max(0, whole_number(file, "ssm.conv_kernel", 0) - 1)
    if file.architecture in CONVOLUTIONS:
        values = file.model_number("embedding_length") * (
            file.model_number("shortconv.l_cache") - 1
        )
    elif file.architecture in DELTA_ATTENTION:
        size, heads = file.model_number("kda.head_dim"), _of_layers(file, "attention.head_count", 1)
        values = heads[0] * size * (3 * (conv or 3) + size)
    elif file.architecture in LIGHTNING_ATTENTION:
        n_heads = file.model_number("attention.head_count")
        size = whole_number(file, "attention.key_length", 0)
        size = size or file.model_number("embedding_length") // n_heads
        values = n_heads * size * size
    else:
        inner, state = (whole_number(file, f"ssm.{name}_size", 0) for name in ("inner", "state"))
        groups = whole_number(file, "ssm.group_count", 0) if file.architecture != "jamba" else 0
        values = conv * (inner + 2 * groups * state) + state * inner
    return F32_BYTES * n_recurrent * values


def _by_interval(file: GGUFFile, n_main: int) -> list[bool]:
    listed = file.get(f"{file.architecture}.attention.recurrent_layers")
    if isinstance(listed, np.ndarray):
        return [bool(value) for value in listed[:n_main]] + [False] * (n_main - len(listed))
    interval = whole_number(file, "full_attention_interval", BY_INTERVAL[file.architecture])
    return [not interval or (layer + 1) % interval != 0 for layer in range(n_main)]


def _of_layers(file: GGUFFile, name: str, n: int) -> list[int]:
    """A key that holds one whole number for all layers, or one for each layer."""
    value = file.get(f"{file.architecture}.{name}", 0)
    if isinstance(value, np.ndarray):
        return [int(number) for number in value[:n]] + [0] * (n - len(value))
    return [whole_number(file, name, 0)] * n
