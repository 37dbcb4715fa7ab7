"""One test for each bug that a review of the runtime found; each tells its bug."""

import ctypes

import llama_cpp
import numpy as np
import pytest

from tests.support.c_api import Raw
from tests.support.tiny_gguf import Tiny

TOKENS = np.random.default_rng(5).integers(0, 96, 120)
NOISE = 3e-4


def make(path, kinds, layers=(1,), activation=0.5, **shape):
    """A tiny model of 3 layers, its file, the oracle's result for TOKENS."""
    tiny = Tiny(n_layer=3, n_embd=64, n_head=2, n_head_kv=1, n_ff=64, **shape).route(layers, kinds)
    tiny.place_biases([TOKENS], activation)
    return tiny.write(path / "mod.gguf"), tiny.forward(TOKENS)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=NOISE)


def cells(r):
    return [r.kv(layer).n_used for layer in range(3)]


def save(r, seq):
    size = llama_cpp.llama_state_seq_get_size(r.ctx, seq)
    blob = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(r.ctx, blob, size, seq) == size
    return blob


@pytest.mark.parametrize("kinds", ["ffn", "block", "attn"])
def test_a_graph_for_all_rows_is_not_reused_for_some(kinds, tmp_path):
    # a kept graph of one row without a gather ran on row 0 where row 1 alone was active
    path, oracle = make(tmp_path, kinds, sink_tokens=0)
    act = oracle.active[:, 0]
    i = next(k for k in range(5, 100) if act[k] and not act[k + 1] and act[k + 2])
    with Raw(path) as r:
        r.decode(TOKENS[:i], logits=[0] * (i - 1) + [1])
        r.decode(TOKENS[i : i + 1])
        close(r.decode(TOKENS[i + 1 : i + 3], logits=[0, 1])[0], oracle.logits[i + 2])


@pytest.mark.parametrize("kinds", ["ffn", "block"])
def test_a_head_without_outputs(kinds, tmp_path):
    # a scheduler of its own for a graph without any data asserted
    path, oracle = make(tmp_path, kinds, layers=(2,))
    with Raw(path, n_ubatch=4) as r:
        assert r.try_decode(TOKENS[:1], logits=[0]) == 0
        close(r.decode(TOKENS[1:21], logits=[0] * 19 + [1])[0], oracle.logits[20])


def test_an_empty_copy_is_an_empty_sequence(tmp_path):
    # it was marked as one that cannot be continued, and stayed so
    path, oracle = make(tmp_path, "kv", activation=0.4)
    with Raw(path) as r:
        r.set(kv_rollback=0)
        r.decode(TOKENS[:100])
        llama_cpp.llama_memory_seq_cp(r.mem, 0, 1, 50, 50)
        close(r.decode(TOKENS[:30], [1] * 30), oracle.logits[:30])


def test_a_copied_prefix_forgets_like_any_sequence(tmp_path):
    # its dropped tokens were taken for already freed: they were never hidden
    path, _ = make(tmp_path, "kv", activation=0.4)
    results = []
    for n in (100, 10):
        with Raw(path) as r:
            r.set(kv_rollback=0, force="active")
            r.decode(TOKENS[:n])
            r.set(force="none")
            llama_cpp.llama_memory_seq_cp(r.mem, 0, 1, 0, 10)
            r.seq_rm(0, -1)
            results.append((r.decode(TOKENS[10:90], [1] * 80, pos=range(10, 90)), cells(r)))
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_an_empty_state_replaces_a_sequence(tmp_path):
    # the layers with complete K/V kept the old tokens, the others lost them
    path, oracle = make(tmp_path, "kv", activation=0.4)
    with Raw(path) as r:
        r.decode(TOKENS[:50])
        blob = save(r, 1)
        assert llama_cpp.llama_state_seq_set_data(r.ctx, blob, len(blob), 0) > 0
        assert cells(r) == [0, 0, 0]
        close(r.decode(TOKENS[:60], pos=range(60)), oracle.logits[:60])


