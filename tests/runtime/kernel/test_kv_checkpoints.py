"""Checkpoints of sequences: the way back behind what the memory has given back."""

import ctypes
import subprocess

import llama_cpp
import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.runtime import bindings
from tests.support.architectures.memory import WITHOUT_V
from tests.support.c_api import F16, PARTIAL, Raw
from tests.support.oracle import (
    TOKENS,
    N,
    cells,
    close,
    expected_cells,
    make,
    needs_patched,
    restore,
    save,
)

pytestmark = needs_patched

MODELS = ("kv", "attn+ffn+kv", "heads with windows", "gemma3", "llama4", "attn+ffn", *WITHOUT_V)


@pytest.fixture(scope="module", params=MODELS)
def routed(request, tmp_path_factory):
    """(the model, its file, the oracle's results for TOKENS[0])"""
    tiny = make(request.param)
    path = tiny.write(tmp_path_factory.mktemp("routed") / "mod.gguf")
    return tiny, path, tiny.forward(TOKENS[0])


@pytest.fixture(scope="module")
def kv_model(tmp_path_factory):
    tiny = make("kv")
    return tiny, tiny.write(tmp_path_factory.mktemp("kv") / "mod.gguf"), tiny.forward(TOKENS[0])


def seq_stats(r: Raw, seq: int) -> tuple[int, int, int]:
    stats = bindings.get_kv_seq_stats(r.ctx, seq)
    return stats.n_tokens, stats.bytes_used, stats.bytes_dense


@pytest.mark.parametrize("rollback", [0, 64])
def test_what_is_read_again_equals_a_fresh_read(routed, rollback):
    tiny, path, expected = routed
    with Raw(path, start=tiny.start, n_ctx=256) as r:
        r.set(kv_rollback=rollback)
        r.decode(TOKENS[0][:60])
        at_60 = cells(r)
        data = r.checkpoint()
        r.decode(TOKENS[1][:40], [1] * 40)  # another sequence takes free cells
        for token in TOKENS[0][60:]:
            r.decode([token])
        for _ in range(2):  # a checkpoint can be used again
            assert r.go_back(data)
            assert r.seq_rm(0, 60)  # nothing is left to be removed
            assert r.seq_pos(0)[1] == 59
            assert r.seq_rm(1, 0) and cells(r) == at_60
            close(r.decode(TOKENS[0][60:]), expected.logits[60:], tiny.noise)
            assert cells(r) == expected_cells(tiny, expected.active, N, rollback)


def test_the_context_tells_where_a_sequence_cannot_end(routed):
    tiny, path, _ = routed
    with Raw(path, start=tiny.start) as r:
        r.set(kv_rollback=10)
        r.decode(TOKENS[0])
        fixed = r.seq_pos(0)[0]
        if fixed > 0:
            assert not r.seq_rm(0, fixed)
        assert r.seq_rm(0, fixed + 1)
        assert tiny.units == [u for u in tiny.units if u.kind != "kv"] or fixed > 0


def test_the_last_token_may_be_another_one(kv_model):
    """llama-server keeps a checkpoint whose last token was changed, and goes back before it."""
    tiny, path, _ = kv_model
    with Raw(path) as r:
        r.decode(TOKENS[0][:61])
        data = r.checkpoint()
        r.seq_rm(0, 60)
        r.decode(TOKENS[1][60:])
        assert r.go_back(data)
        assert r.seq_pos(0)[1] == 59
        expected = tiny.forward([*TOKENS[0][:60], *TOKENS[2][:20]])
        logits = r.decode(TOKENS[2][:20])
        sure = (r.trace()[0] == expected.active[60:]).all(1).cumprod().astype(bool)
        assert sure[0]
        close(logits[sure], expected.logits[60:][sure])


def _other_tokens(r: Raw) -> None:
    r.seq_rm(0, 0)
    r.decode(TOKENS[1])


def _moved(r: Raw) -> None:
    r.seq_add(0, 40, -1, 3)
    r.seq_add(0, 43, -1, -3)


def _spliced(r: Raw) -> None:
    """The same tokens, some of which were read after other ones."""
    r.seq_rm(0, 0)
    r.decode(TOKENS[0][:60], [1] * 60)
    r.decode([*TOKENS[1][:30], *TOKENS[0][30:60]], [2] * 60)
    r.seq_cp(1, 0, 0, 30)
    r.seq_cp(2, 0, 30, 60)


