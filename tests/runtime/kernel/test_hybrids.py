"""Recurrent layers beside K/V: several sequences, copies, tails, failures, states, checkpoints."""

import contextlib
import ctypes

import llama_cpp
import numpy as np
import pytest

from mod_export.formats import architectures
from mod_export.runtime.llama import MoDLlama
from tests.support.architectures import memory, models, routers
from tests.support.c_api import F32, Raw, aborting
from tests.support.oracle import close, needs_patched

pytestmark = needs_patched

N = 70
TEXTS = np.random.default_rng(5).integers(0, 96, (3, N))


@pytest.fixture(scope="module", params=memory.HYBRIDS)
def hybrid(request, tmp_path_factory):
    """(the model, its file, for each of TEXTS what a context says that reads it alone)"""
    tiny = memory.routed(request.param, list(TEXTS))
    path = tiny.write(tmp_path_factory.mktemp("hybrids") / "mod.gguf")
    return tiny, path, [tiny.forward(tokens) for tokens in TEXTS]


def goes_on(r, tiny, out, tokens, start, seq=0, size=7):
    """The rest of a text gives what it gives where it is read at once."""
    logits, active = r.decode_cut(tokens[start:], size, seq)
    np.testing.assert_array_equal(active, out.active[start : len(tokens)])
    close(logits, out.logits[start : len(tokens)], tiny.noise)


def test_sequences_in_one_batch(hybrid):
    """Prompts of several lengths together, then one token of each, then of some."""
    tiny, path, out = hybrid
    lengths = (40, 23, 31)
    with Raw(path, n_ubatch=16, n_seq=3) as r:
        seqs = np.random.default_rng(1).permutation(np.repeat(np.arange(3), lengths))
        tokens = np.empty(len(seqs), int)
        for s, n in enumerate(lengths):
            tokens[seqs == s] = TEXTS[s, :n]
        logits = r.decode(tokens, seqs.tolist())
        for s, n in enumerate(lengths):
            close(logits[seqs == s], out[s].logits[:n], tiny.noise)
        ends = list(lengths)
        for chosen in ((0, 1, 2), (0, 2), (1,), (2, 0, 1), (0, 1), (0, 1, 2)):
            logits = r.decode([TEXTS[s, ends[s]] for s in chosen], list(chosen))
            for row, s in enumerate(chosen):
                close(logits[row], out[s].logits[ends[s]], tiny.noise)
                ends[s] += 1


@pytest.mark.parametrize("name", models.HYBRIDS)
def test_each_architecture_writes_the_states_of_its_sequences(name, tmp_path):
    """llama.cpp's graph of PLaMo 2 mixed the tokens of sequences, and wrote states elsewhere."""
    (model,) = models.write(tmp_path, [name])
    kinds = architectures.kinds(model.architecture)
    path = routers.route(model, tmp_path / "mod.gguf", routers.units_of(model, kinds))
    expected = []
    for tokens in TEXTS:
        with Raw(path) as r:
            expected.append(np.concatenate([r.decode(tokens[:40]), r.decode(tokens[40:])]))
    ends = [0, 0, 0]
    steps = [((0, 1, 2), 9), ((1, 2), 7), ((2, 0), 5), *[((0, 1, 2), 1)] * 20]
    steps += [((1, 2), 1), ((0, 1), 1), ((1, 2), 3), ((1,), 1), ((0, 2, 1), 1), ((2, 0), 1)]
    with Raw(path, n_seq=3) as r:
        for chosen, n in steps:
            rows = [(s, ends[s] + i) for i in range(n) for s in chosen]
            logits = r.decode([TEXTS[row] for row in rows], [s for s, _ in rows])
            for found, (s, i) in zip(logits, rows, strict=True):
                close(found, expected[s][i], 1e-3 * expected[s].std())
            for s in chosen:
                ends[s] += n


def test_sequences_without_a_state_are_refused(hybrid):
    tiny, path, out = hybrid
    with Raw(path, n_seq=2) as r:
        r.decode(TEXTS[0, :40])
        for seq in (2, 3, 7):
            assert r.try_decode(TEXTS[1, :9], [seq] * 9) != 0
            r.seq_cp(0, seq)
        goes_on(r, tiny, out[0], TEXTS[0], 40)


