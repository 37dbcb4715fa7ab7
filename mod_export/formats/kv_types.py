"""Types of K and V in the cache: their names, sizes, and which of them a model can have.

types = KVTypes.parse("q8_0/q4_0")         # K in q8_0, V in q4_0
types.numbers                              # (8, 2), of enum ggml_type
types.check(GGUFFile.open("mod.gguf"))     # raises UserError where a head has no whole blocks
"""

from __future__ import annotations

from dataclasses import dataclass

from mod_export.errors import UserError
from mod_export.formats.ggml_types import FILE_FORMATS, KV_TYPES, block_layout, bytes_per_value
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import head_lengths, is_mla

NUMBERS = {format.name: format.type for format in FILE_FORMATS if format.kv_cache}
NAMES = {number: name for name, number in NUMBERS.items()}
DEFAULT_TYPE = "f16"  # of llama.cpp
USE_ONE = f"use one of {', '.join(KV_TYPES)}"


@dataclass(frozen=True)
class KVTypes:
    """The type of K and the type of V, by their names."""

    k: str = DEFAULT_TYPE
    v: str = DEFAULT_TYPE

    def __post_init__(self):
        type_number(self.k, "K")
        type_number(self.v, "V")

    @classmethod
    def parse(cls, text: str) -> KVTypes:
        """Read `q8_0`, which is the type of both, or `q8_0/q4_0`. Raises UserError."""
        names = text.split("/")
        if len(names) > 2:
            raise UserError(f"K/V type {text!r} is unknown", "give one, or two such as q8_0/f16")
        return cls(names[0], names[-1])

    @classmethod
    def given(cls, k: str | None, v: str | None) -> KVTypes | None:
        """The types of two options of which one or both may be missing; None for both."""
        return None if k is v is None else cls(k or DEFAULT_TYPE, v or DEFAULT_TYPE)

    def __str__(self) -> str:
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def numbers(self) -> tuple[int, int]:
        """Numbers of the types in enum ggml_type."""
        return type_number(self.k), type_number(self.v)

    @property
    def sizes(self) -> tuple[float, float]:
        """Bytes of one value of K and of V."""
        k, v = map(bytes_per_value, self.numbers)
        return k, v

    def options(self) -> dict[str, int]:
        """The arguments of MoDLlama."""
        return dict(zip(("type_k", "type_v"), self.numbers, strict=True))

    def check(self, file: GGUFFile, flash_attn: bool = True) -> None:
        """See `check_types`."""
        check_types(file, *self.numbers, flash_attn)


def type_number(value: str | int, side: str = "K and V") -> int:
    """The number in enum ggml_type of a type's name or number.

    side: K or V, for the error. Raises UserError for a type that the cache cannot have.
    """
    if isinstance(value, str) and value.lower() in NUMBERS:
        return NUMBERS[value.lower()]
    if isinstance(value, int) and value in NAMES:
        return int(value)
    raise UserError(f"the cache cannot hold {side} in {value!r}", USE_ONE)


def is_quantised(number: int) -> bool:
    """Whether a type, by its number in enum ggml_type, has blocks of values."""
    return block_layout(number)[0] > 1


def check_types(file: GGUFFile, k: int, v: int, flash_attn: bool = True) -> None:
    """Raise UserError where K and V of a file's model cannot be cached in these types.

    k, v: numbers in enum ggml_type.
    """
    if is_quantised(v) and not flash_attn:
        raise UserError(
            f"V in {NAMES[v]} needs flash attention", "switch flash attention on, or use f16 for V"
        )
    if k != v and is_mla(file):
        raise UserError(
            f"{file.path}: K in {NAMES[k]} and V in {NAMES[v]}, but the model computes V from K",
            "use one type for both",
        )
    if not is_quantised(k) and not is_quantised(v):
        return
    for layer, (k_length, v_length) in head_lengths(file).items():
        for side, kind, length in (("K", k, k_length), ("V", v, v_length)):
            block = block_layout(kind)[0]
            if length % block:
                raise UserError(
                    f"{file.path}: {side} in {NAMES[kind]} has blocks of {block} values, but a "
                    f"head of layer {layer} has {length}",
                    f"use f16 for {side}",
                )
