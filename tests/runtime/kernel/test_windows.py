"""Layers that attend to a sliding window: results, cells, tails, memory.

Most tests of the K/V memory run on such models too (test_state.py).
"""

import numpy as np
import pytest

from mod_export.runtime import bindings
from tests.support.c_api import F16, F32, Q8_0, Raw, aborting
from tests.support.oracle import TOKENS, WINDOWED, N, cells, check_cells, close, make


@pytest.fixture(scope="module", params=WINDOWED)
def sliding(request, tmp_path_factory):
    """(the model, its file, the oracle's results for TOKENS[0])

    The texts of the model with chunks cross the border between two of them.
    """
    tiny = make(request.param)
    path = tiny.write(tmp_path_factory.mktemp("sliding") / "mod.gguf")
    return tiny, path, tiny.forward(TOKENS[0])


@pytest.mark.parametrize("fa", [False, True])
def test_results_do_not_depend_on_how_a_text_is_cut(sliding, fa):
    tiny, path, expected = sliding
    for size, n_ubatch in ((N, 512), (N, 16), (40, 512), (3, 512), (1, 512)):
        with Raw(path, start=tiny.start, n_ubatch=n_ubatch, fa=fa, kv=F16 if fa else F32) as r:
            logits, active = r.decode_cut(TOKENS[0], size)
        np.testing.assert_array_equal(active, expected.active)
        close(logits, expected.logits, tiny.fa_noise if fa else tiny.noise)


def test_all_active_is_the_dense_model_bit_for_bit(sliding, tmp_path):
    tiny, path, _ = sliding
    dense_path = tiny.dense().write(tmp_path / "dense.gguf")
    with Raw(dense_path, start=tiny.start) as dense, Raw(path, start=tiny.start) as r:
        r.set(force="active")
        for tokens in (TOKENS[0][:70], *TOKENS[0][70:73, None]):  # cells are not yet used again
            np.testing.assert_array_equal(r.decode(tokens), dense.decode(tokens))


@pytest.mark.parametrize("rollback", [0, 5, 64])
def test_cells_are_those_of_the_window(sliding, rollback):
    tiny, path, expected = sliding
    with Raw(path, start=tiny.start, n_ctx=256, n_ubatch=32) as r:
        check_cells(r, tiny, expected.active, rollback)
        held = N - max(0, tiny.window.first(N - rollback))
        own = set(tiny.sliding) - set(tiny.without_kv)
        assert {r.kv(layer).n_used for layer in own} == {held}


def test_the_window_of_a_layer_is_told(sliding, tmp_path):
    tiny, path, _ = sliding
    for file in (path, tiny.dense().write(tmp_path / "dense.gguf")):
        with Raw(file) as r:
            layers = range(-1, tiny.n_layer + 1)
            told = [bindings.llama_mod_layer_window(r.model, i) for i in layers]
        assert told == [tiny.n_swa if i in tiny.sliding else 0 for i in layers]


def test_a_tail_is_refused_only_where_a_window_lacks_keys(sliding):
    tiny, path, expected = sliding
    gone = tiny.window.first(100 - 10) - 1
    end = next(p for p in range(100) if tiny.window.first(p) > gone)
    with Raw(path, start=tiny.start) as r:
        r.set(force="active", kv_rollback=10)  # only the sliding layers free anything
        r.decode(TOKENS[0][:100])
        before = cells(r)
        assert not r.seq_rm(0, end - 1)
        assert cells(r) == before
        assert r.seq_rm(0, end)
        assert not r.seq_rm(0, end - 1)
        r.clear()
        # a text that window and rollback hold whole can end anywhere
        r.set(force="none")
        r.decode(TOKENS[0][:15])
        assert r.seq_rm(0, 1)
        close(r.decode(TOKENS[0][1:]), expected.logits[1:], tiny.noise)


@pytest.mark.parametrize("calls", [1, 10, 60])
def test_a_failed_decode_leaves_all_keys_of_the_window(sliding, calls):
    """Several ubatches of a failed decode have moved the window on, and it comes back."""
    tiny, path, expected = sliding
    with Raw(path, start=tiny.start, n_ubatch=16) as r:
        r.set(kv_rollback=0)
        r.decode(TOKENS[0][:35])  # the border between two chunks comes next
        before = cells(r)
        with aborting(r, calls):
            assert r.try_decode(TOKENS[1][:80]) == 2
        assert cells(r) == before
        close(r.decode(TOKENS[0][35:]), expected.logits[35:], tiny.noise)


def test_memory_stays_at_the_window(tmp_path):
    """A long text costs a sliding layer no more than a short one, in cells, bytes and reading."""
    tiny = make("sliding+kv", 0.1, n_ctx=8192, n_swa=300)
    tokens = np.resize(TOKENS[0], 3000)
    with Raw(tiny.write(tmp_path / "mod.gguf"), n_ctx=65536, fa=True, kv=F16, n_ubatch=256) as r:
        for i in range(0, len(tokens), 500):
            part = tokens[i : i + 500]
            r.decode(part, logits=[0] * (len(part) - 1) + [1])
        for _ in range(3):
            r.decode([1])
        layer = r.kv(1)
        assert layer.n_used == 300 - 1 + 64
        assert layer.bytes_committed <= 1.1 * layer.bytes_used + 2 * 4096
        assert layer.bytes_reserved >= 65536 * layer.bytes_per_cell


def test_quantised_keys_and_several_sequences(sliding):
    """Each sequence has a window of its own; quantised K/V are rotated per group of layers."""
    tiny, path, _ = sliding
    params = {"start": tiny.start, "fa": True, "kv": Q8_0}
    with Raw(path, **params) as one, Raw(path, **params) as two:
        alone = one.decode(TOKENS[0][:100])
        order = [(seq, t) for t in range(100) for seq in ((0, 1) if t >= 60 else (0,))]
        tokens = [TOKENS[0][t] if seq == 0 else TOKENS[1][t - 60] for seq, t in order]
        together = two.decode(tokens, [seq for seq, _ in order])
        close(together[[seq == 0 for seq, _ in order]], alone, tiny.fa_noise)
