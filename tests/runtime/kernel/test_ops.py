"""The ops of ggml-mod.h on the CPU against numpy. Their CUDA kernels are compared with the CPU by
test-backend-ops.
"""

import ctypes
import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

LIB = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
F32, F16, I32 = 0, 1, 26  # enum ggml_type
DTYPES = {F32: np.float32, F16: np.float16, I32: np.int32}
EPS = 1e-5
P, I64 = ctypes.c_void_p, ctypes.c_int64


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", P), ("no_alloc", ctypes.c_bool)]


def function(lib, name, result, *arguments):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, arguments
    return found


class Ggml:
    """A context: arrays become tensors (the last axis first, as ggml counts them), and tensors are
    computed.
    """

    def __init__(self):
        base, cpu = (
            ctypes.CDLL(str(LIB / "libggml-base.so")),
            ctypes.CDLL(str(LIB / "libggml-cpu.so")),
        )
        self.new = function(base, "ggml_new_tensor_3d", P, P, ctypes.c_int, I64, I64, I64)
        self.data = function(base, "ggml_get_data", P, P)
        self.graph = function(base, "ggml_new_graph", P, P)
        self.expand = function(base, "ggml_build_forward_expand", None, P, P)
        self.compute = function(
            cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, P, P, ctypes.c_int
        )
        self.score = function(base, "ggml_mod_score", P, P, P, P, P, ctypes.c_float)
        self.route = function(
            base, "ggml_mod_route", P, P, P, P, P, P, P, ctypes.c_float, ctypes.c_bool
        )
        self.gather = function(base, "ggml_mod_gather", P, P, P, P, ctypes.c_int)
        self.scatter = function(base, "ggml_mod_scatter", P, P, P, P, P, ctypes.c_int)
        self.mask = function(base, "ggml_mod_mask", P, P, P, P, P, ctypes.c_int, I64)
        self.free = function(base, "ggml_free", None, P)
        self.ctx = function(base, "ggml_init", P, InitParams)(InitParams(1 << 24, None, False))

    def tensor(self, array):
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == array.dtype)
        tensor = self.new(self.ctx, kind, *(*array.shape[::-1], 1, 1)[:3])
        ctypes.memmove(self.data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return tensor

    def run(self, tensor, shape, dtype=np.float32):
        graph = self.graph(self.ctx)
        self.expand(graph, tensor)
        assert self.compute(self.ctx, graph, 2) == 0
        result = np.empty(shape, dtype)
        ctypes.memmove(result.ctypes.data, self.data(tensor), result.nbytes)
        return result


@pytest.fixture
def ggml():
    ggml = Ggml()
    yield ggml
    ggml.free(ggml.ctx)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def scores(h, w, b):
    h = h.astype(np.float64)
    return h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + EPS) @ w.T.astype(np.float64) + b


def random_route(rng, n_tokens, n_units):
    """What ggml_mod_route() gives for random decisions, and these with their gates."""
    active = rng.random((n_units, n_tokens)) < 0.5
    gate = np.where(active, rng.choice([1.0, 0.3, 0.9], (n_units, n_tokens)), 0).astype(np.float32)
    route = np.full((n_units, 1 + 3 * n_tokens), -1, np.int32)
    for u in range(n_units):
        ids = np.flatnonzero(active[u])
        route[u, 0], route[u, 1 : 1 + len(ids)] = len(ids), ids
        route[u, 1 + 2 * n_tokens :] = gate[u].view(np.int32)
    return route, active, gate


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_score(ggml, rng, n_tokens):
    h, w, b = 3 * normal(rng, n_tokens, 70), normal(rng, 3, 70), normal(rng, 3)
    result = ggml.run(ggml.score(ggml.ctx, *map(ggml.tensor, (h, w, b)), EPS), (n_tokens, 3))
    np.testing.assert_allclose(result, scores(h, w, b), rtol=1e-5, atol=1e-5)


