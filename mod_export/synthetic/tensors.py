"""The tensors that a model of a shape has, as descriptions; this module knows nothing of files.

    for weight in weights(shape, type_named("q4_0")): ...

The weights are random, of a size that keeps the residual stream near an RMS of 1 at every depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as Type

from mod_export.errors import UserError
from mod_export.formats.ggml_types import block_size, row_bytes
from mod_export.synthetic.shape import Shape

MIN_RESERVED_VALUES = 64
# The variance that all layers together add to a residual stream of variance 1.
ADDED_VARIANCE = 0.4
FLOATS = (Type.F32, Type.F16, Type.BF16)
CONVOLVED_TOKENS = 4  # that the convolution of a gated delta net sees
# A gated delta net forgets exp(DECAY * softplus(x + DECAY_BIAS)) at each token: 5 % where x is 0.
DECAY, DECAY_BIAS = -1.0, -3.0


@dataclass(frozen=True)
class Weight:
    """A tensor of `rows` rows of `cols` values with standard deviation `std`.

    experts: so many matrices of `rows` rows together; 0: a plain one. writes: its product is added
    to the residual stream, so the rows of the reserved values are zero. constant: the values are
    all `std`, as in a norm; with `signs` their signs are random.
    """

    name: str
    rows: int
    cols: int
    type: Type
    std: float
    writes: bool = False
    constant: bool = False
    signs: bool = False
    experts: int = 0

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions, as numpy orders them."""
        rows = [] if self.constant else [self.rows]
        return (*([self.experts] if self.experts else []), *rows, self.cols)

    @property
    def all_rows(self) -> int:
        """Rows of all experts."""
        return self.rows * max(1, self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.all_rows * row_bytes(self.cols, self.type)


@dataclass(frozen=True)
class Types:
    """The types of a model's matrices, as llama.cpp's own quantiser chooses them."""

    matrices: Type
    experts: Type
    embedding: Type
    output: Type

    @classmethod
    def of(cls, shape: Shape, type: Type) -> Types:
        """The types where `type` is asked for.

        The embedding and the output are the same where the two are tied. The output matrix is
        q6_K, or q8_0 where its rows are no multiple of 256. In a model of q8_0 or floats it has the
        type of the model. mxfp4 is a type of experts, and all else is q8_0 there.
        """
        matrices = Type.Q8_0 if type == Type.MXFP4 else type
        output = matrices
        if output not in (*FLOATS, Type.Q8_0):
            output = Type.Q8_0 if shape.embd % block_size(Type.Q6_K) else Type.Q6_K
        return cls(matrices, type, output if shape.tied else matrices, output)


def reserved(embedding_type: Type) -> int:
    """How many leading values of the residual stream only the token embedding writes.

    They are whole blocks of the embedding.
    """
    return max(MIN_RESERVED_VALUES, block_size(embedding_type))


def check_type(shape: Shape, type: Type) -> None:
    """Raise UserError for a shape that the type does not fit.

    Rows of the shape's matrices have to be whole blocks, and leave room for the reserved values.
    """
    if type == Type.MXFP4 and not shape.experts:
        raise UserError("MXFP4 is a type of experts, and the shape has none", "use q4_0")
    sizes = {"embd": shape.embd, "heads x head size": shape.embd_q, "ff": shape.ff}
    sizes |= {"shared ff": shape.shared_ff, "values of a delta net": shape.net_inner}
    for name, size in sizes.items():
        if size % block_size(type):
            raise UserError(
                f"{name} {size} is no multiple of {block_size(type)}, the block of {type.name}",
                "choose another size, or a quantisation with smaller blocks such as q8_0 or q4_0",
            )
    taken = reserved(Types.of(shape, type).embedding)
    if shape.embd < 2 * taken:
        raise UserError(
            f"embd {shape.embd} is too small, because the routers of a {type.name} model reserve "
            f"{taken} of it",
            f"use {2 * taken} or more",
        )


def weights(shape: Shape, type: Type) -> Iterator[Weight]:
    """All tensors of the dense model in the order of the file, token_embd first."""
    embd, types = shape.embd, Types.of(shape, type)
    into = 1 / math.sqrt(embd)
    yield Weight("token_embd.weight", shape.vocab, embd, types.embedding, 1.0)
    # Rows of a tied output have the length sqrt(embd). The signs keep the model from predicting the
    # token that it reads.
    norm = into if shape.tied else 1.0
    yield Weight("output_norm.weight", 1, embd, Type.F32, norm, constant=True, signs=True)
    if not shape.tied:
        yield Weight("output.weight", shape.vocab, embd, types.output, into)
    for number in range(shape.layers):
        layer = _Layer(shape, types, f"blk.{number}.")
        yield layer.constant("attn_norm.weight", embd)
        yield from layer.attention() if shape.attends(number) else layer.delta_net()
        yield layer.constant(f"{shape.style.ffn_norm}.weight", embd)
        yield from layer.ffn()


@dataclass(frozen=True)
class _Layer:
    """Describes the tensors of one layer; prefix: of their names."""

    shape: Shape
    types: Types
    prefix: str

    def constant(self, name: str, cols: int, value: float = 1.0, experts: int = 0) -> Weight:
        """A vector of one number, such as a norm, or one for each expert."""
        name = self.prefix + name
        return Weight(name, 1, cols, Type.F32, value, constant=True, experts=experts)

    def reads(self, name: str, rows: int, experts: int = 0) -> Weight:
        """A matrix that reads the residual stream."""
        embd, type = self.shape.embd, self.types.experts if experts else self.types.matrices
        return Weight(self.prefix + name, rows, embd, type, 1 / math.sqrt(embd), experts=experts)

    def writes(self, name: str, cols: int, experts: int = 0, averaged: int = 1) -> Weight:
        """A matrix that adds to the residual stream; averaged: so many of them are."""
        type = self.types.experts if experts else self.types.matrices
        std = math.sqrt(ADDED_VARIANCE / (2 * self.shape.layers) * averaged / cols)
        name = self.prefix + name
        return Weight(name, self.shape.embd, cols, type, std, writes=True, experts=experts)

    def attention(self) -> Iterator[Weight]:
        """The matrices of attention; a gate stands behind each head of Q."""
        shape, style = self.shape, self.shape.style
        q = 2 * shape.embd_q if style.gated else shape.embd_q
        for name, rows in (("attn_q", q), ("attn_k", shape.embd_kv), ("attn_v", shape.embd_kv)):
            yield self.reads(f"{name}.weight", rows)
            if style.biased:
                yield self.constant(f"{name}.bias", rows, 0.0)
        yield self.writes("attn_output.weight", shape.embd_q)
        if style.gated:
            yield self.constant("attn_q_norm.weight", shape.head)
            yield self.constant("attn_k_norm.weight", shape.head)
        if style.biased:
            yield self.constant("attn_output.bias", shape.embd, 0.0)
            yield self.constant("attn_sinks.weight", shape.heads, 0.0)

    def delta_net(self) -> Iterator[Weight]:
        """A gated delta net (Qwen3.5): a state of a matrix for each head of values."""
        shape = self.shape
        channels, heads, inner = shape.net_channels, shape.net_values, shape.net_inner
        yield self.reads("attn_qkv.weight", channels)
        yield self.reads("attn_gate.weight", inner)
        name, std = f"{self.prefix}ssm_conv1d.weight", 1 / math.sqrt(CONVOLVED_TOKENS)
        yield Weight(name, channels, CONVOLVED_TOKENS, Type.F32, std)
        yield self.constant("ssm_dt.bias", heads, DECAY_BIAS)
        yield self.constant("ssm_a", heads, DECAY)
        yield self.reads("ssm_beta.weight", heads)
        yield self.reads("ssm_alpha.weight", heads)
        yield self.constant("ssm_norm.weight", shape.net_head)
        yield self.writes("ssm_out.weight", inner)

    def ffn(self) -> Iterator[Weight]:
        """The matrices of an FFN, or the router and the matrices of its experts."""
        shape, n, biased = self.shape, self.shape.experts, self.shape.style.biased
        end = "_exps" if n else ""
        if n:
            yield replace(self.reads("ffn_gate_inp.weight", n), type=Type.F32)
        yield self.reads(f"ffn_gate{end}.weight", shape.ff, n)
        yield self.reads(f"ffn_up{end}.weight", shape.ff, n)
        yield self.writes(f"ffn_down{end}.weight", shape.ff, n, averaged=shape.used or 1)
        if biased:
            yield self.constant("ffn_gate_inp.bias", n, 0.0)
            for name, cols in (("gate", shape.ff), ("up", shape.ff), ("down", shape.embd)):
                yield self.constant(f"ffn_{name}_exps.bias", cols, 0.0, n)
        if shape.shared_ff:
            yield self.constant("ffn_gate_inp_shexp.weight", shape.embd, 0.0)
            yield self.reads("ffn_gate_shexp.weight", shape.shared_ff)
            yield self.reads("ffn_up_shexp.weight", shape.shared_ff)
            yield self.writes("ffn_down_shexp.weight", shape.shared_ff)
