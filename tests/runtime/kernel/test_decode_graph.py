"""One token as the graph that devices run (LLAMA_MOD_DECODE=graph), on the CPU: routers decide by
ggml_mod_route().
"""

import ctypes

import numpy as np
import pytest

from mod_export.runtime import bindings
from tests.support.c_api import Raw
from tests.support.oracle import CASES, TOKENS, N, close, make


@pytest.fixture
def device_graph(monkeypatch):
    monkeypatch.setenv("LLAMA_MOD_DECODE", "graph")


@pytest.mark.parametrize("scale", [False, True], ids=["hard", "scaled"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(case, scale, device_graph, tmp_path):
    """Behind a prompt, so that segments and this graph share the cells."""
    tiny = make(case, scale_output=scale)
    expected = tiny.forward(TOKENS[0])
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        logits, active = r.decode_cut(TOKENS[0][:50], 50)
        single, single_active = r.decode_cut(TOKENS[0][50:], 1)
        used = r.kv().n_used
    np.testing.assert_array_equal(np.concatenate([active, single_active]), expected.active)
    noise = 3e-4 * max(1.0, np.abs(expected.logits).std())
    close(np.concatenate([logits, single]), expected.logits, noise)
    assert used > 0


@pytest.mark.parametrize("fa", [False, True])
def test_takes_the_same_cells_as_the_cpu_graph(fa, tmp_path, monkeypatch):
    path = make("all").write(tmp_path / "mod.gguf")
    results = []
    for mode in (None, "graph"):
        if mode:
            monkeypatch.setenv("LLAMA_MOD_DECODE", mode)
        with Raw(path, fa=fa) as r:
            logits, active = r.decode_cut(TOKENS[0], 1)
            results.append((logits, active, [r.kv(layer).n_used for layer in range(5)]))
    (a, a_active, a_used), (b, b_active, b_used) = results
    assert a_used == b_used
    np.testing.assert_array_equal(a_active, b_active)
    close(a, b, 1e-2 if fa else 3e-4)


@pytest.mark.parametrize("fa", [False, True])
def test_is_built_anew_for_the_complete_layers_only(fa, tmp_path, monkeypatch):
    """Each cache passes multiples of 256 cells at times of its own; the graph has room for more."""
    n = 1100
    tokens = np.random.default_rng(1).integers(0, 96, (1, n))
    path = make("all", sequences=tokens).write(tmp_path / "mod.gguf")
    results = []
    for mode in (None, "graph"):
        if mode:
            monkeypatch.setenv("LLAMA_MOD_DECODE", mode)
        with Raw(path, fa=fa, n_ctx=1280) as r:
            logits, active = r.decode_cut(tokens[0], 1)
            perf = bindings.llama_mod_perf()
            assert bindings.llama_mod_get_perf(r.ctx, ctypes.byref(perf))
            results.append((logits, active, [r.kv(layer).n_used for layer in range(5)]))
    (a, a_active, a_used), (b, b_active, b_used) = results
    assert a_used == b_used and sum(used > 256 for used in a_used) >= 3
    np.testing.assert_array_equal(a_active, b_active)
    close(a, b, 1e-2 if fa else 3e-4)
    # Tensors grow too where there is no flash attention, each at a time of its own.
    assert perf.n_graphs == n and (not fa or n - perf.n_graphs_reused == 1 + n // 256)


def test_forced_active_is_the_dense_model(device_graph, tmp_path):
    """Without gates."""
    tiny = make("all", scale_output=True)
    with (
        Raw(tiny.dense().write(tmp_path / "dense.gguf")) as dense,
        Raw(tiny.write(tmp_path / "mod.gguf")) as r,
    ):
        r.set(force="active")
        for token in TOKENS[0][:40, None]:
            close(r.decode(token), dense.decode(token))
            assert r.trace()[0].all()


def test_forced_inactive(device_graph, tmp_path):
    """Sinks too."""
    tiny = make("all")
    expected = tiny.forward(TOKENS[0][:40], force="inactive").logits
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        r.set(force="inactive")
        logits, active = r.decode_cut(TOKENS[0][:40], 1)
    assert not active.any()
    close(logits, expected, 3e-4 * max(1.0, np.abs(expected).std()))


def test_taking_back_a_tail(device_graph, tmp_path):
    tiny = make("all")
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        logits, _ = r.decode_cut(TOKENS[0], 1)
        assert r.seq_rm(0, N - 20)
        again, _ = r.decode_cut(TOKENS[0][N - 20 :], 1)
    close(again, logits[N - 20 :])


def test_unknown_values_are_refused(tmp_path, monkeypatch):
    path = make("kv").write(tmp_path / "mod.gguf")
    monkeypatch.setenv("LLAMA_MOD_DECODE", "segments")
    with pytest.raises(AssertionError, match="cannot create the context"):
        Raw(path)
