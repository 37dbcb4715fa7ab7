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
# What graphs have: the state behind the last layer before or after its norm (which heads for
# multi-token prediction read, and EAGLE-3 may), the inputs of layers (which EAGLE-3 and DFlash
# read), and among these what the last layer puts out.
LAST, INPUTS, OUTPUT = "last", "inputs", "output"
# A hybrid, a model of full attention, two with sliding windows.
KNOWN = {
    "qwen35": {LAST, INPUTS},
    "qwen3moe": {INPUTS},
    "gpt-oss": {LAST, INPUTS},
    "mimo2": {LAST, INPUTS, OUTPUT},
}
OTHERS = {
    **dict.fromkeys(("llama", "qwen3", "lfm2", "hunyuan_vl", "minimax-01"), {INPUTS}),
    **dict.fromkeys(("minimax-m2", "muse-glimmer"), {INPUTS}),
    **dict.fromkeys(("glm4moe", "step35", "deepseek2", "hy_v3", "cohere2moe"), {LAST}),
    **dict.fromkeys(("qwen3next", "qwen35moe", "bailingmoe3", "gemma4"), {LAST, INPUTS}),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), {LAST, INPUTS, OUTPUT}),
}
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


def write(name, path):
    """(the dense file, the same with kv units)"""
    model = memory.file(name)
    return model.path, routers.route(model, path, [Unit(layer, KV) for layer in model.full[1:]])


@pytest.fixture(scope="module", params=KNOWN)
def files(request, tmp_path_factory):
    """(the dense file, the same with kv units, what its graph has)"""
    path = tmp_path_factory.mktemp("hidden") / "mod.gguf"
    return *write(request.param, path), KNOWN[request.param]


def states(path, sizes, known, logits=None, masked=False, force=None, **params):
    """(of the last layer, inputs of layers, logits) of TOKENS in batches of the sizes."""
    with Raw(path, **params) as r:
        n_layer = llama_cpp.llama_model_n_layer(r.model)
        layers = [0, LAYER, LAYER + 1] * (INPUTS in known) + [n_layer] * (OUTPUT in known)
        last = LAST in known
        if force:
            r.set(force=force)
        if last:
            SET_LAST(r.ctx, True, masked)
        for layer in layers:
            SET_INPUT(r.ctx, layer, True)
        found, end = [], 0
        for size in sizes:
            start, end = end, end + size
            part = None if logits is None else logits[start:end]
            out = r.decode(TOKENS[start:end], SEQS[start:end], logits=part)
            shape = size, r.n_embd
            rows = shape if not masked else (len(out), r.n_embd)
            h = np.ctypeslib.as_array(GET_LAST(r.ctx), rows).copy() if last else np.zeros(shape)
            inputs = [np.ctypeslib.as_array(GET_INPUT(r.ctx, layer), shape) for layer in layers]
            found.append((h, np.concatenate([*inputs, np.zeros(shape)], axis=1), out))
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def check_same(dense, mod, sizes, known, **options):
    """All active, to the bit."""
    expected = states(dense, sizes, known, **options)
    found = states(mod, sizes, known, force="active", **options)
    for name, a, b in zip(("last", "inputs", "logits"), found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert LAST not in known or np.abs(expected[0]).min(axis=1).all()


@pytest.mark.parametrize("cut", [{"n_ubatch": 16}, {"n_ubatch": 512}])
@pytest.mark.parametrize("masked", [False, True])
def test_all_active_is_dense(files, cut, masked):
    """Also where few rows are output, and token by token."""
    dense, mod, known = files
    some = [int(i % 4 == 1 or i > 40) for i in range(N)]
    check_same(dense, mod, [40, *[1] * 15, 5], known, logits=some, masked=masked, **cut)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name, tmp_path):
    """What the last layer of mimo2 and nemotron_h puts out was refused as unknown."""
    check_same(*write(name, tmp_path / "mod.gguf"), [50, *[1] * 5, 5], OTHERS[name], n_ubatch=16)


def test_cuts_change_nothing(files):
    """In segments that are cut at kv units, or not, in one graph, and in ubatches."""
    _, mod, known = files
    whole = states(mod, [N], known)
    forced = states(mod, [N], known, force="active")
    assert np.abs(whole[2] - forced[2]).max() > 50 * NOISE  # units decide
    for sizes, cut in (([20, *[1] * 40], {}), ([5] * 12, {}), ([N], {"n_ubatch": 7})):
        for a, b in zip(states(mod, sizes, known, **cut), whole, strict=True):
            np.testing.assert_allclose(a, b, atol=NOISE, rtol=NOISE)
