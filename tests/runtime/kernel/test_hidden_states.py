"""The hidden states that draft heads read, beside kv units: the dense model's, in any cut."""

import ctypes

import llama_cpp
import numpy as np
import pytest

from mod_export.units import KV, Unit
from tests.support.architectures import memory, routers
from tests.support.c_api import Raw
from tests.support.oracle import needs_patched

pytestmark = needs_patched

N, LAYER = 60, 3
TOKENS = np.random.default_rng(11).integers(0, 96, N)
SEQS = [i // 3 % 2 for i in range(N)]
NOISE = 5e-5  # of states whose norms are near 1
# A hybrid, a model of full attention, one with sliding windows.
NAMES = ("qwen35", "qwen3moe", "gpt-oss")
LIB = llama_cpp.llama_cpp._lib
# functions of src/llama-ext.h, which has C++ names
SET_LAST, GET_LAST, SET_INPUT, GET_INPUT = (
    getattr(LIB, name)
    for name in (
        "_Z26llama_set_embeddings_nextnP13llama_contextbb",
        "_Z26llama_get_embeddings_nextnP13llama_context",
        "_Z30llama_set_embeddings_layer_inpP13llama_contextjb",
        "_Z30llama_get_embeddings_layer_inpP13llama_contextj",
    )
)
SET_LAST.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool]
SET_INPUT.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool]
GET_LAST.argtypes, GET_INPUT.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_uint32]
GET_LAST.restype = GET_INPUT.restype = ctypes.POINTER(ctypes.c_float)


@pytest.fixture(scope="module", params=NAMES)
def files(request, tmp_path_factory):
    """(the dense file, the same with kv units, does its graph tell the last states?)"""
    model = memory.file(request.param)
    path = tmp_path_factory.mktemp("hidden") / "mod.gguf"
    units = [Unit(layer, KV) for layer in model.full[1:]]
    return model.path, routers.route(model, path, units), model.architecture != "qwen3moe"


def states(path, sizes, logits=None, masked=False, last=True, force=None, **params):
    """(of the last layer, before LAYER, logits) of TOKENS in batches of the sizes."""
    with Raw(path, **params) as r:
        if force:
            r.set(force=force)
        if last:
            SET_LAST(r.ctx, True, masked)
        for layer in (0, LAYER, LAYER + 1):
            SET_INPUT(r.ctx, layer, True)
        found, end = [], 0
        for size in sizes:
            start, end = end, end + size
            part = None if logits is None else logits[start:end]
            out = r.decode(TOKENS[start:end], SEQS[start:end], logits=part)
            shape = size, r.n_embd
            rows = shape if not masked else (len(out), r.n_embd)
            h = np.ctypeslib.as_array(GET_LAST(r.ctx), rows).copy() if last else np.zeros(shape)
            inputs = [
                np.ctypeslib.as_array(GET_INPUT(r.ctx, layer), shape).copy()
                for layer in (0, LAYER, LAYER + 1)
            ]
            found.append((h, np.concatenate(inputs, axis=1), out))
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("cut", [{"n_ubatch": 16}, {"n_ubatch": 512}])
@pytest.mark.parametrize("masked", [False, True])
def test_all_active_is_dense(files, cut, masked):
    """To the bit, also where few rows are output, and token by token."""
    dense, mod, last = files
    some = [int(i % 4 == 1 or i > 40) for i in range(N)]
    options = {"logits": some, "masked": masked, "last": last, **cut}
    sizes = [40, *[1] * 15, 5]
    expected = states(dense, sizes, **options)
    for name, a, b in zip(
        ("last", "inputs", "logits"),
        states(mod, sizes, force="active", **options),
        expected,
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert not last or np.abs(expected[0]).min(axis=1).all()


def test_cuts_change_nothing(files):
    """In segments that are cut at kv units, or not, in one graph, and in ubatches."""
    _, mod, last = files
    whole = states(mod, [N], last=last)
    forced = states(mod, [N], last=last, force="active")
    assert np.abs(whole[2] - forced[2]).max() > 50 * NOISE  # units decide
    for sizes, cut in (([20, *[1] * 40], {}), ([5] * 12, {}), ([N], {"n_ubatch": 7})):
        for a, b in zip(states(mod, sizes, last=last, **cut), whole, strict=True):
            np.testing.assert_allclose(a, b, atol=NOISE, rtol=NOISE)