def test_a_failed_load_leaves_nothing_behind(tmp_path):
    # K/V of the layers that had been restored stayed in free cells; without flash attention a NaN
    # there spread
    path, oracle = make(tmp_path, "kv", activation=0.4)
    file = tmp_path / "state"
    with Raw(path, fa=False) as r:
        r.decode(TOKENS[:60])
        token = (llama_cpp.llama_token * 1)(0)
        assert llama_cpp.llama_state_seq_save_file(r.ctx, bytes(file), 0, token, 1) > 0
    data = bytearray(file.read_bytes())
    for i in range(2000, len(data) // 2):
        data[i] = 0xFF
    file.write_bytes(data[: len(data) * 9 // 10])
    with Raw(path, fa=False) as r:
        n = ctypes.c_size_t()
        assert (
            llama_cpp.llama_state_seq_load_file(r.ctx, bytes(file), 0, token, 1, ctypes.byref(n))
            == 0
        )
        assert cells(r) == [0, 0, 0]
        close(r.decode(TOKENS[:60]), oracle.logits[:60])


def test_shifting_shared_cells(tmp_path):
    # a cell moves for all its sequences; only one of them was told
    path, _ = make(tmp_path, "kv", activation=0.4)
    results = []
    for shared in (True, False):
        with Raw(path) as r:
            r.set(kv_rollback=0)
            r.decode(TOKENS[:60])
            seq = 0
            if shared:
                llama_cpp.llama_memory_seq_cp(r.mem, 0, 1, -1, -1)
                llama_cpp.llama_memory_seq_rm(r.mem, 1, 2, 40)
                seq = 1
            llama_cpp.llama_memory_seq_rm(r.mem, 0, 2, 40)
            llama_cpp.llama_memory_seq_add(r.mem, 0, 40, -1, -38)
            logits = r.decode(TOKENS[60:100], [seq] * 40, pos=range(22, 62))
            r.seq_rm(0, -1) if shared else None
            results.append((logits, cells(r)))
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_tail_can_be_taken_back_after_a_shift(tmp_path):
    # positions inside the removed gap were counted as freed ones
    path, _ = make(tmp_path, "kv", activation=0.4)
    with Raw(path, n_ctx=512) as r:
        r.set(kv_rollback=8)
        r.decode(TOKENS)
        assert r.seq_rm(0, 119)
        llama_cpp.llama_memory_seq_rm(r.mem, 0, 2, 61)
        llama_cpp.llama_memory_seq_add(r.mem, 0, 61, -1, -59)
        assert llama_cpp.llama_memory_seq_rm(r.mem, 0, 59, -1)


def test_a_tail_behind_a_gap(tmp_path):
    # the next token stands below the gap, where K/V that it sees are gone; what stood above was
    # asked
    path, oracle = make(tmp_path, "kv", layers=(1, 2), activation=0.4)
    with Raw(path) as r:
        r.set(kv_rollback=8)
        r.decode(TOKENS[:100])
        dropped = max(i for i in range(60, 80) if not oracle.active[i].all())
        assert llama_cpp.llama_memory_seq_rm(r.mem, 0, dropped + 1, 95)
        assert not llama_cpp.llama_memory_seq_rm(r.mem, 0, 95, -1)
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 0) == 99


def test_a_token_moves_in_all_layers_or_in_none(tmp_path):
    # where only the sequence that was not named still had its cell, it stayed
    path, oracle = make(tmp_path, "kv", activation=0.4)
    with Raw(path) as r:
        r.set(kv_rollback=0)
        r.decode(TOKENS[:30])
        r.seq_cp(0, 1)
        r.decode(TOKENS[30:80])  # sequence 0 gives back dropped tokens that 1 keeps
        llama_cpp.llama_memory_seq_add(r.mem, 0, 0, -1, 100)
        r.seq_rm(0, 0)
        assert (llama_cpp.llama_memory_seq_pos_max(r.mem, 1), cells(r)[0]) == (129, 30)
        held = cells(r)[1]
        assert llama_cpp.llama_memory_seq_rm(r.mem, 1, 0, 115)
        kept = oracle.active[:30, 0] | (30 - np.arange(30) < 8)
        assert (held, cells(r)[1]) == (kept.sum(), kept[15:].sum())


def test_a_sequence_that_another_empties(tmp_path):
    # it stayed one that cannot be continued
    path, oracle = make(tmp_path, "kv", activation=0.4)
    with Raw(path) as r:
        r.set(kv_rollback=0)
        r.decode(TOKENS[:60])
        llama_cpp.llama_memory_seq_cp(r.mem, 0, 1, 0, 20)
        assert r.try_decode(TOKENS[20:21], [1], [20]) == -2
        llama_cpp.llama_memory_seq_add(r.mem, 0, 0, -1, -20)
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 1) == -1
        close(r.decode(TOKENS[:30], [1] * 30), oracle.logits[:30])


def test_any_number_of_sinks(tmp_path):
    # 2^31 and more turned negative: no sinks at all
    tiny = Tiny(n_layer=3, sink_tokens=3_000_000_000).route([1], "ffn")
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        r.decode(TOKENS[:30])
        assert r.trace()[0].all()


@pytest.mark.parametrize("decode", [None, "graph"])
def test_layers_share_the_rotation_of_quantised_keys(decode, tmp_path, monkeypatch):
    # each routed layer had one of its own, filled anew for each token
    if decode:
        monkeypatch.setenv("LLAMA_MOD_DECODE", decode)
    tiny = Tiny(n_layer=3, n_embd=128, n_head=2, n_head_kv=1, n_ff=64).route((1, 2), "attn+kv")
    tiny.place_biases([TOKENS])
    kv = {"fa": True, "kv": llama_cpp.GGML_TYPE_Q8_0}
    with (
        Raw(tiny.write(tmp_path / "mod.gguf"), **kv) as r,
        Raw(tiny.dense().write(tmp_path / "dense.gguf"), **kv) as d,
    ):
        r.set(force="active")
        # 10 at once: more attend in tiles, where Q is not rounded
        batches = [*np.split(TOKENS[:40], 4), *TOKENS[40:80, None]]
        a, b = (np.concatenate([x.decode(t) for t in batches]) for x in (r, d))
    np.testing.assert_allclose(a, b, rtol=0, atol=0.1)
    assert a.std() > 0.5


def test_backend_samplers_feed_the_graph_that_runs(tmp_path, monkeypatch):
    # a sampler writes its random numbers to the graph that was built last, which was not always the
    # one that ran
    path, _ = make(tmp_path, "attn+kv")
    drawn = []
    for disable in ("0", "1"):
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", disable)
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(7))
        with Raw(path) as r:
            assert llama_cpp.llama_set_sampler(r.ctx, 0, chain)
            tokens = []
            for start in (
                0,
                60,
            ):  # the second prompt builds a graph after the one for single tokens
                for part in (TOKENS[start : start + 40], *TOKENS[start + 40 : start + 60, None]):
                    assert r.try_decode(part, logits=[0] * (len(part) - 1) + [1]) == 0
                    tokens.append(llama_cpp.llama_get_sampled_token_ith(r.ctx, len(part) - 1))
            assert llama_cpp.llama_set_sampler(r.ctx, 0, None)
        llama_cpp.llama_sampler_free(chain)
        drawn.append(tokens)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 10


