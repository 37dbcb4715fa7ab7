"""Mutations of a GGUF file: random damage, and right files with one wrong thing in them.

    for number in range(100):
        data = mutate(original, kind="token", seed=number)

`Parts` is a reader and a writer of its own, so that one value can be changed and the rest of the
file stays right.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = (U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64)
FORMATS = dict(zip(NUMBERS, "BbHhIif?Qqd", strict=True))
ALIGNMENT = 32
SIZES = (0, 1, 2, 3, 5, 7, 16, 31, 64, 100, 255, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31)
LENGTHS = (*SIZES, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
FLOATS = (0.0, -1.0, 1e-30, 1e30, 3.5, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    *(b"", b" ", b"a", b"\0", b"a\0b", b"\n", b"a b", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80"),
    *(b"<0x", b"<0xZZ>", b"<0x41>", b"</s>", b"<|im_end|>", b"[EMPTY_5]", "\u2581".encode()),
    *("\U0001f600".encode(), b"\xf7\xbf\xbf\xbf", b"x" * 300, b"%s%n", b"unused"),
)
WORDS = (
    *(b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"no_vocab", b"none", b"linear"),
    *(b"yarn", b"longrope", b"default", b"smollm", b"gemma3", b"qwen2", b"mamba", b"clip", b"test"),
    *(b"gemma4", b"falcon", b"granite", b"olmo2", b"phi3", b"kimi-k2", b"hybriddna", b"whitespace"),
    *(b"{{ messages", b"{% if %}", b"{{ 1/0 }}", b"{{ raise_exception('no') }}"),
)


@dataclass
class Entry:
    """A key. value: a number, bytes, or a list of either; item: type of a list's elements."""

    name: bytes
    type: int
    value: Any
    item: int = 0


@dataclass
class Info:
    """A tensor of the table."""

    name: bytes
    shape: list[int]
    type: int
    offset: int


@dataclass
class Parts:
    """A file in parts, and the places in it where lengths and types stand."""

    version: int
    keys: list[Entry]
    tensors: list[Info]
    data: bytes
    lengths: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 4
        self.lengths: list[int] = []
        self.types: list[int] = []

    def number(self, format: str) -> Any:
        value = struct.unpack_from(f"<{format}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{format}")
        return value

    def length(self) -> int:
        self.lengths.append(self.at)
        return self.number("Q")

    def type(self) -> int:
        self.types.append(self.at)
        return self.number("I")

    def string(self) -> bytes:
        size = self.length()
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, type: int) -> Any:
        return self.string() if type == STRING else self.number(FORMATS[type])