def test_copies(hybrid):
    tiny, path, out = hybrid
    with Raw(path, n_seq=3) as r:
        r.decode(TEXTS[0, :40])
        r.seq_cp(0, 1)
        goes_on(r, tiny, out[0], TEXTS[0], 40, seq=1)
        goes_on(r, tiny, out[0], TEXTS[0], 40, seq=0)
        assert r.seq_rm(1, 0)
        r.seq_cp(0, 1, 0, 30)  # a state of all tokens, not of 30
        assert r.try_decode(TEXTS[0, 30:31], [1]) != 0
        assert r.seq_rm(1, 0)
        goes_on(r, tiny, out[1], TEXTS[1], 0, seq=1)


def test_a_tail_stays(hybrid):
    tiny, path, out = hybrid
    with Raw(path) as r:
        r.decode(TEXTS[0, :50])
        assert not r.seq_rm(0, 49)
        assert r.seq_pos(0) == (49, 49)
        goes_on(r, tiny, out[0], TEXTS[0], 50)
        assert r.seq_rm(0, 0)
        assert r.seq_pos(0) == (-1, -1)
        goes_on(r, tiny, out[1], TEXTS[1], 0)


@pytest.fixture(scope="module", params=memory.DRAFTED)
def drafted(request, tmp_path_factory):
    """As `hybrid`, of a model that takes tokens of a draft back."""
    tiny = memory.routed(request.param, list(TEXTS))
    path = tiny.write(tmp_path_factory.mktemp("drafted") / "mod.gguf")
    return tiny, path, [tiny.forward(tokens) for tokens in TEXTS]


def test_the_end_of_a_draft_is_taken_back(drafted):
    """As far as there are states: of so many tokens, of the last ubatch, once.

    Beyond, llama.cpp alone takes what lies in the place of such a state.
    """
    tiny, path, (out, *_) = drafted
    with Raw(path, n_rs_seq=8) as r:
        r.decode(TEXTS[0, :40])
        for start in range(40, 60, 4):
            r.decode(np.concatenate([TEXTS[0, start : start + 3], TEXTS[1, :4]]))
            assert r.seq_pos(0) == (start + 6, start + 6)
            assert not r.seq_rm(0, start)
            with aborting(r, 30):
                assert r.try_decode(TEXTS[2, :3]) == 2
            assert r.seq_rm(0, start + 3)
            assert not r.seq_rm(0, start + 2)  # another time
            goes_on(r, tiny, out, TEXTS[0, : start + 4], start + 3)
            assert not r.seq_rm(0, start + 3)
        r.decode(TEXTS[0, 60:69])
        assert not r.seq_rm(0, 60)  # nine
        assert r.seq_rm(0, 61)
        goes_on(r, tiny, out, TEXTS[0], 61)


def test_sequences_that_share_a_state_take_back_each_its_own(drafted):
    """The first one took the position of the shared state along, and the second one kept its end.

    A state of all sequences ended the process then.
    """
    tiny, path, out = drafted
    with Raw(path, n_rs_seq=8, n_seq=3) as r, Raw(path, n_rs_seq=8, n_seq=3) as other:
        r.decode(TEXTS[0, :40])
        for seq in (1, 2):
            r.seq_cp(0, seq)
        for seq, end in ((0, 38), (1, 34)):
            assert r.seq_rm(seq, end)
        whole = save(r)
        assert load(other, whole) == len(whole)
        for context in (r, other):
            context.pos = {0: 38, 1: 34, 2: 40}
            for seq, end in ((2, 40), (1, 34), (0, 38)):
                assert context.seq_pos(seq)[1] == end - 1
                goes_on(context, tiny, out[0], TEXTS[0], end, seq)


