"""KV memory of the patched runtime: cells, bytes, states, tails, copies, shifts, full caches."""

import ctypes

import llama_cpp
import numpy as np
import pytest

from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import kv_layers
from mod_export.runtime import bindings
from mod_export.runtime.log import kept_log
from tests.support.architectures.memory import BIASED, WITHOUT_V
from tests.support.c_api import F16, Q8_0, Raw, aborting
from tests.support.oracle import (
    CASES,
    TOKENS,
    WINDOWED,
    N,
    cells,
    check_cells,
    close,
    expected_cells,
    kept,
    make,
    parts,
    restore,
    save,
    without_origins,
)

CACHED = [case for case in CASES if case != "ffn"]  # ffn units have no influence on KV
# with windows of layers, whose cells are freed in any case, and with K alone in the cells
FREEING = [*CACHED, *WINDOWED, *WITHOUT_V]


def write(case, tmp_path_factory):
    tiny = make(case)
    path = tiny.write(tmp_path_factory.mktemp("routed") / "mod.gguf")
    return tiny, path, tiny.forward(TOKENS[0])


@pytest.fixture(scope="module", params=FREEING)
def routed(request, tmp_path_factory):
    """(the model, its file, the oracle's results for TOKENS[0])"""
    return write(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=[*CACHED, *WITHOUT_V, *BIASED])
def forgetful(request, tmp_path_factory):
    """The same without sliding layers: only inactive units make it free cells."""
    return write(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def kv_model(tmp_path_factory):
    tiny = make("kv")
    return tiny, tiny.write(tmp_path_factory.mktemp("kv") / "mod.gguf"), tiny.forward(TOKENS[0])


# --- cells and bytes


@pytest.mark.parametrize("rollback", [0, 5, 64])
def test_cells_are_what_trace_and_window_say(routed, rollback):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start, n_ctx=256) as r:
        check_cells(r, tiny, expected.active, rollback)


def test_freed_cells_are_used_again(kv_model, tmp_path):
    """A long text in a small window: the cells in use stay exact, and memory stays at what they
    need.
    """
    tiny = make("kv", 0.1, n_ctx=8192)
    tokens = np.resize(TOKENS[0], 3000)
    with Raw(tiny.write(tmp_path / "mod.gguf"), n_ctx=4096, n_ubatch=128, fa=True, kv=F16) as r:
        r.set(kv_rollback=16)
        active = []
        for i in range(0, len(tokens), 100):
            r.decode(tokens[i : i + 100], logits=[0] * 99 + [1])
            active.append(r.trace()[0])
            assert cells(r) == expected_cells(tiny, np.concatenate(active), i + 100, 16)
        layer = r.kv(1)
        # one batch is stored before it is forgotten, and the rest lies scattered between what stays
        assert layer.n_used < 1000
        assert (
            layer.bytes_committed < 2 * (layer.n_used + 128 + 100) * layer.bytes_per_cell + 4 * 4096
        )


def test_bytes_follow_what_is_stored(routed):
    tiny, path, _ = routed
    with Raw(path, start=tiny.start, n_ctx=65536, fa=True, kv=F16) as r:
        empty = r.kv()
        per_token = [layer.bytes_per_token for layer in kv_layers(GGUFFile.open(path))]
        assert empty.bytes_per_cell == sum(per_token)
        assert empty.bytes_reserved >= 65536 * empty.bytes_per_cell
        assert empty.bytes_committed < empty.bytes_reserved / 50
        r.decode(TOKENS[0])
        kv, layers = r.kv(), [r.kv(layer) for layer in range(tiny.n_layer)]
        assert kv.n_used == sum(x.n_used for x in layers)
        assert [x.bytes_used for x in layers] == [
            x.n_used * per_token[i] // parts(tiny, i) for i, x in enumerate(layers)
        ]
        assert kv.bytes_used == sum(x.bytes_used for x in layers)
        assert kv.bytes_used <= kv.bytes_committed < kv.bytes_reserved / 20
        assert r.kv(99) is None


