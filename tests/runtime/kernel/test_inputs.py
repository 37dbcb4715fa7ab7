"""Inputs of kept graphs in one block, as devices get them (LLAMA_MOD_INPUTS=block), on the CPU: the
same bits.
"""

import numpy as np
import pytest

from tests.support.c_api import Raw
from tests.support.oracle import CASES, TOKENS, make


def run(path, fa: bool, scattered: bool) -> list[np.ndarray]:
    """Logits and decisions of two sequences: a prompt, batches of 1 to 8 tokens, and back to single
    ones.
    """
    results = []
    rng = np.random.default_rng(4)
    with Raw(path, fa=fa) as r:
        results.append(r.decode(TOKENS[0][:40]))
        at = [40, 0]
        for n in [1, 1, 8, 3, 8, 5, 2, 6, 1, 8, 4, 8, 7, 1]:
            seqs = sorted(rng.integers(0, 2, n)) if n > 1 else [0]
            tokens = []
            for s in seqs:
                tokens.append(TOKENS[s][at[s]])
                at[s] += 1
            wanted = [int(not scattered or i % 2) for i in range(n)]
            results += [r.decode(tokens, seqs, logits=wanted if any(wanted) else None), *r.trace()]
    return results


@pytest.mark.parametrize(("fa", "scale"), [(False, False), (True, True)])
@pytest.mark.parametrize("decode", [None, "graph"])
@pytest.mark.parametrize("case", CASES)
def test_one_block_gives_the_same_bits(case, decode, fa, scale, tmp_path, monkeypatch):
    path = make(case, scale_output=scale).write(tmp_path / "mod.gguf")
    if decode:
        monkeypatch.setenv("LLAMA_MOD_DECODE", decode)
    results = []
    for way in ("each", "block"):
        monkeypatch.setenv("LLAMA_MOD_INPUTS", way)
        results.append(run(path, fa, scattered=not fa))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_grow(tmp_path, monkeypatch):
    """From one multiple of 256 cells to the next a graph is built again, with larger inputs."""
    path = make("kv").write(tmp_path / "mod.gguf")
    tokens = np.tile(TOKENS[0], 8)
    results = []
    for way in ("each", "block"):
        monkeypatch.setenv("LLAMA_MOD_INPUTS", way)
        monkeypatch.setenv("LLAMA_MOD_DECODE", "graph")
        with Raw(path, n_ctx=2048) as r:
            r.set(force="active")
            parts = []
            for start in range(0, 1100, 100):
                parts.append(r.decode(tokens[start : start + 98]))
                parts += [r.decode(tokens[k : k + 1]) for k in (start + 98, start + 99)]
            results.append(np.concatenate(parts))
    np.testing.assert_array_equal(*results)


def test_unknown_value_is_refused(tmp_path, monkeypatch):
    path = make("kv").write(tmp_path / "mod.gguf")
    monkeypatch.setenv("LLAMA_MOD_INPUTS", "both")
    with pytest.raises(AssertionError, match="cannot create the context"):
        Raw(path)
