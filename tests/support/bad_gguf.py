"""Small GGUF files that break one rule of the schema each.

    write(path)                                    # a good file of this make
    model, keys, tensors, words = ROUTERS["router NaN"]
    model.write(path, keys, tensors)               # a file that llama.cpp refuses
    options, words = SCHEMA_RULES["threshold 1"]
    write(path, **options)                         # the error names `words`
    edit, words, model = MODELS["two tokens of one text"]
    write_edited(path, edit, model=model)                # a file that would end the process

The files are made by gguf-py.
"""

import gguf
import numpy as np

from mod_export.formats import schema
from tests.support import tiny_vocab
from tests.support.mutated_gguf import ARRAY, STRING, U32, Entry, Parts, join, split
from tests.support.tiny_gguf import Tiny

V = gguf.GGUFValueType
NAN = float("nan")

# For each fault: the options of write, and a part of the message.
WIDTH = 32
SCHEMA_RULES = {
    "threshold 1": (dict(p=1.0), "threshold"),
    "threshold negative": (dict(p=-0.5), "threshold"),
    "threshold nan": (dict(p=NAN), "threshold"),
    "weight nan": (dict(weight=np.full(WIDTH, NAN, np.float32)), "blk.2.mod_kv.weight"),
    "bias infinite": (dict(bias=np.array([np.inf], np.float32)), "blk.2.mod_kv.bias"),
    "weight short": (dict(weight=np.zeros(WIDTH // 2, np.float32)), "blk.2.mod_kv.weight"),
    "weight f16": (dict(weight=np.zeros(WIDTH, np.float16)), "blk.2.mod_kv.weight"),
    "bias missing": (dict(bias=None), "blk.2.mod_kv.bias is missing"),
    "window 0": (dict(kv_window=0), "kv_window"),
    "version 2": (dict(version=2), "version"),
    "gating": (dict(gating_func="softmax"), "gating_func"),
    "no version": (dict(version=None), "version is missing"),
    "block beside attn": (dict(kinds=["block", "attn"]), "block"),
    "no complete layer": (dict(layers=[0, 1, 2]), "complete"),
    "router without threshold": (dict(layers=[2], thresholds=[1]), "mod_kv"),
    "short array": (dict(n_values=2), "values"),
}


def write(
    path,
    p=0.5,
    weight=...,
    bias=...,
    kinds=("kv",),
    layers=(2,),
    thresholds=None,
    n_values=3,
    **keys,
):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 3,
        "embedding_length": WIDTH,
        "attention.head_count": 2,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    keys = {"version": 1, "gating_func": "sigmoid", "sink_tokens": 4, "kv_window": 64} | keys
    for name, value in keys.items():
        if value is not None:
            getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(
                f"llama.mod.{name}", value
            )
    writer.add_bool("llama.mod.scale_output", False)
    writer.add_tensor("token_embd.weight", np.zeros((4, WIDTH), np.float32))
    for kind in kinds:
        routed = thresholds or layers
        writer.add_array(
            f"llama.mod.{kind}.threshold", [p if i in routed else 0.0 for i in range(n_values)]
        )
        writer.add_array(
            f"llama.mod.{kind}.activation", [0.5 if i in routed else 1.0 for i in range(n_values)]
        )
        for layer in layers:
            for name, value, good in zip(
                schema.tensor_names(layer, kind),
                (weight, bias),
                (np.ones(WIDTH), np.zeros(1)),
                strict=True,
            ):
                if value is not None:
                    writer.add_tensor(name, good.astype(np.float32) if value is ... else value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def tiny(kinds: str = "kv", layers=(1, 3), **options) -> Tiny:
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 2, "n_head_kv": 1, "n_ff": 64, "n_vocab": 32}
    return Tiny(**shape, **options).route(layers, kinds)


def heads(own_windows: bool = False, without: tuple = ()) -> Tiny:
    """Units of K/V heads; `without`: the units that are left out."""
    model = Tiny(n_layer=4, n_embd=64, n_head=4, n_head_kv=2, n_ff=64, n_vocab=32)
    model.route((1, 3), "heads")
    for unit in without:
        del model.routers[unit]
    if own_windows:
        model.windows = {(1, "kv", 0): 3}
    return model


def router(value=None, layer: int = 3, kind: str = "kv", part: str = "weight") -> dict:
    return {f"blk.{layer}.mod_{kind}.{part}": value}


def with_nan(n: int, value: float = NAN) -> np.ndarray:
    x = np.zeros(n, np.float32)
    x[n // 2] = value
    return x


def threshold(*p: float, kind: str = "kv") -> dict:
    return {f"{kind}.threshold": ([float(x) for x in p], V.ARRAY, V.FLOAT32)}


# For each fault: the model, the keys and tensors that replace the right ones, words of the message.
ROUTERS = {
    "router weight missing": (tiny(), {}, router(), ["blk.3.mod_kv.weight"]),
    "router bias missing": (tiny(), {}, router(part="bias"), ["blk.3.mod_kv.bias"]),
    "router too short": (
        tiny(),
        {},
        router(np.zeros(63, np.float32)),
        ["blk.3.mod_kv.weight", "shape"],
    ),
    "router a matrix": (
        tiny(),
        {},
        router(np.zeros((64, 64), np.float32)),
        ["blk.3.mod_kv.weight", "shape"],
    ),
    "bias of two": (
        tiny(),
        {},
        router(np.zeros(2, np.float32), part="bias"),
        ["blk.3.mod_kv.bias", "shape"],
    ),
    "router in f16": (
        tiny(),
        {},
        router(np.zeros(64, np.float16)),
        ["blk.3.mod_kv.weight", "type"],
    ),
    "router NaN": (tiny(), {}, router(with_nan(64)), ["blk.3.mod_kv.weight", "finite"]),
    "router infinite": (
        tiny(),
        {},
        router(with_nan(64, np.inf)),
        ["blk.3.mod_kv.weight", "finite"],
    ),
    "bias NaN": (tiny(), {}, router(with_nan(1), part="bias"), ["blk.3.mod_kv.bias", "finite"]),
    "router without a threshold": (tiny(), threshold(0, 0.5, 0, 0), {}, ["blk.3.mod_kv"]),
    "router in a layer that is not there": (
        tiny(),
        {},
        router(np.zeros(64, np.float32), layer=9),
        ["blk.9.mod_kv"],
    ),
    "threshold without a router": (
        tiny(),
        threshold(0, 0.5, 0.5, 0.5),
        {},
        ["blk.2.mod_kv.weight"],
    ),
    "threshold 1": (tiny(), threshold(0, 0.5, 0, 1), {}, ["llama.mod.kv.threshold"]),
    "threshold negative": (tiny(), threshold(0, 0.5, 0, -0.5), {}, ["llama.mod.kv.threshold"]),
    "threshold NaN": (tiny(), threshold(0, 0.5, 0, NAN), {}, ["llama.mod.kv.threshold"]),
    "threshold list short": (tiny(), threshold(0, 0.5, 0.5), {}, ["llama.mod.kv.threshold"]),
    "threshold of integers": (
        tiny(),
        {"kv.threshold": ([0, 1, 0, 1], V.ARRAY, V.INT32)},
        {},
        ["kv.threshold", "type"],
    ),
    "threshold a number": (
        tiny(),
        {"kv.threshold": (0.5, V.FLOAT32, None)},
        {},
        ["kv.threshold", "type"],
    ),
    "threshold key missing": (tiny(), {"kv.threshold": (None,) * 3}, {}, ["llama.mod."]),
    "activation missing": (tiny(), {"kv.activation": (None,) * 3}, {}, ["llama.mod.kv.activation"]),
    "activation above 1": (
        tiny(),
        {"kv.activation": ([1.0, 2.0, 1.0, 1.0], V.ARRAY, V.FLOAT32)},
        {},
        ["activation"],
    ),
    "block beside attn": (tiny("block+attn"), {}, {}, ["layer 1", "block", "attn"]),
    "block beside ffn": (tiny("block+ffn"), {}, {}, ["layer 1", "block", "ffn"]),
    "no complete layer": (tiny("kv", (0, 1, 2, 3)), {}, {}, ["complete K/V"]),
    "kv_window 0": (tiny(), {"kv_window": (0, V.UINT32, None)}, {}, ["llama.mod.kv_window"]),
    "kv_window missing": (tiny(), {"kv_window": (None,) * 3}, {}, ["llama.mod.kv_window"]),
    "version 2": (tiny(), {"version": (2, V.UINT32, None)}, {}, ["llama.mod.version", "2"]),
    "version 1 with heads": (
        heads(),
        {"version": (1, V.UINT32, None)},
        {},
        ["llama.mod.kv.threshold", "8 values"],
    ),
    "version 1 with windows": (
        tiny(windows={(1, "kv"): 3}),
        {"version": (1, V.UINT32, None)},
        {},
        ["llama.mod.version", "1"],
    ),
    "thresholds of three heads": (
        heads(),
        threshold(0, 0, 0, 0.4, 0.4, 0.4, 0, 0, 0, 0.4, 0.4, 0.4),
        {},
        ["llama.mod.kv.threshold", "12"],
    ),
    "routers of one head only": (
        heads(),
        {},
        router(np.zeros(64, np.float32)),
        ["blk.3.mod_kv.weight", "shape"],
    ),
    "a router of a head without threshold": (
        heads(without=[(3, "kv", 1)]),
        {},
        router(np.ones((2, 64), np.float32)),
        ["blk.3.mod_kv.weight"],
    ),
    "kv_window not the largest window": (
        heads(own_windows=True),
        {"kv_window": (99, V.UINT32, None)},
        {},
        ["kv_window", "99"],
    ),
    "a window of 0": (
        heads(own_windows=True),
        {"kv.window": ([8, 8, 0, 8, 8, 8, 8, 8], V.ARRAY, V.UINT32)},
        {},
        ["window", "0"],
    ),
    "version missing": (tiny(), {"version": (None,) * 3}, {}, ["mod"]),
    "version a string": (tiny(), {"version": ("1", V.STRING, None)}, {}, ["llama.mod.version"]),
    "gating function": (
        tiny(),
        {"gating_func": ("softmax", V.STRING, None)},
        {},
        ["llama.mod.gating_func", "softmax"],
    ),
    "sink_tokens missing": (tiny(), {"sink_tokens": (None,) * 3}, {}, ["llama.mod.sink_tokens"]),
    "scale_output missing": (tiny(), {"scale_output": (None,) * 3}, {}, ["llama.mod.scale_output"]),
}


def key(parts: Parts, name: str) -> Entry:
    """Return the key with this name, without the architecture."""
    return next(entry for entry in parts.keys if entry.name.decode().endswith(name))


def set_key(name: str, value, type: int | None = None):
    """Return an edit that gives a key another value, and another type where one is given."""

    def edit(parts: Parts) -> None:
        entry = key(parts, name)
        entry.value, entry.type = value, entry.type if type is None else type

    return edit


def add_key(name: str, type: int, value):
    def edit(parts: Parts) -> None:
        parts.keys.append(Entry(name.encode(), type, value))

    return edit


def set_token(number: int, text: bytes):
    def edit(parts: Parts) -> None:
        key(parts, "tokenizer.ggml.tokens").value[number] = text

    return edit


def set_tensor_type(name: str, type: int):
    def edit(parts: Parts) -> None:
        next(info for info in parts.tensors if info.name.decode() == name).type = type

    return edit


# For each fault: the edit, words of the message, and the model of tiny_vocab. llama.cpp ends the
# process on most of these. On the others an exception was none for users, or named another trouble.
MODELS = {
    "zeros over the text of a token": (set_token(100, b"t\0\0\0"), ["tokens", "'t'"], "bpe"),
    "two tokens of one text": (set_token(100, b"the"), ["tokens 100 and", "'the'"], "bpe"),
    "no token for a byte": (set_token(4 + 0xF0, b"x y z"), ["<0xF0>"], "spm"),
    "epsilon negative": (set_key("rms_epsilon", -1.0), ["rms_epsilon", "-1.0"], "bpe"),
    "epsilon NaN": (set_key("rms_epsilon", NAN), ["rms_epsilon", "nan"], "gemma3"),
    "a norm of integers": (
        set_tensor_type("blk.1.attn_norm.weight", 26),
        ["blk.1.attn_norm.weight", "I32", "F32"],
        "spm",
    ),
    "a norm of halves": (
        set_tensor_type("blk.2.attn_k_norm.weight", 1),
        ["blk.2.attn_k_norm.weight", "F16", "F32"],
        "gemma3",
    ),
    "a matrix of integers": (
        set_tensor_type("blk.2.ffn_gate.weight", 26),
        ["blk.2.ffn_gate.weight", "I32"],
        "bpe",
    ),
    "words with blanks in a byte-level vocabulary": (
        set_key("tokenizer.ggml.pre", b"whitespace"),
        ["find(' ')"],
        "bpe",
    ),
    "a context longer than any": (
        set_key("context_length", 2**31 - 1),
        ["context_length", "2147483647"],
        "gemma3",
    ),
    "a list where a name has to be": (
        set_key("tokenizer.ggml.model", [1, 2], ARRAY),
        ["tokenizer.ggml.model", "a list of numbers, not text"],
        "gemma3",
    ),
    "no layers": (set_key(".block_count", 0), ["block_count", "0"], "bpe"),
    "too many layers": (set_key(".block_count", 513), ["block_count", "513"], "bpe"),
    "more experts than llama.cpp knows": (
        add_key("llama.expert_count", U32, 5000),
        ["LLAMA_MAX_EXPERTS"],
        "bpe",
    ),
    "experts in use where there are none": (
        add_key("llama.expert_used_count", U32, 2),
        ["n_expert_used_max"],
        "spm",
    ),
    "a scaling of RoPE that is unknown": (
        add_key("gemma3.rope.scaling.type", STRING, b"spiral"),
        ["rope_scaling_type_train"],
        "gemma3",
    ),
    "a chat template that is none": (
        set_key("chat_template", b"{% if %}"),
        ["chat template"],
        "bpe",
    ),
    "a text that is not UTF-8": (
        add_key("general.name", STRING, b"caf\xe9"),
        ["not UTF-8"],
        "bpe",
    ),
}


def write_edited(path, *edits, model: str):
    """Write a model of tiny_vocab with one thing in it that is wrong, or several."""
    parts = split(tiny_vocab.write(path, model).read_bytes())
    for edit in edits:
        edit(parts)
    path.write_bytes(join(parts))
    return path