def test_committed_bytes_are_resident_memory(tmp_path):
    """A context of a million cells costs what is stored, measured at the operating system."""
    tiny = make("kv", n_ctx=1 << 20)
    path = tiny.write(tmp_path / "mod.gguf")

    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    before = resident()
    with Raw(path, n_ctx=1 << 19, n_seq=1, fa=True, kv=F16) as r:
        r.decode(TOKENS[0])
        reserved = r.kv().bytes_reserved
        assert reserved > 600e6
        assert resident() - before < reserved / 4


# --- tails


@pytest.mark.parametrize("back", [1, 20, 64])
def test_a_tail_within_the_margin_is_taken_back_exactly(routed, back):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[0][:100])
        assert r.seq_rm(0, 100 - back)
        # the same tokens again, then others
        close(r.decode(TOKENS[0][100 - back : 120]), expected.logits[100 - back : 120], tiny.noise)
        assert cells(r) == expected_cells(tiny, expected.active, 120)
        assert r.seq_rm(0, 120 - back)
        other = [*TOKENS[0][: 120 - back], *TOKENS[1][:30]]
        again = tiny.forward(other)
        logits = r.decode(TOKENS[1][:30])
        sure = (
            (r.trace()[0] == again.active[-30:]).all(1).cumprod().astype(bool)
        )  # no gaps were placed for these
        assert sure[0]
        close(logits[sure], again.logits[-30:][sure], tiny.noise)


def test_a_longer_tail_is_refused_and_nothing_changes(kv_model):
    tiny, path, expected = kv_model
    with Raw(path) as r:
        r.set(kv_rollback=10)
        r.decode(TOKENS[0][:100])
        before = cells(r)
        assert not r.seq_rm(0, 89)
        assert not r.seq_rm(0, 1)
        assert cells(r) == before
        close(r.decode(TOKENS[0][100:]), expected.logits[100:])
        assert r.seq_rm(0, N - 10)
        # what is left of the margin is used up
        assert not r.seq_rm(0, N - 11)
        close(r.decode(TOKENS[0][N - 10 :]), expected.logits[N - 10 :])
        assert r.seq_rm(0, 0)  # the whole sequence always goes
        assert not any(cells(r))
        close(r.decode(TOKENS[0]), expected.logits)


def test_any_tail_is_exact_without_kv_units(tmp_path):
    tiny = make("attn+ffn")
    expected = tiny.forward(TOKENS[0])
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        r.decode(TOKENS[0])
        assert r.seq_rm(0, 3)
        close(r.decode(TOKENS[0][3:]), expected.logits[3:])


def test_a_larger_rollback_later_does_not_promise_what_is_gone(kv_model):
    _, path, expected = kv_model
    with Raw(path) as r:
        r.set(kv_rollback=4)
        r.decode(TOKENS[0][:100])
        r.set(kv_rollback=64)
        assert not r.seq_rm(0, 60)
        assert r.seq_rm(0, 96)
        close(r.decode(TOKENS[0][96:]), expected.logits[96:])


def test_removing_a_sequence_leaves_the_other(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        for seq in (0, 1):
            r.decode(TOKENS[seq][:100], [seq] * 100)
        both = cells(r)
        assert r.seq_rm(1, 0)
        assert cells(r) == expected_cells(tiny, expected.active, 100)
        assert sum(both) > sum(cells(r))
        close(r.decode(TOKENS[0][100:]), expected.logits[100:], tiny.noise)


# --- copies, keeping, shifting


def test_a_copied_sequence_goes_its_own_way(routed):
    tiny, path, expected = routed
    other = np.concatenate([TOKENS[0][:100], TOKENS[1][:40]])
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[0][:100])
        before = cells(r)
        r.seq_cp(0, 1)
        assert cells(r) == before  # cells are shared
        logits = r.decode([*TOKENS[1][:40], *TOKENS[0][100:140]], [1] * 40 + [0] * 40)
        active = r.trace()[0][:40]
        close(logits[40:], expected.logits[100:140], tiny.noise)
        again = tiny.forward(other)
        sure = (active == again.active[100:]).all(1).cumprod().astype(bool)
        assert sure[0]
        close(logits[:40][sure], again.logits[100:][sure], tiny.noise)
        llama_cpp.llama_memory_seq_keep(r.mem, 0)
        assert cells(r) == expected_cells(tiny, expected.active, 140)
        close(r.decode(TOKENS[0][140:]), expected.logits[140:], tiny.noise)