def split(data: bytes) -> Parts:
    """Read a right file."""
    reader = _Reader(data)
    version, n_tensors, n_keys = reader.number("I"), reader.length(), reader.length()
    keys = []
    spans: dict[str, list[tuple[int, int]]] = {"keys": [], "vocabulary": []}
    for _ in range(n_keys):
        start = reader.at
        name, type, item = reader.string(), reader.type(), 0
        if type == ARRAY:
            item = reader.type()
            value: Any = [reader.value(item) for _ in range(reader.length())]
        else:
            value = reader.value(type)
        keys.append(Entry(name, type, value, item))
        kind = "vocabulary" if name.startswith(b"tokenizer.ggml") else "keys"
        spans[kind].append((start, reader.at))
    start = reader.at
    tensors = []
    for _ in range(n_tensors):
        name = reader.string()
        shape = [reader.number("Q") for _ in range(reader.number("I"))]
        tensors.append(Info(name, shape, reader.type(), reader.number("Q")))
    spans["table"] = [(start, reader.at)]
    begin = -(-reader.at // ALIGNMENT) * ALIGNMENT
    routers = [info for info in tensors if b".mod_" in info.name]
    spans["routers"] = [
        (begin + info.offset, begin + info.offset + 4 * info.shape[0]) for info in routers
    ]
    spans["tail"] = [(begin, len(data))]
    spans["routers"] = spans["routers"] or spans["tail"]
    return Parts(version, keys, tensors, data[begin:], reader.lengths, reader.types, spans)


def join(parts: Parts) -> bytes:
    """Write the file."""
    out = [b"GGUF", struct.pack("<IQQ", parts.version, len(parts.tensors), len(parts.keys))]
    for entry in parts.keys:
        out.append(_string(entry.name) + struct.pack("<I", entry.type))
        if entry.type == ARRAY:
            out.append(struct.pack("<IQ", entry.item, len(entry.value)))
            out += [_value(entry.item, value) for value in entry.value]
        else:
            out.append(_value(entry.type, entry.value))
    for info in parts.tensors:
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
        out.append(_string(info.name) + dims + struct.pack("<IQ", info.type, info.offset))
    head = b"".join(out)
    return head + bytes(-len(head) % ALIGNMENT) + parts.data


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(type: int, value: Any) -> bytes:
    return _string(value) if type == STRING else struct.pack(f"<{FORMATS[type]}", value)


# --- random damage


def _place(rng, spans: list[tuple[int, int]]) -> int:
    """Return a random position in the spans."""
    sizes = [end - start for start, end in spans]
    at = int(rng.integers(sum(sizes)))
    for (start, _), size in zip(spans, sizes, strict=True):
        if at < size:
            return start + at
        at -= size
    raise AssertionError


def _flip(kind: str):
    def mutate(rng, data: bytes, parts: Parts) -> bytes:
        out = bytearray(data)
        for _ in range(rng.integers(1, 9)):
            out[_place(rng, parts.spans[kind])] = rng.integers(256)
        return bytes(out)

    return mutate


def _zero(kind: str):
    def mutate(rng, data: bytes, parts: Parts) -> bytes:
        out = bytearray(data)
        at = _place(rng, parts.spans[kind])
        size = min(int(rng.integers(1, 17)), len(out) - at)
        out[at : at + size] = bytes(size)
        return bytes(out)

    return mutate


def _truncated(rng, data: bytes, parts: Parts) -> bytes:
    start = parts.spans["tail"][0][0]
    return data[: rng.integers(start) if rng.random() < 0.7 else rng.integers(start, len(data))]


def _length(rng, data: bytes, parts: Parts) -> bytes:
    """Change one length of a string or array, or swap two."""
    out = bytearray(data)
    first, second = (int(at) for at in rng.choice(parts.lengths, 2))
    if rng.random() < 0.5:
        out[first : first + 8], out[second : second + 8] = (
            data[second : second + 8],
            data[first:][:8],
        )
    else:
        old = struct.unpack_from("<Q", data, first)[0]
        new = (*LENGTHS, old + 1, max(old, 1) - 1)
        struct.pack_into("<Q", out, first, new[rng.integers(len(new))])
    return bytes(out)


def _type(rng, data: bytes, parts: Parts) -> bytes:
    """Change the type of a key, of the elements of an array or of a tensor."""
    out = bytearray(data)
    number = int(rng.integers(45)) if rng.random() < 0.95 else 0xFFFFFFFF
    struct.pack_into("<I", out, int(rng.choice(parts.types)), number)
    return bytes(out)


# --- right files with one wrong thing


def _random_value(rng, type: int, old: Any = None) -> Any:
    if type == STRING:
        texts = TEXTS + WORDS
        return texts[rng.integers(len(texts))]
    if type == BOOL:
        return bool(rng.integers(2))
    if type in (F32, F64):
        return FLOATS[rng.integers(len(FLOATS))]
    numbers = list(SIZES)
    if isinstance(old, int):
        numbers += [old + 1, max(old, 1) - 1, old * 2, old // 2]
    value = int(numbers[rng.integers(len(numbers))])
    size = struct.calcsize(FORMATS[type])
    value %= 1 << 8 * size
    return value - (1 << 8 * size) if FORMATS[type].islower() and value >> 8 * size - 1 else value


def _key_value(rng, data: bytes, parts: Parts) -> bytes:
    """Give a key another value, another type, or an array for a number; drop or add a key."""
    at = int(rng.integers(len(parts.keys)))
    entry = parts.keys[at]
    choice = rng.random()
    if choice < 0.5 and entry.type != ARRAY:
        entry.value = _random_value(rng, entry.type, entry.value)
    elif choice < 0.5 or choice < 0.6 and entry.type == ARRAY:
        _change_array(rng, entry)
    elif choice < 0.7:
        del parts.keys[at]
    elif choice < 0.8:
        _retype(rng, entry)
    elif choice < 0.9:
        count = int(rng.choice([0, 1, 2, len(parts.tensors), 513]))
        item = int(rng.choice([U32, I32, F32, STRING, BOOL]))
        entry.type, entry.item = ARRAY, item
        entry.value = [_random_value(rng, item) for _ in range(count)]
    else:
        parts.keys.append(_known_key(rng, parts))
    return join(parts)


def _change_array(rng, entry: Entry) -> None:
    """Change an element, or the number of elements."""
    choice = rng.random()
    if choice < 0.6 and entry.value:
        entry.value[rng.integers(len(entry.value))] = _random_value(rng, entry.item)
    elif choice < 0.8:
        entry.value = entry.value[: rng.integers(len(entry.value) + 1)]
    else:
        entry.value = [*entry.value, _random_value(rng, entry.item)]


def _retype(rng, entry: Entry) -> None:
    entry.type = int(rng.choice([kind for kind in (*FORMATS, STRING) if kind != entry.type]))
    entry.value = _random_value(rng, entry.type)


# keys that llama.cpp reads in every model, or in many
KNOWN_KEYS = {
    **dict.fromkeys(
        (
            *("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"),
            *("nextn_predict_layers", "rope.dimension_count", "attention.key_length"),
            *("attention.value_length", "attention.sliding_window", "pooling_type"),
            *("rope.scaling.original_context_length", "embedding_length_out", "vocab_size"),
            *(
                "attention.key_length_swa",
                "attention.value_length_swa",
                "leading_dense_block_count",
            ),
            *("attention.shared_kv_layers", "full_attention_interval", "attention.head_count"),
            *("attention.sliding_window_pattern", "block_count", "feed_forward_length"),
            *("attention.indexer.top_k", "deepstack_layer_count", "token_type_count"),
        ),
        U32,
    ),
    **dict.fromkeys(
        (
            *("rope.freq_base", "rope.scaling.factor", "rope.scale_linear", "logit_scale"),
            *("rope.scaling.attn_factor", "attention.scale", "residual_scale", "embedding_scale"),
            *("attn_logit_softcapping", "final_logit_softcapping", "attention.layer_norm_epsilon"),
        ),
        F32,
    ),
    "attention.causal": BOOL,
    "rope.scaling.finetuned": BOOL,
    "rope.scaling.type": STRING,
}
PLAIN_KEYS = {
    **dict.fromkeys(
        (
            *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"),
            *("tokenizer.ggml.eot_token_id", "tokenizer.ggml.unknown_token_id"),
            *("tokenizer.ggml.fim_pad_token_id", "tokenizer.ggml.padding_token_id"),
            *("general.file_type", "general.alignment", "general.quantization_version"),
        ),
        U32,
    ),
    **dict.fromkeys(
        (
            *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"),
            *("tokenizer.ggml.add_sep_token", "tokenizer.ggml.add_space_prefix"),
            *("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.escape_whitespaces"),
        ),
        BOOL,
    ),
    **dict.fromkeys(
        ("tokenizer.ggml.pre", "tokenizer.chat_template", "general.name", "general.type"), STRING
    ),
    "split.count": U16,
    "split.no": U16,
}


def _known_key(rng, parts: Parts) -> Entry:
    arch = next((e.value for e in parts.keys if e.name == b"general.architecture"), b"llama")
    names = {f"{arch.decode('latin-1')}.{name}": kind for name, kind in KNOWN_KEYS.items()}
    names |= PLAIN_KEYS
    name = sorted(names)[rng.integers(len(names))]
    return Entry(name.encode(), names[name], _random_value(rng, names[name]))


def _token(rng, data: bytes, parts: Parts) -> bytes:
    """Change a token, its type or score, a merge, or the number of any."""
    arrays = [e for e in parts.keys if e.type == ARRAY and e.name.startswith(b"tokenizer.")]
    entry = arrays[rng.integers(len(arrays))]
    if entry.item == STRING and rng.random() < 0.7:
        at = int(rng.integers(len(entry.value)))
        old = entry.value[at]
        texts = (*TEXTS, entry.value[rng.integers(len(entry.value))], old[:-1], old[1:], old * 2)
        entry.value[at] = texts[rng.integers(len(texts))]
    else:
        _change_array(rng, entry)
    return join(parts)


def _special(rng, data: bytes, parts: Parts) -> bytes:
    """Set the id of a special token, and whether the tokenizer adds tokens."""
    names = [name for name, kind in PLAIN_KEYS.items() if name.startswith("tokenizer.ggml.")]
    for name in rng.choice(names, 3):
        parts.keys = [entry for entry in parts.keys if entry.name != name.encode()]
        kind = PLAIN_KEYS[name]
        if rng.random() < 0.8:
            parts.keys.append(Entry(name.encode(), kind, _random_value(rng, kind)))
    return join(parts)


def _tensor(rng, data: bytes, parts: Parts) -> bytes:
    """Change shape, type, name or offset of a tensor; drop it or have it twice."""
    at = int(rng.integers(len(parts.tensors)))
    info = parts.tensors[at]
    choice = rng.integers(7)
    if choice == 0:
        info.type = int(rng.integers(45))
    elif choice == 1 and info.shape:
        info.shape[rng.integers(len(info.shape))] = LENGTHS[rng.integers(len(LENGTHS))]
    elif choice == 2:
        info.shape = [int(x) for x in rng.permutation(info.shape)]
        info.shape += [1] * int(rng.integers(2))
    elif choice == 3:
        info.name = parts.tensors[rng.integers(len(parts.tensors))].name
    elif choice == 4:
        info.offset = LENGTHS[rng.integers(len(LENGTHS))]
    elif choice == 5:
        del parts.tensors[at]
    else:
        info.name = rng.choice(np.array(TEXTS, object))
    return join(parts)


KINDS: dict[str, Callable] = {
    "bytes of keys": _flip("keys"),
    "bytes of the vocabulary": _flip("vocabulary"),
    "zeros in the vocabulary": _zero("vocabulary"),
    "bytes of the tensor table": _flip("table"),
    "zeros in the tensor table": _zero("table"),
    "bytes of routers": _flip("routers"),
    "bytes of the tail": _flip("tail"),
    "truncation": _truncated,
    "lengths": _length,
    "types": _type,
    "values of keys": _key_value,
    "tokens": _token,
    "special tokens": _special,
    "tensors": _tensor,
}


# These need a file with a vocabulary.
OF_VOCABULARY = ("bytes of the vocabulary", "zeros in the vocabulary", "tokens", "special tokens")


def mutate(data: bytes, kind: str, seed: int) -> bytes:
    """Return the file with one mutation of this kind."""
    rng = np.random.default_rng(seed)
    return KINDS[kind](rng, data, split(data))
