"""An abort callback that stops a decode at any node of any segment: the state is as before, and the
context works.
"""

import ctypes

import llama_cpp
import numpy as np
import pytest

from mod_export.runtime import bindings
from tests.support.c_api import Raw, aborting
from tests.support.oracle import TOKENS, cells, close, make, restore, save

START = 80  # tokens that are there before
PARTS = {"decode": 1, "small batch": 3, "prefill of three ubatches": 44}


@pytest.fixture(scope="module", params=["block", "attn", "ffn", "kv", "all"])
def context(request, tmp_path_factory):
    """A context whose kv units forget early, so that a decode frees cells; its state with START
    tokens.
    """
    tiny = make(request.param, n_embd=64, n_head=2, n_head_kv=1, n_ff=64)
    with Raw(tiny.write(tmp_path_factory.mktemp("abort") / "mod.gguf"), n_ubatch=16) as r:
        r.set(kv_rollback=2)
        r.decode(TOKENS[0][:START])
        yield r, save(r), tiny.forward(TOKENS[0][: START + 44]).logits


@pytest.mark.parametrize("part", PARTS)
def test_every_node(context, part):
    r, state, expected = context
    tokens = TOKENS[0][START : START + PARTS[part]]

    def again():
        assert restore(r, state) == len(state)
        r.pos = {0: START}

    def finish():
        close(r.decode(tokens), expected[START : START + len(tokens)])
        again()

    again()
    before = cells(r)
    with aborting(r, 10**9) as calls:
        finish()
    n = calls[0]
    assert n > 40
    # A prefill is aborted at every third node, which is still several of each segment.
    for i, after in enumerate(range(0, n, 1 if len(tokens) < 16 else 3)):
        with aborting(r, after) as calls:
            assert r.try_decode(tokens) == 2, f"stopped at node {after} of {n}"
        assert calls[0] == after + 1
        assert cells(r) == before
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 0) == START - 1
        if i % 10 == 0:
            finish()
    finish()


def test_a_context_shift_is_not_stopped_half_way(context):
    """The decode that would have made it is; K rotated in some layers could be neither finished nor
    taken back.
    """
    r, state, _ = context
    results = []
    for after in (None, 0, 1, 2, 3, 5, 30):
        restore(r, state)
        assert llama_cpp.llama_memory_seq_rm(r.mem, 0, 4, 24)
        llama_cpp.llama_memory_seq_add(r.mem, 0, 24, -1, -20)
        args = TOKENS[0][START : START + 5], [0] * 5, range(START - 20, START - 15)
        if after is not None:
            with aborting(r, after):
                assert r.try_decode(*args) == 2
        results.append(r.decode(*args))
        np.testing.assert_array_equal(results[-1], results[0])


def test_statistics_and_trace_are_those_of_the_last_success(context):
    r, state, _ = context
    restore(r, state)
    r.pos = {0: START}
    r.decode(TOKENS[0][START : START + 20])
    trace, perf, after = r.trace(), bindings.llama_mod_perf(), bindings.llama_mod_perf()
    bindings.llama_mod_get_perf(r.ctx, ctypes.byref(perf))
    with aborting(r, 30):
        assert r.try_decode(TOKENS[0][START + 20 : START + 40]) == 2
    np.testing.assert_array_equal(r.trace(), trace)
    bindings.llama_mod_get_perf(r.ctx, ctypes.byref(after))
    assert (after.n_decode, after.n_tokens) == (perf.n_decode, perf.n_tokens)


def test_other_sequences_stay(context):
    """A stopped batch of two sequences, one of them new."""
    r, state, expected = context
    restore(r, state)
    before = cells(r)
    positions = [*range(START, START + 20), *range(20)]
    batch = TOKENS[0][positions], [0] * 20 + [1] * 20, positions
    for after in (0, 25, 140):
        with aborting(r, after):
            assert r.try_decode(*batch) == 2
        assert cells(r) == before
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 1) == -1
    logits = r.decode(*batch)
    close(logits[:20], expected[START : START + 20])
    close(logits[20:], expected[:20])