def decode_shared(r, tokens) -> int:
    """Decode tokens of several sequences: (token, position, sequences); return the return code."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 3)
    batch.n_tokens = len(tokens)
    for i, (token, at, seqs) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = int(token), at, 1
        batch.n_seq_id[i] = len(seqs)
        for j, seq in enumerate(seqs):
            batch.seq_id[i][j] = seq
    rc = llama_cpp.llama_decode(r.ctx, batch)
    llama_cpp.llama_batch_free(batch)
    return rc


def test_a_token_of_two_sequences_takes_both_back(drafted):
    """The second one of them was taken back again at its next token."""
    tiny, path, out = drafted
    with Raw(path, n_rs_seq=8, n_seq=2) as r:
        r.decode(TEXTS[0, :43])
        assert r.seq_rm(0, 40)
        r.seq_cp(0, 1)
        assert decode_shared(r, [(TEXTS[0, at], at, [0, 1]) for at in range(40, 43)]) == 0
        r.pos = {0: 43, 1: 43}
        goes_on(r, tiny, out[0], TEXTS[0], 43, seq=1)
        goes_on(r, tiny, out[0], TEXTS[0], 43, seq=0)


def test_sequences_that_are_not_kept_leave_nothing_to_take_back(drafted):
    tiny, path, out = drafted
    with Raw(path, n_rs_seq=8, n_seq=2) as r:
        r.decode(np.concatenate([TEXTS[0, :40], TEXTS[1, :40]]), [0] * 40 + [1] * 40)
        assert r.seq_rm(1, 37)
        llama_cpp.llama_memory_seq_keep(r.mem, 0)
        r.pos[1] = 0
        goes_on(r, tiny, out[2], TEXTS[2], 0, seq=1)
        goes_on(r, tiny, out[0], TEXTS[0], 40, seq=0)


def test_what_is_taken_back_is_tokens_not_positions(drafted):
    """Of positions that jump and of positions that images repeat; and none after a shift."""
    _, path, _ = drafted
    with Raw(path, n_rs_seq=8) as r:
        if r.can_shift():
            r.decode(TEXTS[0, :8])
            assert r.seq_rm(0, 4, 6)
            r.seq_add(0, 6, 8, -2)
            assert not r.seq_rm(0, 5)
            return
        r.decode(TEXTS[0, :6], pos=[0, 1, 2, 20, 21, 22])
        assert not r.seq_rm(0, 3)  # ends at 2, where 3 tokens are left, but 20 positions
        assert r.seq_rm(0, 21)
        r.decode(TEXTS[0, :4], pos=[21, 22, 22, 23])
        assert not r.seq_rm(0, 22)
        assert r.seq_rm(0, 23)


def test_a_ubatch_holds_what_can_be_taken_back(drafted):
    """llama.cpp ended the process at the first decode."""
    _, path, _ = drafted
    with pytest.raises(AssertionError, match="cannot create the context"):
        Raw(path, n_rs_seq=8, n_ubatch=9)
    with Raw(path, n_rs_seq=8, n_ubatch=10) as r:
        r.decode(TEXTS[0, :40])
        assert r.seq_rm(0, 32)


def test_more_sequences_than_a_ubatch_has_tokens(hybrid):
    """Upstream's split gave a ubatch one token more than fit into the residual stream."""
    tiny, path, out = hybrid
    for size in (1, 2):
        with Raw(path, n_ubatch=size, n_seq=3) as r:
            for n in range(12):
                logits = r.decode(TEXTS[:, n], [0, 1, 2])
                for s in range(3):
                    close(logits[s], out[s].logits[n], tiny.noise)


def test_embeddings_of_shared_tokens_need_a_batch_of_their_own(hybrid):
    """The state of a sequence took in the tokens of another one that followed in the ubatch."""
    tiny, path, out = hybrid
    shared = [(TEXTS[0, at], at, [0, 1]) for at in range(40)]
    with Raw(path, n_seq=2, embeddings=True, pooling_type=0) as r:
        assert decode_shared(r, [*shared, (TEXTS[1, 40], 40, [0])]) != 0
        assert [r.seq_pos(seq)[1] for seq in (0, 1)] == [-1, -1]
        assert decode_shared(r, shared) == 0
        llama_cpp.llama_set_embeddings(r.ctx, False)
        assert decode_shared(r, [(TEXTS[1, 40], 40, [0])]) == 0
        r.pos = {1: 40}
        goes_on(r, tiny, out[0], TEXTS[0], 40, seq=1)