def test_moving_a_sequence_changes_nothing_but_positions(routed):
    """Rotary positions are relative, so the same text further on gives the same logits."""
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[0][:100])
        assert r.can_shift() is not tiny.window.chunked  # tokens would get into other chunks
        if tiny.window.chunked:
            return
        before = cells(r)
        r.seq_add(0, 0, -1, 11)
        assert r.seq_pos(0)[1] == 110
        logits = r.decode(TOKENS[0][100:], pos=np.arange(111, 111 + N - 100))
        assert cells(r) >= before
    close(logits, expected.logits[100:], 4 * tiny.noise)


def test_context_shift_equals_dense_when_all_is_active(forgetful, tmp_path):
    tiny, path, _ = forgetful
    with Raw(tiny.dense().write(tmp_path / "dense.gguf")) as dense, Raw(path) as r:
        r.set(force="active")
        results = []
        for x in (dense, r):
            x.decode(TOKENS[0][:100])
            assert llama_cpp.llama_memory_seq_rm(x.mem, 0, 4, 44)
            llama_cpp.llama_memory_seq_add(x.mem, 0, 44, -1, -40)
            assert llama_cpp.llama_memory_seq_pos_max(x.mem, 0) == 59
            results.append(x.decode(TOKENS[0][100:130], pos=np.arange(60, 90)))
        assert cells(r) == [90 * parts(tiny, i) for i in range(tiny.n_layer)]
        np.testing.assert_array_equal(*results)


def test_context_shift_of_routed_layers(routed):
    """Cells in the removed range go, the others stay; what follows does not depend on the cut."""
    tiny, path, expected = routed
    results = []
    for size in (30, 1):
        with Raw(path, start=tiny.start) as r:
            if tiny.window.chunked:
                return
            r.set(kv_rollback=0)
            r.decode(TOKENS[0][:100])
            assert r.seq_rm(0, 4, 44)
            r.seq_add(0, 44, -1, -40)
            held = [kept(tiny, i, expected.active, 100, 0) for i in range(tiny.n_layer)]
            assert cells(r) == [x.sum() - x[4:44].sum() for x in held]
            r.pos[0] = 60
            results.append(r.decode_cut(TOKENS[0][100:130], size)[0])
    close(*results, 4 * tiny.noise)


@pytest.mark.parametrize(
    ("case", "can"), [("gemma3", True), ("deepseek2-heads", False), ("kv", False)]
)
def test_quantised_k_is_moved_where_it_was_stored_rotated(case, can, tmp_path):
    """llama.cpp takes it for rotated in any case, which destroys the K of MLA, and crashes where
    the size of a head is no multiple of 64.
    """
    path = make(case).write(tmp_path / "mod.gguf")
    with Raw(path, fa=True, kv=F16) as r:
        assert r.can_shift()
    with Raw(path, fa=True, kv=Q8_0) as r:
        assert r.can_shift() is can


def test_dividing_positions_equals_dense_when_all_is_active(forgetful, tmp_path):
    tiny, path, _ = forgetful
    with Raw(tiny.dense().write(tmp_path / "dense.gguf")) as dense, Raw(path) as r:
        r.set(force="active")
        results = []
        for x in (dense, r):
            x.decode(TOKENS[0][:100])
            llama_cpp.llama_memory_seq_div(x.mem, 0, 20, 100, 2)
            top = llama_cpp.llama_memory_seq_pos_max(x.mem, 0)
            results.append(x.decode(TOKENS[0][100:110], pos=np.arange(top + 1, top + 11)))
        np.testing.assert_array_equal(*results)


def test_clear(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[1])
        r.clear()
        assert not any(cells(r))
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 0) == -1
        close(r.decode(TOKENS[0]), expected.logits, tiny.noise)


# --- states


