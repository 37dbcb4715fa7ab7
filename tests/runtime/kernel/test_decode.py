"""The patched runtime on tiny random models: what it computes, against the numpy oracle and dense
models.
"""

import ctypes

import llama_cpp
import numpy as np
import pytest

from mod_export.runtime import bindings
from mod_export.units import kind_of_c_value
from tests.support.c_api import F16, F32, Q8_0, Raw
from tests.support.oracle import (
    CASES,
    NOISE,
    TOKENS,
    N,
    close,
    make,
)
from tests.support.tiny_gguf import Tiny


@pytest.fixture(scope="module", params=CASES)
def routed(request, tmp_path_factory):
    """(the model, its file, the oracle's results for TOKENS[0])"""
    tiny = make(request.param)
    path = tiny.write(tmp_path_factory.mktemp("routed") / "mod.gguf")
    return tiny, path, tiny.forward(TOKENS[0])


def test_matches_the_oracle(routed):
    tiny, path, expected = routed
    with Raw(path) as r:
        logits = r.decode(TOKENS[0])
        active, score = r.trace()
    assert 0.2 < expected.active.mean() < 0.8
    np.testing.assert_array_equal(active, expected.active)
    close(score, expected.score, 1e-4)
    close(logits, expected.logits)


@pytest.mark.parametrize("graph", [False, True], ids=["segments", "graph"])
def test_a_score_at_the_threshold_is_active(graph, tmp_path, monkeypatch):
    """The rule is >=. The logit of p = 0.5 is 0, which a router of zeros gives exactly."""
    if graph:
        monkeypatch.setenv("LLAMA_MOD_DECODE", "graph")
    tiny = make("all", sink_tokens=0)
    for unit, (weight, _, _) in tiny.routers.items():
        tiny.routers[unit] = (np.zeros_like(weight), 0.0, 0.5)
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        r.decode(TOKENS[0][:20])
        many, score = r.trace()
        r.decode(TOKENS[0][20:21])
        one, _ = r.trace()
    assert not score.any() and many.all() and one.all()


@pytest.mark.parametrize(
    "shape",
    [
        {"n_head_kv": 4},
        {"n_head_kv": 1},
        {"tied": True},
        {"scale_output": True},
        {"sink_tokens": 0},
        {"kv_window": 1},
        {"kv_window": 200},
    ],
    ids=str,
)
def test_shapes_and_options(shape, tmp_path):
    tiny = make("all", **shape)
    expected = tiny.forward(TOKENS[1])
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        logits, active = r.decode_cut(TOKENS[1], 50)
    np.testing.assert_array_equal(active, expected.active)
    close(logits, expected.logits, NOISE * np.abs(expected.logits).std())


@pytest.mark.parametrize(("n_ubatch", "cut"), [(512, 37), (32, N), (1, N), (7, 20), (2048, 1)])
def test_results_do_not_depend_on_how_the_prompt_is_cut(routed, n_ubatch, cut):
    _, path, expected = routed
    with Raw(path, n_ubatch=n_ubatch) as r:
        logits, active = r.decode_cut(TOKENS[0], cut)
    np.testing.assert_array_equal(active, expected.active)
    close(logits, expected.logits)


def test_a_single_output_is_the_last_row(routed):
    _, path, expected = routed
    with Raw(path) as r:
        close(r.decode(TOKENS[0], logits=[0] * (N - 1) + [1]), expected.logits[-1:])
        assert len(r.trace()[0]) == N


def test_outputs_of_scattered_tokens(routed):
    _, path, expected = routed
    wanted = np.arange(N) % 7 == 3
    with Raw(path, n_ubatch=64) as r:
        close(r.decode(TOKENS[0], logits=wanted.astype(int)), expected.logits[wanted])


def test_all_active_is_the_dense_model_bit_for_bit(routed, tmp_path):
    tiny, path, _ = routed
    with Raw(tiny.dense().write(tmp_path / "dense.gguf")) as dense, Raw(path) as r:
        r.set(force="active")
        for part in (TOKENS[0][:100], *TOKENS[0][100:110, None], TOKENS[0][110:]):
            np.testing.assert_array_equal(r.decode(part), dense.decode(part))
        assert r.trace()[0].all()


def test_nothing_active_is_the_model_without_the_units(routed, tmp_path):
    tiny, path, _ = routed
    expected = tiny.forward(TOKENS[0], force="inactive").logits
    with Raw(path) as r:
        r.set(force="inactive")
        logits = np.concatenate(
            [r.decode(TOKENS[0][:100]), *(r.decode([t]) for t in TOKENS[0][100:])]
        )
        assert not r.trace()[0].any()
    close(logits, expected)
    if not any(unit.kind == "kv" for unit in tiny.units):  # no dense model forgets
        with Raw(tiny.without(tiny.units).write(tmp_path / "pruned.gguf")) as pruned:
            close(logits, pruned.decode(TOKENS[0]), NOISE)


