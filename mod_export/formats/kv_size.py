"""How much memory K and V take: bytes per token, and cells that a MoD model is expected to fill.

    bytes_per_token(GGUFFile.open("mod.gguf"), layer=5)     # K and V of one token, f16
    expected_cells(config, layer=5, n=4000)                 # cells in use after 4000 tokens

A cell holds K and V of one token in one layer.
"""

from __future__ import annotations

import numpy as np

from mod_export.config import MoDConfig
from mod_export.errors import UserError
from mod_export.formats.gguf import GET_AGAIN, GGUFFile
from mod_export.units import ATTN, BLOCK, KV

# the runtime's default kv_rollback: positions whose K and V stay a little longer than the window
ROLLBACK_TOKENS = 64
F16_BYTES = 2  # per value; f16 is the runtime's default type of K and V
FORMULA = (
    "cells(n) of a layer = a_c * (min(n, w) + a_kv * max(0, n - w)); "
    "a_c: activation of block or attn, "
    f"a_kv: of kv (1 where not routed), w = kv_window + {ROLLBACK_TOKENS} (rollback margin)"
)


def bytes_per_token(
    file: GGUFFile, layer: int, k_bytes: float = F16_BYTES, v_bytes: float = F16_BYTES
) -> float:
    """Bytes of K and V of one token in one layer; k_bytes, v_bytes: bytes of one value."""
    heads = _number_of_layer(file, "attention.head_count", layer)
    heads_kv = _number_of_layer(file, "attention.head_count_kv", layer, default=heads)
    head_size = file.model_number("embedding_length") // max(1, heads)
    k_length = _number_of_layer(file, "attention.key_length", layer, default=head_size)
    v_length = _number_of_layer(file, "attention.value_length", layer, default=head_size)
    return heads_kv * (k_length * k_bytes + v_length * v_bytes)


def expected_cells(config: MoDConfig, layer: int, n: int, margin: float = 0.0) -> float:
    """Cells in use of a layer after n tokens, as FORMULA says.

    margin: activation above the calibrated one, as a share of the calibrated one.
    """

    def activation(kind: str) -> float:
        if not config.threshold(layer, kind):
            return 1.0
        return min(1.0, config.units[kind].activation[layer] * (1 + margin))

    window = min(n, config.kv_window + ROLLBACK_TOKENS)
    return activation(BLOCK) * activation(ATTN) * (window + activation(KV) * (n - window))


def mean_activation(config: MoDConfig) -> dict[str, float]:
    """Kind -> mean activation of its units on calibration text; `all`: the mean of all units."""
    values: dict[str, list[float]] = {}
    for layer, kind in config.routed():
        values.setdefault(kind, []).append(config.units[kind].activation[layer])
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
