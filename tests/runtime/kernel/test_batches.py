"""Several sequences decoded at once, joining and leaving, against the oracle's run of each one
alone.
"""

import numpy as np
import pytest

from tests.support.c_api import Raw
from tests.support.oracle import CASES, cells, close, expected_cells, make
from tests.support.tiny_gguf import logit

N = 60
TOKENS = np.random.default_rng(21).integers(0, 96, (8, N))


@pytest.fixture(scope="module", params=CASES)
def routed(request, tmp_path_factory):
    """(the model, its file, the oracle's results for each row of TOKENS)"""
    tiny = make(request.param, sequences=TOKENS, n_embd=64, n_head=2, n_head_kv=1, n_ff=64)
    path = tiny.write(tmp_path_factory.mktemp("batches") / "mod.gguf")
    return tiny, path, [tiny.forward(tokens) for tokens in TOKENS]


def step(r, at: dict, expected) -> None:
    """Decodes the next token of each sequence of `at` (sequence -> tokens that it has), and checks
    each row.
    """
    tokens, seqs = [TOKENS[s][n] for s, n in at.items()], list(at)
    logits = r.decode(tokens, seqs, pos=list(at.values()))
    active = r.trace()[0]
    for i, (s, n) in enumerate(at.items()):
        np.testing.assert_array_equal(active[i], expected[s].active[n])
        close(logits[i], expected[s].logits[n])
        at[s] += 1


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("together", [True, False])
def test_prompts_of_different_length_then_decode(routed, count, together):
    """Prompts of 3, 7, 11 ... tokens, in one batch or in one each; then each goes on by a token."""
    _, path, expected = routed
    length = {s: 3 + 4 * s for s in range(count)}
    with Raw(path, n_ctx=1024, n_seq=8, n_ubatch=32) as r:
        pieces = [list(length)] if together else [[s] for s in length]
        for piece in pieces:
            parts = [(s, i) for s in piece for i in range(length[s])]
            logits = r.decode([TOKENS[p] for p in parts], [s for s, _ in parts])
            for row, (s, i) in zip(logits, parts, strict=True):
                close(row, expected[s].logits[i])
        at = dict(length)
        for _ in range(20):
            step(r, at, expected)


@pytest.mark.parametrize("rollback", [0, 64])
def test_sequences_join_and_leave(routed, rollback):
    """A server's life: requests come with prompts while others decode, and leave; their cells are
    used again.
    """
    tiny, path, expected = routed
    rng = np.random.default_rng(2)
    with Raw(path, n_ctx=256, n_seq=8, n_ubatch=16) as r:
        r.set(kv_rollback=rollback)
        at = {}
        for _ in range(120):
            s = int(rng.integers(8))
            if s in at and (at[s] > 20 or len(at) > 5):
                assert r.seq_rm(s, 0)
                del at[s]
            elif s not in at and len(at) < 6:
                n = int(rng.integers(1, 20))
                logits = r.decode(TOKENS[s][:n], [s] * n, pos=range(n), logits=[0] * (n - 1) + [1])
                close(logits[0], expected[s].logits[n - 1])
                at[s] = n
            running = {s: n for s, n in at.items() if n < N and rng.random() < 0.8}
            if running:
                step(r, running, expected)
                at |= running
            held = [expected_cells(tiny, expected[s].active, n, rollback) for s, n in at.items()]
            assert cells(r) == np.sum(held, 0).tolist()


def test_a_new_prompt_in_the_batch_of_the_others_next_tokens(routed):
    """What servers do: the tokens that decode and pieces of a new prompt in one batch, of several
    ubatches.
    """
    _, path, expected = routed
    with Raw(path, n_ctx=512, n_seq=8, n_ubatch=8) as r:
        for s in range(3):
            r.decode(TOKENS[s][:10], [s] * 10)
        for k in range(4):
            piece = range(12 * k, 12 * k + 12)
            parts = [
                (0, 10 + k),
                (3, piece[0]),
                (1, 10 + k),
                *[(3, i) for i in piece[1:]],
                (2, 10 + k),
            ]
            logits = r.decode(
                [TOKENS[p] for p in parts], [s for s, _ in parts], pos=[i for _, i in parts]
            )
            for row, (s, i) in zip(logits, parts, strict=True):
                close(row, expected[s].logits[i])


def test_the_same_prompt_shared_by_all(routed):
    """A prompt decoded once, copied to seven sequences, which go on with other tokens at once."""
    tiny, path, _ = routed
    with Raw(path, n_ctx=512, n_seq=8) as r:
        r.decode(TOKENS[0][:30])
        for s in range(1, 8):
            r.seq_cp(0, s)
        logits = np.stack([r.decode(TOKENS[:, 30 + i], list(range(8))) for i in range(3)])
    for s in range(8):
        again = tiny.forward([*TOKENS[0][:30], *TOKENS[s][30:33]])
        if np.abs(again.score - logit(0.4)).min() > 1e-3:  # no gaps were placed for these texts
            close(logits[:, s], again.logits[30:])
