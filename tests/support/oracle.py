"""What the tests of the patched runtime compare it with.

    tiny = oracle.make("kv+attn")
    expected = tiny.forward(oracle.TOKENS[0])

The models are tiny and routed. The results are those of the numpy oracle, or for a model of
another architecture those of tests/support/architectures/memory.py.
"""

from __future__ import annotations

import ctypes
import struct
from itertools import cycle

import llama_cpp
import numpy as np
import pytest

from mod_export.runtime import bindings
from tests.support.architectures import memory
from tests.support.architectures.memory import RoutedFile
from tests.support.c_api import Raw
from tests.support.tiny_gguf import Tiny
from tests.support.windows import Window

needs_patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)

N = 150
TOKENS = np.random.default_rng(0).integers(0, 96, (4, N))
NOISE = Tiny.noise  # The logits have a standard deviation of 2.

CASES = {
    "ffn": {(1, 3): "ffn"},
    "attn": {(1, 3): "attn"},
    "block": {(1, 2, 3): "block"},
    "kv": {(1, 2, 4): "kv"},
    "attn+ffn": {(1, 3): "attn+ffn"},
    "block+kv": {(1, 3): "block+kv"},
    "attn+ffn+kv": {(1, 2): "attn+ffn+kv"},
    "all": {
        (0,): "kv+ffn",
        (1,): "block",
        (2,): "attn+kv",
        (4,): "block+kv",
    },  # layer 3 has complete K/V
    "heads": {(1, 2, 4): "heads"},
    "heads with windows": {(1, 4): "heads", (2,): "attn+ffn+heads", (3,): "block+heads"},
}
# The windows of "heads with windows", in turns; one of its heads keeps everything.
HEAD_WINDOWS = (3, 8, 20)
# The layers of SLIDES see few tokens. No layer has complete K/V in the first case.
SLIDES = (1, 2, 4)
SLIDING = {
    "sliding+kv": {(0, 3): "kv+ffn", (2,): "ffn"},
    "sliding+block": {(3,): "block+kv", (1,): "ffn"},
}


# With the others, the models whose sliding layers are tested.
WINDOWED = (*SLIDING, *memory.WINDOWED)


def make(case: str, activation: float = 0.5, sequences=TOKENS[:2], **shape) -> Tiny | RoutedFile:
    """Return a tiny model with the units of a case.

    case: one of CASES, WINDOWED, memory.NAMES, memory.HYBRIDS or memory.DRAFTED
    sequences: biases lie in gaps between their scores
    shape: of a Tiny; the other models have one shape
    """
    if case in (*memory.NAMES, *memory.HYBRIDS, *memory.DRAFTED):
        return memory.routed(case, sequences, activation)
    if case in SLIDING:
        shape = {"sliding": SLIDES} | shape
    if case.startswith("heads"):
        shape |= {"n_head": 4, "n_head_kv": 2}
    tiny = Tiny(**shape)
    for layers, kinds in (CASES | SLIDING)[case].items():
        tiny.route(layers, kinds, seed=layers[0] + 1)
    if case == "heads with windows":
        del tiny.routers[4, "kv", 1]
        heads = [unit for unit in tiny.units if unit.kind == "kv"]
        tiny.windows = dict(zip(heads, cycle(HEAD_WINDOWS), strict=False))
    return tiny.place_biases(sequences, activation)


def close(a, b, noise=NOISE):
    np.testing.assert_allclose(a, b, rtol=0, atol=noise)


def cells(r: Raw) -> list[int]:
    """Return the number of K/V cells in use, layer by layer."""
    return [r.kv(layer).n_used for layer in range(llama_cpp.llama_model_n_layer(r.model))]


def parts(tiny: Tiny | RoutedFile, layer: int) -> int:
    """Return the cells that a layer has for a token that it holds: one, or one of each K/V head."""
    return tiny.heads if any(u.layer == layer and u.kind == "kv" for u in tiny.units) else 1


def kept(tiny: Tiny | RoutedFile, layer: int, active, n: int, rollback: int) -> np.ndarray:
    """Return which of the first n tokens of a text a layer holds, bool [n, parts].

    A part is a K/V head, where these have cells of their own. active: [T, n_units], from the trace.
    """
    if layer in tiny.without_kv:
        return np.zeros((n, 1), bool)
    at = np.arange(n)
    unit = {u: active[:n, i].astype(bool) for i, u in enumerate(tiny.units)}
    own = [u for u in unit if u.layer == layer and u.kind == "kv"]
    keep = np.ones((n, parts(tiny, layer)), bool)
    for kind in ("block", "attn"):
        keep &= np.asarray(unit.get((layer, kind), np.ones(n, bool)))[:, None]
    for u in own:
        near = at >= Window(tiny.window_of(u)).first(n - rollback)
        keep[:, slice(None) if u.head is None else [u.head]] &= (unit[u] | near)[:, None]
    if layer in tiny.sliding:
        keep &= (at >= tiny.window.first(n - rollback))[:, None]
    return keep


def expected_cells(tiny: Tiny | RoutedFile, active, n: int, rollback: int = 64) -> list[int]:
    """Return the K/V cells that the decisions ask for after n tokens, layer by layer."""
    return [int(kept(tiny, i, active, n, rollback).sum()) for i in range(tiny.n_layer)]


def check_cells(r: Raw, tiny: Tiny | RoutedFile, active, rollback: int) -> None:
    """Decode 150 tokens in batches of several sizes, and look at the cells after each of them."""
    r.set(kv_rollback=rollback)
    n = 0
    for size in (90, 7, *[1] * 30, 23):
        r.decode(TOKENS[0][n : n + size])
        n += size
        assert cells(r) == expected_cells(tiny, active, n, rollback)


def save(r: Raw) -> bytes:
    """Return the state of a context."""
    buffer = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(r.ctx))()
    n = llama_cpp.llama_state_get_data(r.ctx, buffer, len(buffer))
    assert 0 < n <= len(buffer)
    return bytes(buffer[:n])


def without_origins(data: bytes, header: bool = True) -> bytes:
    """A state that does not tell what made its K/V, which any context takes.

    Without the header it has the format of the states that had none.
    """
    at = data.index(b"MoDS")
    (count,) = struct.unpack_from("<I", data, at + 8)
    end = at + 12
    for _ in range(count):
        # three digests, three types, force, shift, mixed; then the thresholds
        (thresholds,) = struct.unpack_from("<I", data, end + 3 * 8 + 3 * 4 + 3 * 4)
        end += 3 * 8 + 3 * 4 + 4 * 4 + 4 * thresholds
    kept = data[at : at + 8] + bytes(4) if header else b""
    return data[:at] + kept + data[end:]


def restore(r: Raw, data: bytes) -> int:
    """Give a context a state, and return how many bytes it read."""
    return llama_cpp.llama_state_set_data(
        r.ctx, (ctypes.c_uint8 * len(data)).from_buffer_copy(data), len(data)
    )