def test_a_score_does_not_depend_on_the_batch(ggml, rng):
    h, w, b = normal(rng, 33, 576), ggml.tensor(normal(rng, 5, 576)), ggml.tensor(normal(rng, 5))
    whole = ggml.run(ggml.score(ggml.ctx, ggml.tensor(h), w, b, EPS), (33, 5))
    for i in (0, 17, 32):
        alone = ggml.run(ggml.score(ggml.ctx, ggml.tensor(h[i : i + 1]), w, b, EPS), (1, 5))
        assert (alone[0] == whole[i]).all()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_route(ggml, rng, n_tokens, scale):
    """Units of which none, some and all tokens are active; some tokens are whatever their scores
    say.
    """
    h, w, b = normal(rng, n_tokens, 64), normal(rng, 3, 64), normal(rng, 3)
    limit = np.array([np.inf, 0.25, -np.inf], np.float32)
    always = (np.arange(n_tokens) % 7 == 3).astype(np.int32)
    inputs = map(ggml.tensor, (h, w, b, limit, always))
    route = ggml.run(ggml.route(ggml.ctx, *inputs, EPS, scale), (3, 1 + 3 * n_tokens), np.int32)
    expected = scores(h, w, b).T
    for u in range(3):
        above = expected[u] >= limit[u]
        active = above | (always > 0)
        ids = np.flatnonzero(active)
        assert route[u, 0] == len(ids)
        assert (
            route[u, 1 : 1 + n_tokens] == np.pad(ids, (0, n_tokens - len(ids)), constant_values=-1)
        ).all()
        score, gate = route[u, 1 + n_tokens :].view(np.float32).reshape(2, n_tokens)
        np.testing.assert_allclose(score, expected[u], rtol=1e-4, atol=1e-5)
        scaled = above if scale and np.isfinite(limit[u]) else np.zeros(n_tokens, bool)
        np.testing.assert_allclose(
            gate, np.where(scaled, 1 / (1 + np.exp(-expected[u])), active), rtol=1e-4
        )


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_gather_and_scatter(ggml, rng, n_tokens):
    """Rows beyond the tokens, and those of inactive ones, stay as they are; the first fills up."""
    h, x = normal(rng, n_tokens + 2, 48), normal(rng, n_tokens, 48)
    route, active, gate = random_route(rng, n_tokens, 4)
    for u in range(4):
        ids, n = np.flatnonzero(active[u]), active[u].sum()
        gathered = ggml.run(
            ggml.gather(ggml.ctx, ggml.tensor(h), ggml.tensor(route), u), (n_tokens, 48)
        )
        assert (gathered[:n] == h[ids]).all() and (gathered[n:] == h[0]).all()
        expected, g = h.copy(), gate[u, ids, None]
        expected[ids] = np.where(g == 1, x[:n], h[ids] + g * (x[:n] - h[ids]))
        scattered = ggml.scatter(ggml.ctx, ggml.tensor(h), ggml.tensor(x), ggml.tensor(route), u)
        scattered = ggml.run(scattered, h.shape)
        np.testing.assert_allclose(scattered, expected, rtol=1e-6, atol=1e-6)
        hard = ids[gate[u, ids] == 1]
        assert (scattered[hard] == expected[hard]).all()


@pytest.mark.parametrize("kind", [F16, F32])
def test_mask(ggml, rng, kind):
    """Two sequences, a window of 4: cells that are empty, kept, and dropped."""
    n_cells, n_kv, window = 20, 16, 4
    start = rng.integers(0, 12, (2, n_cells)).astype(np.float32)
    empty, dropped = rng.random((2, 2, n_cells)) < 0.4
    start[empty] = np.inf
    cells = np.stack([start, np.where(dropped, start + window - 1, np.inf)], axis=-1).astype(
        np.float32
    )
    pos, seq = np.array([0, 5, 11, 5], np.int32), np.array([0, 1, 0, 0], np.int32)
    mask = ggml.mask(ggml.ctx, *map(ggml.tensor, (cells, pos, seq)), kind, n_kv)
    mask = ggml.run(mask, (4, n_kv), DTYPES[kind])
    for i, (p, s) in enumerate(zip(pos, seq, strict=True)):
        distance = p - start[s, :n_kv]
        seen = ~empty[s, :n_kv] & (distance >= 0) & (~dropped[s, :n_kv] | (distance < window))
        assert (mask[i] == np.where(seen, 0, -np.inf)).all()
    first = ggml.mask(ggml.ctx, ggml.tensor(cells), ggml.tensor(pos), None, kind, n_kv)
    first = ggml.run(first, (4, n_kv), DTYPES[kind])
    assert (first[[0, 2, 3]] == mask[[0, 2, 3]]).all()