def test_whole_state_round_trip(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode([*TOKENS[0][:100], *TOKENS[1][:60]], [0] * 100 + [1] * 60)
        data, held = save(r), cells(r)
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[2])  # something else is there before
        assert restore(r, data) == len(data)
        assert cells(r) == held
        r.pos = {0: 100, 1: 60}
        close(r.decode(TOKENS[0][100:]), expected.logits[100:], tiny.noise)
        close(r.decode(TOKENS[1][60:], [1] * 90), tiny.forward(TOKENS[1]).logits[60:], tiny.noise)
        assert r.seq_rm(1, 0)
        assert cells(r) == expected_cells(tiny, expected.active, N)  # decisions came with the state


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_in_the_place_of_a_longer_text(kv_model, whole):
    """Tensors that grow shrank behind the state, which was written to those from before."""
    _, path, expected = kv_model
    with Raw(path, n_ctx=2048) as r:
        r.decode(TOKENS[0][:100])
        data = save(r) if whole else save_sequence(r, 0)
        r.decode(np.tile(TOKENS[1], 6), pos=np.arange(100, 1000))
        assert (restore(r, data) if whole else restore_sequence(r, data, 0)) == len(data)
        r.pos = {0: 100}
        close(r.decode(TOKENS[0][100:]), expected.logits[100:])


@pytest.mark.parametrize("back", [8, 64])
def test_a_restored_tail_is_taken_back_as_before(kv_model, back):
    _, path, expected = kv_model
    with Raw(path) as r:
        r.set(kv_rollback=8)
        r.decode(TOKENS[0][:100])
        data = save(r)
    with Raw(path) as r:
        assert restore(r, data) == len(data)
        r.pos = {0: 100}
        assert r.seq_rm(0, 100 - back) == (back == 8)
        n = r.pos[0]
        close(r.decode(TOKENS[0][n:]), expected.logits[n:])


def test_one_sequence_round_trip_to_another_id(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode([*TOKENS[0][:100], *TOKENS[1][:60]], [0] * 100 + [1] * 60)
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(r.ctx, 0))()
        n = llama_cpp.llama_state_seq_get_data(r.ctx, buffer, len(buffer), 0)
        assert n > 0
        assert llama_cpp.llama_state_seq_set_data(r.ctx, buffer, n, 3) == n
        close(
            r.decode(TOKENS[0][100:], [3] * 50, pos=np.arange(100, N)),
            expected.logits[100:],
            tiny.noise,
        )
        close(r.decode(TOKENS[1][60:], [1] * 90), tiny.forward(TOKENS[1]).logits[60:], tiny.noise)
        close(r.decode(TOKENS[0][100:]), expected.logits[100:], tiny.noise)


def test_state_files(routed, tmp_path):
    tiny, path, expected = routed
    file, tokens = (
        str(tmp_path / "state.bin").encode(),
        (llama_cpp.llama_token * 100)(*TOKENS[0][:100].tolist()),
    )
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[0][:100])
        assert llama_cpp.llama_state_save_file(r.ctx, file, tokens, 100)
        assert llama_cpp.llama_state_seq_save_file(r.ctx, file + b"1", 0, tokens, 100)
    count, back = ctypes.c_size_t(), (llama_cpp.llama_token * 200)()
    for whole in (True, False):
        with Raw(path, start=tiny.start) as r:
            if whole:
                assert llama_cpp.llama_state_load_file(r.ctx, file, back, 200, ctypes.byref(count))
            else:
                assert llama_cpp.llama_state_seq_load_file(
                    r.ctx, file + b"1", 0, back, 200, ctypes.byref(count)
                )
            assert back[: count.value] == TOKENS[0][:100].tolist()
            r.pos = {0: 100}
            close(r.decode(TOKENS[0][100:]), expected.logits[100:], tiny.noise)


# --- states know what made them


def set_threshold(r):
    assert bindings.llama_mod_set_threshold(r.ctx, 0, 0.7) == 0


CHANGES = {
    "shift": (lambda r: r.set(shift=0.8), "made with threshold shift 0, the context has 0.8"),
    "force": (lambda r: r.set(force="active"), "made with force none, the context has active"),
    "threshold": (set_threshold, "made with other thresholds"),
    "control vector": (lambda r: set_vector(r, 1.0), "made with other adapters"),
}