def test_graphs_have_room_for_many_heads(tmp_path):
    """Each K/V head has nodes of its own, as many layers of many heads as real models have."""
    tiny = Tiny(n_layer=32, n_embd=128, n_head=16, n_head_kv=16, n_ff=64).route(
        range(1, 32), "heads"
    )
    tiny.place_biases([TOKENS[:61]])
    with Raw(tiny.write(tmp_path / "mod.gguf")) as r:
        logits = np.concatenate([r.decode(TOKENS[:60]), r.decode(TOKENS[60:61])])
    np.testing.assert_allclose(logits, tiny.forward(TOKENS[:61]).logits, rtol=0, atol=tiny.noise)


POOLINGS = {"mean": 1, "first": 2, "last": 3}


def pooled(r, seqs, tokens=None, embd=None):
    """Decode one batch of tokens or of embeddings; the pooled embedding of each sequence."""
    n = len(seqs)
    batch = llama_cpp.llama_batch_init(n, 0 if embd is None else r.n_embd, 1)
    ends = dict.fromkeys(seqs, 0)
    for i, seq in enumerate(seqs):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = ends[seq], 1, seq, 1
        ends[seq] += 1
        if embd is None:
            batch.token[i] = int(tokens[i])
    if embd is not None:
        ctypes.memmove(batch.embd, embd.ctypes.data, embd.nbytes)
    batch.n_tokens = n
    assert llama_cpp.llama_decode(r.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)
    found = [llama_cpp.llama_get_embeddings_seq(r.ctx, seq) for seq in sorted(ends)]
    return np.array([np.ctypeslib.as_array(row, (r.n_embd,)) for row in found])


@pytest.mark.parametrize("kinds", ["attn+ffn+kv", "block"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooled_embeddings_of_several_sequences(kinds, pooling, tmp_path):
    # a unit's tokens were of one sequence: sums of the others were written before their array, and
    # embeddings in place of tokens were pooled as one sequence
    tiny = Tiny(n_layer=3, n_embd=64, n_head=2, n_head_kv=1, n_ff=64).route((1, 2), kinds)
    tiny.place_biases([TOKENS[:40], TOKENS[40:80]])
    path = tiny.write(tmp_path / "mod.gguf")
    seqs = np.random.default_rng(3).permutation(np.repeat((0, 1), 40))
    tokens = np.empty(80, int)
    tokens[seqs == 0], tokens[seqs == 1] = TOKENS[:40], TOKENS[40:80]
    pool = {"mean": lambda h: h.mean(0), "first": lambda h: h[0], "last": lambda h: h[-1]}[pooling]
    expected = [pool(tiny.forward(text).embd) for text in (TOKENS[:40], TOKENS[40:80])]
    embd = np.ascontiguousarray(tiny.tensors["token_embd.weight"][tokens], np.float32)
    with Raw(path, embeddings=True, pooling_type=POOLINGS[pooling]) as r:
        close(pooled(r, seqs.tolist(), tokens), expected)
        r.clear()
        close(pooled(r, seqs.tolist(), embd=embd), expected)
