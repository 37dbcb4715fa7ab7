"""Shapes of the llama family, dense or with experts, and the tensors that a model of one has.

This module knows nothing of files and routers.

    shape = replace(preset_named("1b"), layers=8).checked()
    for weight in weights(shape, type_named("q4_0")): ...

The weights are random, of a size that keeps the residual stream near an RMS of 1 at every depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import GGMLQuantizationType as Type

from mod_export.errors import UserError
from mod_export.formats.ggml_types import block_size, row_bytes

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
MAX_SIZE = 1 << 24
MIN_RESERVED_VALUES = 64
# The variance that all layers together add to a residual stream of variance 1.
ADDED_VARIANCE = 0.4


@dataclass(frozen=True)
class Shape:
    """Dimensions of a llama model.

    ff: of the FFN, or of each expert. ctx: trained context in tokens. tied: whether the embedding
    is the output matrix too. head_size: 0 for embd / heads. experts: 0 for an FFN without. used:
    experts that each token goes through.
    """

    layers: int
    embd: int
    heads: int
    heads_kv: int
    ff: int
    vocab: int
    ctx: int
    tied: bool
    rope_base: float = 500000.0
    head_size: int = 0
    experts: int = 0
    used: int = 0

    def checked(self) -> Shape:
        """Return self, or raise UserError naming what is impossible about it."""
        for name in ("layers", "embd", "heads", "heads_kv", "ff", "vocab", "ctx"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise UserError(
                    f"{name} is {getattr(self, name)}", f"use a whole number from 1 to {MAX_SIZE}"
                )
        if self.layers > MAX_LAYERS:
            raise UserError(
                f"{self.layers} layers are more than llama.cpp's {MAX_LAYERS}", "use fewer layers"
            )
        if not self.head_size and self.embd % self.heads:
            cure = "choose heads so that embd / heads is whole and even, or give --head-size"
            raise UserError(f"{self.heads} heads do not divide an embedding of {self.embd}", cure)
        if self.head % 2:
            cure = "choose an even size, because RoPE turns pairs"
            raise UserError(f"heads have {self.head} values", cure)
        if self.heads % self.heads_kv:
            raise UserError(
                f"{self.heads_kv} K/V heads do not divide {self.heads} heads",
                "use a divisor of heads",
            )
        if not 0 <= self.used <= self.experts <= MAX_EXPERTS or (self.experts > 0) > self.used:
            raise UserError(
                f"{self.used} of {self.experts} experts are used",
                f"use 1 or more of at most {MAX_EXPERTS}, or none of 0",
            )
        return self

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.head_size or self.embd // self.heads

    @property
    def embd_q(self) -> int:
        """Numbers in Q of one token in one layer."""
        return self.head * self.heads

    @property
    def embd_kv(self) -> int:
        """Numbers in K of one token in one layer; V has as many."""
        return self.head * self.heads_kv


PRESETS = {
    "135m": Shape(30, 576, 9, 3, 1536, 49152, 8192, tied=True, rope_base=100000.0),  # SmolLM2-135M
    "1b": Shape(16, 2048, 32, 8, 8192, 128256, 131072, tied=True),  # Llama-3.2-1B
    "3b": Shape(28, 3072, 24, 8, 8192, 128256, 131072, tied=True),  # Llama-3.2-3B
    "8b": Shape(32, 4096, 32, 8, 14336, 128256, 131072, tied=False),  # Llama-3.1-8B
    "30b-a3b": Shape(  # Qwen3-30B-A3B
        *(48, 2048, 32, 4, 768, 151936, 40960),
        tied=False,
        rope_base=1000000.0,
        head_size=128,
        experts=128,
        used=8,
    ),
}


def preset_named(name: str) -> Shape:
    """A shape of PRESETS. Raises UserError for another name."""
    if name not in PRESETS:
        raise UserError(
            f"unknown shape {name!r}",
            f"use {', '.join(PRESETS)}, changed by options such as --layers",
        )
    return PRESETS[name]


@dataclass(frozen=True)
class Weight:
    """A tensor of `rows` rows of `cols` values with standard deviation `std`.

    experts: so many matrices of `rows` rows together; 0: a plain one. writes: its product is added
    to the residual stream, so the rows of the reserved values are zero. norm: the weights of a
    norm, which are all `std`; with `signs` their signs are random.
    """

    name: str
    rows: int
    cols: int
    type: Type
    std: float
    writes: bool = False
    norm: bool = False
    signs: bool = False
    experts: int = 0

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions, as numpy orders them."""
        if self.norm:
            return (self.cols,)
        return (*([self.experts] if self.experts else []), self.rows, self.cols)

    @property
    def all_rows(self) -> int:
        """Rows of all experts."""
        return self.rows * max(1, self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.all_rows * row_bytes(self.cols, self.type)


def embedding_types(shape: Shape, type: Type) -> tuple[Type, Type]:
    """Types of token_embd and output, as llama.cpp's own quantiser chooses them.

    They are the same where the two are tied. The output matrix is q6_K, or q8_0 where its rows are
    no multiple of 256. In a model of q8_0 or floats it has the type of the model.
    """
    output = type
    if type not in (Type.F32, Type.F16, Type.BF16, Type.Q8_0):
        output = Type.Q8_0 if shape.embd % block_size(Type.Q6_K) else Type.Q6_K
    return output if shape.tied else type, output


def reserved(embedding_type: Type) -> int:
    """How many leading values of the residual stream only the token embedding writes.

    They are whole blocks of the embedding.
    """
    return max(MIN_RESERVED_VALUES, block_size(embedding_type))


def check_type(shape: Shape, type: Type) -> None:
    """Raise UserError for a shape that the type does not fit.

    Rows of the shape's matrices have to be whole blocks, and leave room for the reserved values.
    """
    for name in ("embd", "ff"):
        if getattr(shape, name) % block_size(type):
            raise UserError(
                f"{name} {getattr(shape, name)} is no multiple of {block_size(type)}, the block "
                f"of {type.name}",
                "choose another size, or a quantisation with smaller blocks such as q8_0 or q4_0",
            )
    taken = reserved(embedding_types(shape, type)[0])
    if shape.embd < 2 * taken:
        raise UserError(
            f"embd {shape.embd} is too small, because the routers of a {type.name} model reserve "
            f"{taken} of it",
            f"use {2 * taken} or more",
        )


def weights(shape: Shape, type: Type) -> Iterator[Weight]:
    """All tensors of the dense model in the order of the file, token_embd first."""
    embd, ff = shape.embd, shape.ff
    embd_type, output_type = embedding_types(shape, type)
    into, out = 1 / math.sqrt(embd), math.sqrt(ADDED_VARIANCE / (2 * shape.layers))
    yield Weight("token_embd.weight", shape.vocab, embd, embd_type, 1.0)
    # Rows of a tied output have the length sqrt(embd). The signs keep the model from predicting the
    # token that it reads.
    yield Weight(
        "output_norm.weight", 1, embd, Type.F32, into if shape.tied else 1.0, norm=True, signs=True
    )
    if not shape.tied:
        yield Weight("output.weight", shape.vocab, embd, output_type, into)
    for layer in range(shape.layers):
        b = f"blk.{layer}."
        yield Weight(b + "attn_norm.weight", 1, embd, Type.F32, 1.0, norm=True)
        yield Weight(b + "attn_q.weight", shape.embd_q, embd, type, into)
        yield Weight(b + "attn_k.weight", shape.embd_kv, embd, type, into)
        yield Weight(b + "attn_v.weight", shape.embd_kv, embd, type, into)
        std = out / math.sqrt(shape.embd_q)
        yield Weight(b + "attn_output.weight", embd, shape.embd_q, type, std, writes=True)
        yield Weight(b + "ffn_norm.weight", 1, embd, Type.F32, 1.0, norm=True)
        yield from _ffn(shape, type, b, into, out / math.sqrt(ff))


def _ffn(shape: Shape, type: Type, prefix: str, into: float, out: float) -> Iterator[Weight]:
    """The matrices of a layer's FFN, or the router and the matrices of its experts."""
    embd, ff, n = shape.embd, shape.ff, shape.experts
    name = "_exps.weight" if n else ".weight"
    if n:
        yield Weight(f"{prefix}ffn_gate_inp.weight", n, embd, Type.F32, into)
        out *= math.sqrt(shape.used)  # their outputs are averaged
    yield Weight(f"{prefix}ffn_gate{name}", ff, embd, type, into, experts=n)
    yield Weight(f"{prefix}ffn_up{name}", ff, embd, type, into, experts=n)
    yield Weight(f"{prefix}ffn_down{name}", embd, ff, type, out, writes=True, experts=n)