def test_a_failed_decode_leaves_the_state_as_it_was(hybrid):
    """Aborted in the first ubatch, in later ones, and at a single token."""
    tiny, path, out = hybrid
    with Raw(path, n_ubatch=16, n_seq=3) as r:
        seqs = [0] * 30 + [1] * 30
        r.decode(np.concatenate([TEXTS[0, :30], TEXTS[1, :30]]), seqs)
        with aborting(r, 10**9) as calls:
            r.decode(TEXTS[2, :40], [2] * 40)
        assert r.seq_rm(2, 0)
        # the states lie apart: those of a batch come to a row
        goes_on(r, tiny, out[0], TEXTS[0, :33], 30, seq=0, size=1)
        goes_on(r, tiny, out[1], TEXTS[1, :35], 30, seq=1, size=2)
        both = np.concatenate([TEXTS[0, 33:55], TEXTS[1, 35:55]])
        for after in range(0, calls[0], 1 + calls[0] // 9):
            with aborting(r, after):
                assert r.try_decode(both, [0] * 22 + [1] * 20) == 2
            with aborting(r, after):
                assert r.try_decode(TEXTS[2, :40], [2] * 40) == 2
            assert [r.seq_pos(s)[1] for s in range(3)] == [32, 34, -1]
        with aborting(r, 3):
            assert r.try_decode(TEXTS[0, 33:34]) == 2
        goes_on(r, tiny, out[0], TEXTS[0], 33, seq=0, size=1)
        goes_on(r, tiny, out[1], TEXTS[1], 35, seq=1)
        goes_on(r, tiny, out[2], TEXTS[2], 0, seq=2)


def save(r, seq=None) -> bytes:
    ask = [] if seq is None else [seq]
    name = "llama_state" if seq is None else "llama_state_seq"
    data = (ctypes.c_uint8 * getattr(llama_cpp, f"{name}_get_size")(r.ctx, *ask))()
    n = getattr(llama_cpp, f"{name}_get_data")(r.ctx, data, len(data), *ask)
    assert n == len(data)
    return bytes(data)


def load(r, data: bytes, seq=None) -> int:
    ask = [] if seq is None else [seq]
    name = "llama_state" if seq is None else "llama_state_seq"
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    return getattr(llama_cpp, f"{name}_set_data")(r.ctx, buffer, len(data), *ask)


def test_states(hybrid):
    tiny, path, out = hybrid
    with Raw(path) as r, Raw(path) as other:
        r.decode(np.concatenate([TEXTS[0, :40], TEXTS[1, :33]]), [0] * 40 + [1] * 33)
        whole, one = save(r), save(r, 1)
        assert load(other, whole) == len(whole)
        other.pos = {0: 40, 1: 33}
        goes_on(other, tiny, out[0], TEXTS[0], 40)
        assert load(other, one, 2) == len(one)
        other.pos[2] = 33
        goes_on(other, tiny, out[1], TEXTS[1], 33, seq=2)
        goes_on(other, tiny, out[1], TEXTS[1], 33, seq=1, size=1)
        assert load(other, one[:-8], 2) == 0  # cut: nothing of it stays
        assert other.seq_pos(2) == (-1, -1)
        goes_on(r, tiny, out[0], TEXTS[0], 40)


def test_checkpoints(hybrid):
    tiny, path, out = hybrid
    with Raw(path) as r:
        r.decode(TEXTS[0, :40])
        kept = r.checkpoint()
        r.decode(TEXTS[1, 40:60])
        assert not r.seq_rm(0, 40)
        assert r.go_back(kept)
        assert r.seq_pos(0) == (39, 39)
        goes_on(r, tiny, out[0], TEXTS[0], 40)
        assert r.seq_rm(0, 0)
        r.decode(np.concatenate([TEXTS[0, :39], TEXTS[1, 39:50]]))  # another last token
        assert not r.go_back(kept)
        assert len(kept) < len(save(r, 0))


def test_a_context_shift(hybrid):
    tiny, path, _ = hybrid
    with Raw(path) as r:
        if not r.can_shift():
            pytest.skip("positions of several dimensions are not shifted")
        r.decode(TEXTS[0, :50])
        assert r.seq_rm(0, 10, 20)
        r.seq_add(0, 20, 50, -10)
        assert r.seq_pos(0) == (39, 39)
        r.pos[0] = 40
        assert np.isfinite(r.decode(TEXTS[0, 50:])).all()
        assert r.seq_pos(0)[1] == 59


def test_a_text_that_was_moved_below_zero_leaves_no_state(hybrid):
    """The state stayed, and the next text began with it."""
    tiny, path, out = hybrid
    with Raw(path) as r:
        if not r.can_shift():
            pytest.skip("positions of several dimensions are not shifted")
        r.decode(TEXTS[0, :50])
        r.seq_add(0, 0, -1, -50)
        assert r.seq_pos(0) == (-1, -1)
        r.pos[0] = 0
        goes_on(r, tiny, out[1], TEXTS[1], 0)


def test_mod_llama_goes_back_to_a_checkpoint(hybrid):
    """An edited text is read again from the nearest checkpoint on, not from its beginning."""
    tiny, path, out = hybrid
    options = {"n_ctx": 256, "n_batch": 16, "checkpoint_step": 16, "checkpoint_bytes": 1 << 24}
    options |= {"logits_all": True, "flash_attn": False, "type_k": F32, "type_v": F32}
    with contextlib.closing(MoDLlama(path, **options)) as llm:
        llm.eval([*TEXTS[0, :50], *TEXTS[1, 50:]])
        llm.n_tokens = 50
        before = llm.stats()[0].seen
        llm.eval(TEXTS[0, 50:])
        assert N - 50 < llm.stats()[0].seen - before <= N - 50 + 16
        close(llm.scores[:N], out[0].logits, tiny.noise)