def test_nothing_active_in_blocks_is_the_pruned_model_bit_for_bit(tmp_path):
    tiny = make("block")
    pruned_file, file = (
        tiny.without(tiny.units).write(tmp_path / "pruned.gguf"),
        tiny.write(tmp_path / "mod.gguf"),
    )
    with Raw(pruned_file) as pruned, Raw(file) as r:
        r.set(force="inactive")
        for part in (TOKENS[0][:100], *TOKENS[0][100:110, None]):
            np.testing.assert_array_equal(r.decode(part), pruned.decode(part))


def test_two_interleaved_sequences_equal_two_runs(routed):
    tiny, path, expected = routed
    tokens, seqs = TOKENS[:2].T.reshape(-1), [0, 1] * N
    with Raw(path) as r:
        parts = [r.decode(tokens[i : i + 90], seqs[i : i + 90]) for i in range(0, 2 * N, 90)]
    logits = np.concatenate(parts)
    close(logits[0::2], expected.logits)
    close(logits[1::2], tiny.forward(TOKENS[1]).logits)


def test_sequences_of_different_length_in_one_batch(routed):
    tiny, path, expected = routed
    with Raw(path) as r:
        r.decode(TOKENS[0][:120])
        logits = r.decode([*TOKENS[0][120:], *TOKENS[1][:30]], [0] * 30 + [2] * 30)
        alone = r.decode([TOKENS[1][30], TOKENS[2][0]], [2, 3])
    close(logits[:30], expected.logits[120:])
    close(logits[30:], tiny.forward(TOKENS[1][:30]).logits)
    close(alone[0], tiny.forward(TOKENS[1][:31]).logits[-1])


def test_thresholds_change_for_the_tokens_from_now_on(routed):
    tiny, path, _ = routed
    shift = np.where(np.arange(N) < 100, 0.0, 0.6)
    expected = tiny.forward(TOKENS[0], shift=shift)
    with Raw(path) as r:
        first = r.decode(TOKENS[0][:100])
        r.set(shift=0.6)
        rest = r.decode(TOKENS[0][100:])
        np.testing.assert_array_equal(r.trace()[0], expected.active[100:])
    assert expected.active[100:].mean() < tiny.forward(TOKENS[0]).active[100:].mean()
    close(np.concatenate([first, rest]), expected.logits)


def test_a_threshold_of_one_unit(tmp_path):
    tiny = make("all")
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        p = [bindings.llama_mod_get_threshold(r.ctx, i) for i in range(len(tiny.units))]
        np.testing.assert_allclose(p, 0.4, rtol=1e-6)
        assert bindings.llama_mod_set_threshold(r.ctx, 2, 0.7) == 0
        tiny.routers[tiny.units[2]][2] = 0.7
        expected = tiny.forward(TOKENS[0])
        close(r.decode(TOKENS[0]), expected.logits)
        np.testing.assert_array_equal(r.trace()[0], expected.active)
        for unit, value, code in (
            (99, 0.5, -2),
            (-1, 0.5, -2),
            (0, 0.0, -3),
            (0, 1.0, -3),
            (0, float("nan"), -3),
        ):
            assert bindings.llama_mod_set_threshold(r.ctx, unit, value) == code
        assert bindings.llama_mod_set_shift(r.ctx, float("inf")) == -3
        assert bindings.llama_mod_set_force(r.ctx, 7) == -3
        assert bindings.llama_mod_set_kv_rollback(r.ctx, -1) == -3


@pytest.mark.parametrize(
    ("fa", "kv", "noise"),
    [(True, F32, 0.1), (True, F16, 0.1), (False, F16, 0.1), (True, Q8_0, 0.6)],
)
def test_flash_attention_and_kv_types(routed, fa, kv, noise):
    """All of them round: few decisions differ, and logits are close until the first one does."""
    _, path, expected = routed
    with Raw(path, fa=fa, kv=kv) as r:
        logits, active = r.decode_cut(TOKENS[0], 60)
    differ = (active != expected.active).any(1)
    n = int(differ.argmax()) if differ.any() else N
    assert (active == expected.active).mean() > 0.98
    assert n >= 10
    close(logits[:n], expected.logits[:n], noise)


@pytest.mark.parametrize("fa", [False, True])
def test_flash_attention_all_active_is_dense(routed, fa, tmp_path):
    tiny, path, _ = routed
    dense = tiny.dense().write(tmp_path / "dense.gguf")
    with Raw(dense, fa=fa, kv=F16) as d, Raw(path, fa=fa, kv=F16) as r:
        r.set(force="active")
        np.testing.assert_array_equal(r.decode(TOKENS[0][:100]), d.decode(TOKENS[0][:100]))
        np.testing.assert_array_equal(r.decode(TOKENS[0][100:101]), d.decode(TOKENS[0][100:101]))


def test_embeddings(routed):
    _, path, expected = routed
    with Raw(path, embeddings=True, n_batch=512) as r:
        assert r.try_decode(TOKENS[0]) == 0
        close(r.embeddings(N), expected.embd)