def set_vector(r, scale: float):
    """A control vector, scale * (1, 1, ...) in all layers; 0: none."""
    data = (ctypes.c_float * (4 * r.n_embd))(*[scale] * (4 * r.n_embd))
    n = len(data) if scale else 0
    assert llama_cpp.llama_set_adapter_cvec(r.ctx, data if n else None, n, r.n_embd, 1, 4) == 0


def save_sequence(r, seq: int) -> bytes:
    buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(r.ctx, seq))()
    n = llama_cpp.llama_state_seq_get_data(r.ctx, buffer, len(buffer), seq)
    return bytes(buffer[:n])


def restore_sequence(r, data: bytes, seq: int) -> int:
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    return llama_cpp.llama_state_seq_set_data(r.ctx, buffer, len(data), seq)


def loaders(r, folder):
    """The ways to load the state of sequence 0, saved now: functions of a context."""
    file, tokens = str(folder / "state").encode(), (llama_cpp.llama_token * 100)()
    assert llama_cpp.llama_state_save_file(r.ctx, file, tokens, 100)
    assert llama_cpp.llama_state_seq_save_file(r.ctx, file + b"1", 0, tokens, 100)
    data, sequence, count = save(r), save_sequence(r, 0), ctypes.c_size_t()

    def load_file(other):
        return llama_cpp.llama_state_load_file(other.ctx, file, tokens, 100, ctypes.byref(count))

    def load_sequence_file(other):
        return llama_cpp.llama_state_seq_load_file(
            other.ctx, file + b"1", 0, tokens, 100, ctypes.byref(count)
        )

    return [
        lambda other: restore(other, data),
        lambda other: restore_sequence(other, sequence, 0),
        load_file,
        load_sequence_file,
    ]


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_other_settings_is_refused_in_one_line_and_changes_nothing(
    kv_model, tmp_path, change
):
    """Whole states and those of a sequence, in memory and in files."""
    _, path, _ = kv_model
    make_other, why = CHANGES[change]
    with Raw(path) as r, Raw(path) as other:
        r.decode(TOKENS[0][:100])
        ways = loaders(r, tmp_path)
        make_other(other)
        expected = other.decode(TOKENS[0])
        other.clear()
        other.decode(TOKENS[0][:100])
        before = cells(other)
        for load in ways:
            with kept_log() as log:
                assert not load(other)
            assert len(log) == 1 and log[0].endswith(why)
            assert cells(other) == before
        close(other.decode(TOKENS[0][100:]), expected[100:])
        # what made the state is told by its tokens, not by the context that writes it
        make_other(r)
        for load in loaders(r, tmp_path):
            assert not load(other)
        r.clear()
        r.decode(TOKENS[0][:100])
        for load in loaders(r, tmp_path):
            assert load(other)


def test_settings_that_decide_nothing_do_not_count(kv_model):
    """A shift and thresholds under a force, and what was set back before the next token."""
    _, path, _ = kv_model
    with Raw(path) as r, Raw(path) as other:
        r.set(force="active", shift=0.5)
        r.decode(TOKENS[0][:100])
        other.set(force="active")
        set_threshold(other)
        assert restore(other, save(r))
        r.clear()
        r.set(force="none", shift=0.0)
        r.decode(TOKENS[0][:60])
        r.set(shift=3.0, kv_rollback=5)
        set_vector(r, 1.0)
        set_vector(r, 0.0)
        r.set(shift=0.0)
        r.decode(TOKENS[0][60:100])
        with Raw(path) as third:
            assert restore(third, save(r))


def test_a_sequence_of_two_settings_makes_no_state_until_it_is_empty(kv_model):
    _, path, expected = kv_model
    with Raw(path) as r:
        r.decode([*TOKENS[0][:60], *TOKENS[1][:60]], [0] * 60 + [1] * 60)
        r.set(shift=0.8)
        r.decode(TOKENS[0][60:100])
        for shift in (0.0, 0.8):
            r.set(shift=shift)
            for data, seq in ((save_sequence(r, 0), 0), (save(r), -1)):
                with kept_log() as log:
                    assert not (restore(r, data) if seq < 0 else restore_sequence(r, data, seq))
                assert "processed with different thresholds" in log[0]
        # the other sequence is of one setting
        assert not restore_sequence(r, save_sequence(r, 1), 1)
        r.set(shift=0.0)
        assert restore_sequence(r, save_sequence(r, 1), 1)
        # a copy onto other tokens mixes as well, and a copy alone is what its source is
        llama_cpp.llama_memory_seq_cp(r.mem, 1, 2, -1, -1)
        llama_cpp.llama_memory_seq_cp(r.mem, 0, 3, -1, -1)
        assert restore_sequence(r, save_sequence(r, 2), 2)
        assert not restore_sequence(r, save_sequence(r, 3), 3)
        assert r.seq_rm(0, 0)
        r.decode(TOKENS[0][:100])
        assert restore_sequence(r, save_sequence(r, 0), 0)
        close(r.decode(TOKENS[0][100:]), expected.logits[100:])


