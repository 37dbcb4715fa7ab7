"""Shapes of models: their numbers, by the name of a model that has them.

    shape = replace(preset_named("1b"), layers=8).checked()

What an architecture has beside those of the llama family is one row of ARCHITECTURES. tensors.py
makes the tensors of a shape, and keys.py the keys of its file.
"""

from __future__ import annotations

from dataclasses import dataclass

from mod_export.errors import UserError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
MAX_SIZE = 1 << 24
ATTENTION_INTERVAL = 4  # one layer of so many attends, where the others are gated delta nets


@dataclass(frozen=True)
class Architecture:
    """How the layers of an architecture differ from those of llama.

    ffn_norm: the norm before the FFN. experts: whether its models have them, None for either.
    untied: whether its models need an output matrix. gated: attention has norms of Q and K, and a
    gate for each of its outputs, and RoPE turns a quarter of a head. biased: attention and experts
    have biases, and attention has a sink for each head.
    """

    ffn_norm: str = "ffn_norm"
    experts: bool | None = None
    untied: bool = False
    gated: bool = False
    biased: bool = False


ARCHITECTURES = {
    "llama": Architecture(),
    "qwen35": Architecture("post_attention_norm", experts=False, gated=True),
    "qwen35moe": Architecture("post_attention_norm", experts=True, gated=True),
    "gpt-oss": Architecture("post_attention_norm", experts=True, untied=True, biased=True),
}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model.

    ff: of the FFN, or of each expert. ctx: trained context in tokens. tied: whether the embedding
    is the output matrix too. head_size: 0 for embd / heads. experts: 0 for an FFN without. used:
    experts that each token goes through. shared_ff: of the expert that each token goes through
    beside them, 0 for none. window: tokens that every second layer attends to, 0 for all. net_*: of
    gated delta nets, whose layers take turns with those that attend: heads of keys, of values, and
    the size of each. quant: the type that such models come in.
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
    arch: str = "llama"
    shared_ff: int = 0
    window: int = 0
    net_keys: int = 0
    net_values: int = 0
    net_head: int = 0
    quant: str = "q4_0"

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
        if self.rotated % 2 or not self.rotated:
            cure = "choose an even size, because RoPE turns pairs"
            if self.style.gated:
                cure = "choose a multiple of 8, because RoPE turns pairs in a quarter of them"
            raise UserError(f"heads have {self.head} values", cure)
        if self.heads % self.heads_kv:
            raise UserError(
                f"{self.heads_kv} K/V heads do not divide {self.heads} heads",
                "use a divisor of heads",
            )
        if self.style.experts not in (None, self.experts > 0):
            having = "have" if self.style.experts else "do not have"
            raise UserError(f"{self.arch} models {having} experts", "leave --experts out")
        if not 0 <= self.used <= self.experts <= MAX_EXPERTS or (self.experts > 0) > self.used:
            raise UserError(
                f"{self.used} of {self.experts} experts are used",
                f"give --experts-used, from 1 to the number of --experts (at most {MAX_EXPERTS})",
            )
        if self.style.untied and self.tied:
            raise UserError(f"{self.arch} models need an output matrix", "leave --tied out")
        return self

    @property
    def style(self) -> Architecture:
        """What its architecture is like."""
        return ARCHITECTURES[self.arch]

    def attends(self, layer: int) -> bool:
        """Whether the layer attends; the others are gated delta nets."""
        return not self.net_values or (layer + 1) % ATTENTION_INTERVAL == 0

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.head_size or self.embd // self.heads

    @property
    def rotated(self) -> int:
        """Numbers of a head that RoPE turns."""
        return self.head // 4 if self.style.gated else self.head

    @property
    def embd_q(self) -> int:
        """Numbers in Q of one token in one layer."""
        return self.head * self.heads

    @property
    def embd_kv(self) -> int:
        """Numbers in K of one token in one layer; V has as many."""
        return self.head * self.heads_kv

    @property
    def net_inner(self) -> int:
        """Numbers in the values of one token in one gated delta net."""
        return self.net_values * self.net_head

    @property
    def net_channels(self) -> int:
        """Numbers in the queries, keys and values of one token in one gated delta net."""
        return 2 * self.net_keys * self.net_head + self.net_inner


_DELTA_NET = {"head_size": 256, "net_keys": 16, "net_values": 32, "net_head": 128}
_QWEN35 = {"vocab": 248320, "ctx": 262144, "rope_base": 1e7} | _DELTA_NET
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
    "qwen3.5-4b": Shape(32, 2560, 16, 4, 9216, tied=True, arch="qwen35", **_QWEN35),
    "qwen3.5-9b": Shape(32, 4096, 16, 4, 12288, tied=False, arch="qwen35", **_QWEN35),
    "qwen3.5-35b-a3b": Shape(
        *(40, 2048, 16, 2, 512),
        tied=False,
        arch="qwen35moe",
        experts=256,
        used=8,
        shared_ff=512,
        **_QWEN35,
    ),
    "gpt-oss-20b": Shape(
        *(24, 2880, 64, 8, 2880, 201088, 131072),
        tied=False,
        rope_base=150000.0,
        head_size=64,
        experts=32,
        used=4,
        arch="gpt-oss",
        window=128,
        quant="mxfp4",
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
