"""How much memory K and V take: bytes per token, and cells that a MoD model is expected to fill.

    layers = kv_layers(GGUFFile.open("mod.gguf"))      # of each layer: bytes of a token, window
    layers[5].bytes_per_token, layers[5].dense_cells(4000)
    expected_cells(config, layer=5, n=4000)            # cells in use after 4000 tokens

A cell holds K and V of one token in one layer. Where the K/V heads of a layer decide apart, each
has cells of its own, and the cells of the layer are the mean over its heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats.gguf import GET_AGAIN, GGUFFile
from mod_export.formats.recurrent_layers import attention_layers
from mod_export.formats.sliding_windows import layer_windows, main_layers
from mod_export.units import ATTN, BLOCK, KV, Unit

# the runtime's default kv_rollback: positions whose K and V stay a little longer than the window
ROLLBACK_TOKENS = 64
# What checkpoints may take (runtime/checkpoints.py): this share of the dense K/V of a context and
# so many times the recurrent states of a sequence, and not more than so many bytes.
CHECKPOINT_SHARE, CHECKPOINT_STATES, CHECKPOINT_BYTES = 1 / 8, 4, 256 << 20
F16_BYTES = 2  # per value; f16 is the runtime's default type of K and V
UBATCH_TOKENS = 512  # llama.cpp's default
# llama.cpp pads the cache of sliding layers to a multiple of it (llama-kv-cache-iswa.cpp).
SLIDING_PAD_TOKENS = 256
FORMULA = (
    "cells(n) of a layer = a_c * (min(n, w) + a_kv * max(0, n - w)); "
    "a_c: activation of block or attn, "
    f"a_kv: of kv (1 where not routed), w = kv_window + {ROLLBACK_TOKENS} (rollback margin)"
)
HEADS_FORMULA = (
    "a layer whose K/V heads decide apart has the mean over them, each with its a_kv and w"
)
SLIDING_FORMULA = (
    f"cells(n) of a sliding layer = a_c * min(n, s + {ROLLBACK_TOKENS}); s: its window. dense is "
    f"what llama.cpp keeps of it, min(n, s + {UBATCH_TOKENS} rounded up to a multiple of "
    f"{SLIDING_PAD_TOKENS}): a ubatch has room beside the window"
)
# layers from which on K and V are those of earlier layers, where no key says it (gemma3n.cpp)
OWN_KV_LAYERS = {"gemma3n": 20}


@dataclass(frozen=True)
class LayerKV:
    """K and V of one layer: bytes of one token, and the tokens of its window, 0 for full attention.

    A layer that takes K and V of another layer has 0 bytes.
    """

    bytes_per_token: float
    window: int = 0

    def dense_cells(self, n: int, ubatch: int = UBATCH_TOKENS, sequences: int = 1) -> int:
        """Cells that llama.cpp has in use after n tokens, those of all sequences together.

        A sliding layer keeps the windows and a ubatch, rounded up (llama-kv-cache-iswa.cpp, without
        swa_full). The sequences share one cache.
        """
        if not self.window:
            return n
        size = self.window * sequences + ubatch
        return min(n, -(-size // SLIDING_PAD_TOKENS) * SLIDING_PAD_TOKENS)

    def dense_bytes(self, n: int, ubatch: int = UBATCH_TOKENS, sequences: int = 1) -> float:
        """Bytes of `dense_cells`."""
        return self.bytes_per_token * self.dense_cells(n, ubatch, sequences)


def kv_layers(
    file: GGUFFile, k_bytes: float = F16_BYTES, v_bytes: float = F16_BYTES
) -> list[LayerKV]:
    """K and V of each layer but those for drafts; k_bytes, v_bytes: bytes of one value.

    Raises UserError where a key is missing or no number.
    """
    windows = layer_windows(file)[: main_layers(file)]
    own = own_kv_layers(file)
    return [
        LayerKV(
            _bytes_per_token(file, layer, bool(window), k_bytes, v_bytes) if layer < own else 0,
            window,
        )
        for layer, window in enumerate(windows)
    ]


def own_kv_layers(file: GGUFFile) -> int:
    """The number of first layers that have K and V of their own."""
    n_layer = file.model_number("block_count")
    shared = _number_of_layer(file, "attention.shared_kv_layers", 0, default=0)
    known = OWN_KV_LAYERS.get(file.architecture, n_layer)
    return min(main_layers(file), n_layer - shared, known)


def _bytes_per_token(
    file: GGUFFile, layer: int, slides: bool, k_bytes: float, v_bytes: float
) -> float:
    k_length, v_length = _head_lengths(file, layer, slides)
    return _kv_heads_of_layer(file, layer) * (k_length * k_bytes + v_length * v_bytes)


def _head_lengths(file: GGUFFile, layer: int, slides: bool) -> tuple[int, int]:
    heads = _number_of_layer(file, "attention.head_count", layer)
    head_size = file.model_number("embedding_length") // max(1, heads)
    k_length = _number_of_layer(file, "attention.key_length", layer, default=head_size)
    v_length = _number_of_layer(file, "attention.value_length", layer, default=head_size)
    if slides:
        k_length = _number_of_layer(file, "attention.key_length_swa", layer, default=k_length)
        v_length = _number_of_layer(file, "attention.value_length_swa", layer, default=v_length)
    if is_mla(file):
        v_length = 0  # V is computed from what K stores
    return k_length, v_length


def head_lengths(file: GGUFFile) -> dict[int, tuple[int, int]]:
    """Numbers that a head stores of K and of V, of each layer that stores any."""
    windows = layer_windows(file)
    return {
        layer: _head_lengths(file, layer, bool(windows[layer]))
        for layer in range(own_kv_layers(file))
        if _kv_heads_of_layer(file, layer)
    }


def is_mla(file: GGUFFile) -> bool:
    """Whether K and V of all heads are computed from one vector, which is what is stored (MLA)."""
    return f"{file.architecture}.attention.key_length_mla" in file.keys


def kv_heads(file: GGUFFile) -> int:
    """The K/V heads of each layer that can decide apart.

    It is 1 where the layers that have any have different numbers of them, and where the heads share
    what is stored (MLA).
    """
    if is_mla(file):
        return 1
    heads = {_kv_heads_of_layer(file, layer) for layer in range(main_layers(file))} - {0}
    return heads.pop() if len(heads) == 1 else 1


def _kv_heads_of_layer(file: GGUFFile, layer: int) -> int:
    if not attention_layers(file)[layer]:
        return 0
    name = "attention.head_count_kv"
    if f"{file.architecture}.{name}" not in file.keys:
        name = "attention.head_count"
    return _number_of_layer(file, name, layer)


def expected_cells(
    config: MoDConfig, layer: int, n: int, margin: float = 0.0, window: int = 0
) -> float:
    """Cells in use of a layer after n tokens, as FORMULA, HEADS_FORMULA and SLIDING_FORMULA say.

    margin: activation above the calibrated one, as a share of the calibrated one. window: of a
    sliding layer, else 0.
    """

    def activation(unit: Unit) -> float:
        if not config.threshold(unit):
            return 1.0
        return min(1.0, config.activation(unit) * (1 + margin))

    def remembered(unit: Unit) -> float:
        kept = min(n, config.window(unit) + ROLLBACK_TOKENS)
        return kept + activation(unit) * (n - kept)

    if window:
        n = min(n, window + ROLLBACK_TOKENS)
    stored = activation(Unit(layer, BLOCK)) * activation(Unit(layer, ATTN))
    if KV not in config.units:
        return stored * n
    units = config.units[KV].units(layer, KV)
    return stored * sum(map(remembered, units)) / len(units)


def lists_of_cells(config: MoDConfig, layer: int) -> int:
    """The K/V heads of a layer that store cells apart; 1 where they all store the same tokens."""
    by_head = any(unit.layer == layer and unit.head is not None for unit in config.routed())
    return config.heads(KV) if by_head else 1


def window_note(file: GGUFFile, config: MoDConfig) -> str | None:
    """Return a line about a window that leaves kv units nothing to free within the model's context.

    None where they free something, and where the file tells no context.
    """
    context = file.get(f"{file.architecture}.context_length", 0)
    window = min((config.window(unit) for unit in config.by_kind().get(KV, [])), default=0)
    kept = config.sink_tokens + window + ROLLBACK_TOKENS
    if KV not in config.units or not context or kept < context:
        return None
    return (
        f"note: the kv units free nothing within the model's context of {context} tokens, because "
        f"they keep {kept}: the first {config.sink_tokens}, a window of {window} and "
        f"{ROLLBACK_TOKENS} more; convert with a smaller --kv-window"
    )


def mean_activation(config: MoDConfig) -> dict[str, float]:
    """Kind -> mean activation of its units on calibration text; `all`: the mean of all units."""
    values: dict[str, list[float]] = {}
    for unit in config.routed():
        values.setdefault(unit.kind, []).append(config.activation(unit))
    every = [value for of_kind in values.values() for value in of_kind]
    means = {kind: float(np.mean(of_kind)) for kind, of_kind in values.items()}
    return {**means, "all": float(np.mean(every))}


def _number_of_layer(file: GGUFFile, name: str, layer: int, default: int | None = None) -> int:
    """A key that holds one whole number for all layers, or one for each layer."""
    value = file.get(f"{file.architecture}.{name}", default)
    if isinstance(value, np.ndarray) and layer < len(value):
        value = value[layer].item()
    if not isinstance(value, int) or value < 0:
        raise UserError(
            f"{file.path}: key {file.architecture}.{name} is missing or no whole number",
            GET_AGAIN,
        )
    return value


def checkpoint_room(dense_bytes: float, state_bytes: int = 0) -> int:
    """Bytes that the checkpoints of a context may take, by default.

    dense_bytes: its dense K/V; state_bytes: its recurrent states, which each checkpoint holds. The
    newest one is kept in any case.
    """
    room = int(dense_bytes * CHECKPOINT_SHARE) + CHECKPOINT_STATES * state_bytes
    return min(CHECKPOINT_BYTES, room)


def checkpoint_cells(config: MoDConfig, layer: int, n: int, window: int = 0) -> float:
    """Cells of a layer that a checkpoint after n tokens holds: those that will be given back.

    They are what a sliding layer has, whose window is `window` (else 0), and of `kv` units the
    tokens within window and rollback that are to be forgotten.
    """
    if window:
        return expected_cells(config, layer, n, window=window)
    if KV not in config.units:
        return 0.0
    units = config.units[KV].units(layer, KV)
    forgotten = sum(
        (1 - config.activation(unit)) * min(n, config.window(unit) + ROLLBACK_TOKENS)
        for unit in units
        if config.threshold(unit)
    )
    return forgotten / len(units)