def test_a_failed_decode_mixes_nothing(kv_model):
    _, path, expected = kv_model
    with Raw(path, n_ctx=256) as r:
        r.decode(TOKENS[0][:120])
        r.decode(TOKENS[1][:120], [1] * 120)
        r.set(shift=0.8)
        assert r.try_decode(TOKENS[0][120:]) == 1  # no free cell
        with aborting(r, 40):
            assert r.try_decode(TOKENS[0][120:130]) == 2
        r.set(shift=0.0)
        assert restore_sequence(r, save_sequence(r, 0), 0)
        close(r.decode(TOKENS[0][120:130]), expected.logits[120:130])


def test_other_models_types_and_formats_are_refused(kv_model, tmp_path):
    tiny, path, _ = kv_model
    other = make("kv", seed=1).write(tmp_path / "other.gguf")
    dense = tiny.dense().write(tmp_path / "dense.gguf")
    with Raw(path) as r:
        r.decode(TOKENS[0][:100])
        data = save(r)
    at = data.index(b"MoDS")
    older = without_origins(data, header=False)
    for file, params, state, why in (
        (other, {}, data, "belongs to another model"),
        (path, {"kv": F16}, data, "K/V of another type"),
        (path, {"fa": True, "kv": F16}, data, "K/V of another type"),
        (path, {"rope_freq_base": 20000.0}, data, "other RoPE parameters"),
        (path, {}, older, "has another format"),
        (path, {}, data[:at] + b"MoDS\1" + data[at + 5 :], "has another format"),
        (dense, {}, data, "n_stream mismatch"),
    ):
        with Raw(file, **params) as r:
            with kept_log() as log:
                assert restore(r, state) == 0
            assert len(log) == 1 and why in log[0], log
            r.decode(TOKENS[0][:100])


def test_a_broken_state_is_refused_and_the_context_still_works(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[0][:100])
        data = save(r)
    for keep in (0.3, 0.6, 0.9, 0.99):
        with Raw(path, start=tiny.start) as r:
            assert restore(r, data[: int(len(data) * keep)]) == 0
            r.clear()
            assert not any(cells(r))
            close(r.decode(TOKENS[0]), expected.logits, tiny.noise)


# --- full


def test_a_decode_without_free_cells_returns_1_and_leaves_the_state(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start, n_ctx=256) as r:
        r.decode(TOKENS[0][:120])
        for i in (1, 2, 3):
            r.decode(TOKENS[i][:40], [i] * 40)  # 240 of 256 cells
        before = cells(r)
        assert r.try_decode(TOKENS[0][120:]) == 1
        assert cells(r) == before
        assert r.seq_pos(0)[1] == 119
        close(r.decode(TOKENS[0][120:130]), expected.logits[120:130], tiny.noise)
        assert r.seq_rm(3, 0)
        close(r.decode(TOKENS[0][130:]), expected.logits[130:], tiny.noise)


def test_full_in_the_middle_of_a_batch_of_several_ubatches(routed):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start, n_ctx=256, n_ubatch=16) as r:
        r.decode(TOKENS[0][:100])
        r.decode(TOKENS[1][:100], [1] * 100)
        before = cells(r)
        assert r.try_decode([*TOKENS[0][100:150], *TOKENS[2][:50]], [0] * 50 + [2] * 50) == 1
        assert cells(r) == before
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 2) == -1
        close(r.decode(TOKENS[0][100:]), expected.logits[100:], tiny.noise)