def test_lora_adapter(routed, tmp_path):
    tiny, path, _ = routed
    merged = tiny.lora(tmp_path / "lora.gguf")
    expected = merged.forward(TOKENS[0])
    with Raw(path) as r:
        plain = r.decode(TOKENS[0][:20])
        r.clear()
        adapter = llama_cpp.llama_adapter_lora_init(r.model, str(tmp_path / "lora.gguf").encode())
        array, scale = (
            (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter),
            (ctypes.c_float * 1)(1.0),
        )
        assert llama_cpp.llama_set_adapters_lora(r.ctx, array, 1, scale) == 0
        logits, active = r.decode_cut(TOKENS[0], 100)
        assert llama_cpp.llama_set_adapters_lora(r.ctx, array, 0, scale) == 0
        r.clear()
        np.testing.assert_array_equal(r.decode(TOKENS[0][:20]), plain)
    # the biases were placed for the model without it, so a decision may lie on its threshold
    differ = (active != expected.active).any(1)
    n = int(differ.argmax()) if differ.any() else N
    assert n > 50
    close(logits[:n], expected.logits[:n], 3 * NOISE)


def test_an_aborted_decode_leaves_the_state_as_before(routed):
    _, path, expected = routed
    with Raw(path) as r:
        r.decode(TOKENS[0][:50])
        before = [(r.kv(i).n_used, r.kv(i).bytes_used) for i in range(5)]
        for wait in (0, 3, 60):
            calls = iter(range(10**9))

            @llama_cpp.ggml_abort_callback
            def abort(_data, wait=wait, calls=calls):
                return next(calls) >= wait

            llama_cpp.llama_set_abort_callback(r.ctx, abort, None)
            assert r.try_decode(TOKENS[0][50:140]) == 2
            llama_cpp.llama_set_abort_callback(
                r.ctx, ctypes.cast(None, llama_cpp.ggml_abort_callback), None
            )
            assert [(r.kv(i).n_used, r.kv(i).bytes_used) for i in range(5)] == before
            assert llama_cpp.llama_memory_seq_pos_max(r.mem, 0) == 49
        close(r.decode(TOKENS[0][50:]), expected.logits[50:])


def test_statistics_count_what_the_trace_shows(routed):
    tiny, path, expected = routed
    with Raw(path) as r:
        r.decode_cut(TOKENS[0], 40)
        stats = bindings.llama_mod_unit_stats()
        for i in range(len(tiny.units)):
            assert bindings.llama_mod_get_unit_stats(r.ctx, i, ctypes.byref(stats))
            assert (stats.n_seen, stats.n_active) == (N, expected.active[:, i].sum())
        assert not bindings.llama_mod_get_unit_stats(r.ctx, len(tiny.units), ctypes.byref(stats))
        perf = bindings.llama_mod_perf()
        assert bindings.llama_mod_get_perf(r.ctx, ctypes.byref(perf))
        assert (perf.n_decode, perf.n_tokens) == (4, N)
        bindings.llama_mod_reset_stats(r.ctx)
        assert (
            bindings.llama_mod_get_unit_stats(r.ctx, 0, ctypes.byref(stats)) and stats.n_seen == 0
        )


def test_decoding_reuses_graphs(routed):
    """Graphs are built anew for new shapes only: n_kv of a cache grows by 256 cells at a time."""
    _, path, _ = routed
    perf = bindings.llama_mod_perf()
    with Raw(path) as r:
        r.decode(TOKENS[0][:100])
        for t in TOKENS[0][100:120]:  # every variant of a segment once
            r.decode([t])
        bindings.llama_mod_reset_stats(r.ctx)
        for t in TOKENS[0][120:]:
            r.decode([t])
        assert bindings.llama_mod_get_perf(r.ctx, ctypes.byref(perf))
    assert perf.n_graphs >= 30
    assert perf.n_graphs_reused >= 0.9 * perf.n_graphs


def test_units_of_the_file(routed):
    tiny, path, _ = routed
    with Raw(path) as r:
        unit = bindings.llama_mod_unit()
        assert bindings.llama_mod_n_units(r.model) == len(tiny.units)
        for i, expected in enumerate(tiny.units):
            assert bindings.llama_mod_get_unit(r.model, i, ctypes.byref(unit))
            assert (unit.layer, kind_of_c_value(unit.kind)) == (expected.layer, expected.kind)
            assert unit.head == (-1 if expected.head is None else expected.head)
            assert unit.window == (tiny.window_of(expected) if expected.kind == "kv" else 0)
            assert (unit.threshold, unit.activation) == (np.float32(0.4), 0.5)
        windows = [tiny.window_of(unit) for unit in tiny.units if unit.kind == "kv"]
        assert bindings.llama_mod_kv_window(r.model) == max(windows, default=0)
        assert bindings.llama_mod_n_sink(r.model) == tiny.sink_tokens


def test_a_dense_model_has_no_units(tmp_path):
    with Raw(Tiny().write(tmp_path / "dense.gguf")) as r:
        r.decode(TOKENS[0])
        assert bindings.llama_mod_n_units(r.model) == 0
        assert r.trace()[0].shape == (0, 0)
        assert bindings.llama_mod_set_shift(r.ctx, 1.0) == -1
        assert r.kv() is None
