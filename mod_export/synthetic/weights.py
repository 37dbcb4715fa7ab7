"""Random weights, quantised, in pieces of a few MB: the content of a synthetic model's tensors.

A matrix is rows drawn at random from a pool of quantised random rows. So writing is as fast as the
disk, although every page of the file is memory of its own. All depends on shape, type and seed, and
not on the routers: a MoD file and its dense twin have the same weights.

    content = Weights(shape, type_named("q4_0"), seed=0)
    for weight in weights(shape, type):                     # tensors.weights
        for piece in content.content(weight):
            file.write(piece)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
from gguf import GGMLQuantizationType as Type

from mod_export.formats.ggml_types import dequantize, row_bytes
from mod_export.runtime.quantize import quantize
from mod_export.synthetic import tensors
from mod_export.synthetic.shape import Shape
from mod_export.synthetic.tensors import Types, Weight

POOL_VALUES = 1 << 21
PIECE_BYTES = 8 << 20
TABLE_ROWS = 4096  # This many rows of the token table are handled at once.
# Reserved values are uniform with variance 1. Only the first one is a constant that is larger than
# all others. So the largest value of its block stays positive and about the same for all tokens,
# whatever it is quantised to.
HALF_WIDTH = math.sqrt(3)
CONSTANT = 2.0


def rng_of(seed: int, name: str) -> np.random.Generator:
    """A generator of random numbers for one purpose, whose numbers depend on no other purpose."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def token_table(shape: Shape, type: Type, seed: int) -> np.ndarray:
    """The reserved part of every token's embedding, quantised: uint8 [vocab, bytes].

    type: that of the embedding.
    """
    rng = rng_of(seed, "token table")
    cols = tensors.reserved(type)
    table = np.empty((shape.vocab, row_bytes(cols, type)), np.uint8)
    for at in range(0, shape.vocab, TABLE_ROWS):
        part = table[at : at + TABLE_ROWS]
        values = rng.uniform(-HALF_WIDTH, HALF_WIDTH, (len(part), cols))
        values[:, 0] = CONSTANT
        part[:] = quantize(values, type)
    return table


def table_values(table: np.ndarray, type: Type) -> np.ndarray:
    """The table as the runtime sees it: float32 [vocab, reserved]."""
    return np.concatenate(
        [dequantize(table[at : at + TABLE_ROWS], type) for at in range(0, len(table), TABLE_ROWS)]
    )


class Weights:
    """The content of all tensors of one model."""

    def __init__(self, shape: Shape, type: Type, seed: int):
        self.shape, self.seed = shape, seed
        self.embedding_type = Types.of(shape, type).embedding
        self.reserved = tensors.reserved(self.embedding_type)
        self.table = token_table(shape, self.embedding_type, seed)
        self._pools: dict[tuple, np.ndarray] = {}

    def content(self, weight: Weight) -> Iterator[np.ndarray]:
        """A tensor's bytes, in order."""
        rng = rng_of(self.seed, weight.name)
        if weight.constant:
            size = weight.all_rows * weight.cols
            signs = rng.choice([-1.0, 1.0], size) if weight.signs else np.ones(size)
            yield (weight.std * signs).astype("<f4").view(np.uint8)
            return
        own = weight.name == "token_embd.weight"
        pool = self._pool(weight.cols - (self.reserved if own else 0), weight.type, weight.std)
        picks = rng.integers(len(pool) - 1, size=weight.all_rows)
        if weight.writes:
            picks.reshape(-1, weight.rows)[:, : self.reserved] = len(pool) - 1
        step = max(1, PIECE_BYTES // (weight.nbytes // weight.all_rows))
        for at in range(0, weight.all_rows, step):
            rows = pool[picks[at : at + step]]
            yield np.hstack([self.table[at : at + step], rows]) if own else rows

    def _pool(self, cols: int, type: Type, std: float) -> np.ndarray:
        """Quantised rows of normal random numbers, and a last row of zeros.

        uint8 [n + 1, bytes of a row].
        """
        key = cols, type, std
        if key not in self._pools:
            values = np.zeros((max(64, POOL_VALUES // cols) + 1, cols), np.float32)
            rng_of(self.seed, f"pool {cols} {type.name} {std}").standard_normal(
                out=values[:-1], dtype=np.float32
            )
            values *= std
            self._pools[key] = quantize(values, type)
        return self._pools[key]