@pytest.mark.parametrize(
    "change",
    [
        _other_tokens,
        _moved,
        _spliced,
        lambda r: r.seq_rm(0, 0),
        lambda r: r.set(shift=0.5),
        lambda r: r.set(force="active"),
        lambda r: (r.set(shift=0.5), r.decode(TOKENS[2][:5]), r.set(shift=0.0)),
    ],
    ids=["tokens", "moved", "spliced", "removed", "shift", "force", "mixed"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(kv_model, change):
    _, path, _ = kv_model
    with Raw(path) as r:
        r.decode(TOKENS[0][:60])
        data = r.checkpoint()
        r.decode(TOKENS[0][60:])
        change(r)
        before = cells(r), r.seq_pos(0)
        assert not r.go_back(data)
        assert (cells(r), r.seq_pos(0)) == before


def test_damaged_checkpoints_leave_a_context_that_works(routed):
    """What is cut off behind its head is noticed too late: the sequence is gone then."""
    tiny, path, expected = routed
    with Raw(path, start=tiny.start) as r:
        r.decode(TOKENS[1][:50], [1] * 50)
        other = cells(r)
        r.decode(TOKENS[0][:100])
        data = r.checkpoint()
        r.decode(TOKENS[0][100:])
        state = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        for size in (0, 5, 30, len(data) // 2, len(data) - 1):
            fits = bindings.llama_mod_checkpoint_fits(r.ctx, state, size, 0)
            assert fits <= (size >= len(data) // 2)
        assert not r.go_back(save(r))
        assert restore_cut(r, data[:-1]) == 0
        if r.seq_pos(0) == (-1, -1):
            assert cells(r) == other
            r.pos[0] = 0
        assert r.seq_rm(0, 0)
        close(r.decode(TOKENS[0]), expected.logits, tiny.noise)


def restore_cut(r: Raw, data: bytes) -> int:
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    return llama_cpp.llama_state_seq_set_data_ext(r.ctx, buffer, len(data), 0, PARTIAL)


def test_the_size_does_not_follow_the_text(tmp_path):
    tiny = make("heads", 0.3, n_ctx=4096)
    tokens = np.resize(TOKENS[0], 2000)
    with Raw(tiny.write(tmp_path / "mod.gguf"), n_ctx=4096, fa=True, kv=F16) as r:
        sizes = []
        for part in np.split(tokens, 4):
            r.decode(part, logits=[0] * 499 + [1])
            sizes.append(len(r.checkpoint()))
        assert max(sizes) < 1.5 * min(sizes)
        assert r.go_back(r.checkpoint())


def test_a_checkpoint_fits_a_sequence_that_a_state_brought_back(kv_model):
    """llama-server puts a slot's state and its checkpoints into its prompt cache."""
    tiny, path, expected = kv_model
    with Raw(path) as r, Raw(path) as other:
        r.decode(TOKENS[0][:60])
        data = r.checkpoint()
        r.decode(TOKENS[0][60:])
        assert restore(other, save(r))
        assert other.go_back(data)
        close(other.decode(TOKENS[0][60:]), expected.logits[60:])


@pytest.mark.parametrize("whole", [True, False])
def test_tokens_that_wait_to_be_moved_are_moved_before_they_are_written(kv_model, whole):
    """A state held K that was not rotated yet, at positions as if it were."""
    _, path, _ = kv_model
    with Raw(path, n_ctx=512) as r, Raw(path, n_ctx=512) as other:
        r.decode(TOKENS[0][:100])
        r.seq_add(0, 0, -1, 150)
        r.pos[0] = 250
        if whole:
            assert restore(other, save(r))
            other.pos[0] = 250
            close(other.decode(TOKENS[1][:20]), r.decode(TOKENS[1][:20]))
            return
        data = r.checkpoint()
        logits = r.decode(TOKENS[1][:20])
        r.decode(TOKENS[1][20:120])
        assert r.go_back(data)
        close(r.decode(TOKENS[1][:20]), logits)


def test_figures_of_a_sequence(routed):
    tiny, path, _ = routed
    with Raw(path, start=tiny.start, n_ctx=256) as r:
        assert seq_stats(r, 0) == (0, 0, 0)
        assert bindings.get_kv_seq_stats(r.ctx, 99) is None
        r.set(kv_rollback=0)
        r.decode(TOKENS[0][:100])
        one = seq_stats(r, 0)
        assert one[0] == 100
        assert one[1] == r.kv().bytes_used
        assert one[2] == 100 * r.kv().bytes_per_cell
        r.decode(TOKENS[1][:50], [1] * 50)
        assert seq_stats(r, 0) == one
        assert seq_stats(r, 0)[1] + seq_stats(r, 1)[1] == r.kv().bytes_used
        r.seq_cp(0, 2)
        assert seq_stats(r, 2) == one


def test_another_version_of_the_library_is_refused(tmp_path, monkeypatch):
    source = "int llama_mod_n_units(void) { return 0; }"
    for name, code, version in (
        ("old", source, 1),
        ("new", f"{source} int llama_mod_api_version(void) {{ return 3; }}", 3),
    ):
        (tmp_path / f"{name}.c").write_text(code)
        lib = tmp_path / f"{name}.so"
        subprocess.run(["cc", "-shared", "-o", lib, tmp_path / f"{name}.c"], check=True)
        monkeypatch.setattr(bindings._llama, "_lib", ctypes.CDLL(str(lib)))
        with pytest.raises(UserError, match=f"has version {version} of the MoD interface"):
            bindings.check_version()
