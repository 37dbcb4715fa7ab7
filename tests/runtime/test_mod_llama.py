"""MoDLlama and llama_cpp.Llama on MoD files: generation, statistics, thresholds, reuse of what was
read before.
"""

import subprocess
import sys

import llama_cpp
import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.formats.kv_types import KVTypes
from mod_export.runtime import bindings
from mod_export.runtime.llama import MoDLlama, StoppedError
from tests.support.c_api import F32, Q8_0, stock_lib
from tests.support.oracle import TOKENS, N, close, expected_cells, make
from tests.support.tiny_gguf import Tiny

patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
EXACT = {
    "n_ctx": 256,
    "threads": 1,
    "flash_attn": False,
    "type_k": F32,
    "type_v": F32,
    "logits_all": True,
}


@pytest.fixture(scope="module")
def mod(tmp_path_factory):
    """(a model with units of all kinds, its file)"""
    tiny = make("all")
    return tiny, tiny.write(tmp_path_factory.mktemp("mod") / "mod.gguf")


def generate(llm, prompt, n: int) -> list[int]:
    """The n likeliest tokens."""
    tokens = []
    for token in llm.generate([int(t) for t in prompt], temp=0.0):
        tokens.append(token)
        if len(tokens) == n:
            break
    return tokens


@patched
def test_generation_and_statistics(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    assert [(u.layer, u.kind) for u in llm.units] == tiny.units
    assert llm.kinds == ["kv", "block", "attn", "ffn"]
    assert (llm.kv_window, llm.sink_tokens, llm.kv_rollback) == (8, 2, 64)
    assert np.isnan(llm.activation())
    with llm.recording() as batches:
        answer = generate(llm, TOKENS[0][:80], 20)
    expected = tiny.forward([*TOKENS[0][:80], *answer])
    np.testing.assert_array_equal(answer, expected.logits[79:99].argmax(-1))
    active = np.concatenate([a for a, _ in batches])
    np.testing.assert_array_equal(
        active, expected.active[:99]
    )  # the last token is not read any more
    np.testing.assert_array_equal(llm.trace()[0], expected.active[98:99])
    assert [(s.seen, s.active) for s in llm.stats()] == [(99, n) for n in active.sum(0)]
    assert llm.activation() == pytest.approx(active.mean())
    assert llm.stats_by_kind()["ffn"] == (99, active[:, tiny.units.index((0, "ffn"))].sum())
    perf = llm.perf()
    assert (perf.decodes, perf.tokens) == (20, 99) and 0 < perf.graphs_reused < perf.graphs
    kv = llm.kv()
    assert kv.cells_used == sum(expected_cells(tiny, active, 99))
    assert kv.dense == 99 * 2 * 4 * tiny.n_head_kv * 32 * 5 and kv.used < kv.dense
    assert kv.used <= kv.committed <= kv.reserved
    llm.reset_stats()
    assert [s.seen for s in llm.stats()] == [0] * len(tiny.units)


@patched
@pytest.mark.parametrize("types", ["q8_0", "q4_0", "q8_0/q4_0"])
def test_quantised_kv_of_heads(types, tmp_path):
    """Each K/V head has cells of its own, whose rows of 64 values are two blocks.

    Few queries at once compute what the dense model computes. Many attend in tiles, where Q is not
    rounded.
    """
    tiny = make("heads", n_embd=256, n_ff=64)
    types, options = KVTypes.parse(types), {"n_ctx": 256, "threads": 1, "logits_all": True}
    llm = MoDLlama(tiny.write(tmp_path / "mod.gguf"), **options, type_k=types.k, type_v=types.v)
    dense = MoDLlama(tiny.dense().write(tmp_path / "dense.gguf"), **options, **types.options())
    exact = MoDLlama(dense.model_path, **options, **KVTypes("f32", "f32").options())
    llm.force = "active"

    def logits(opened, step):
        opened.reset()
        for i in [*range(0, 90, step), *range(90, N)]:  # at last by the graph of decode
            opened.eval(TOKENS[0][i : min(i + step, 90) if i < 90 else i + 1].tolist())
        return opened.scores[:N].copy()

    rounded, unrounded = logits(dense, 15), logits(exact, 15)
    np.testing.assert_array_equal(logits(llm, 15), rounded)
    error = np.abs(rounded - unrounded).mean()
    assert 1e-3 < error / unrounded.std() < (0.04 if types.k == types.v == "q8_0" else 0.5)
    for step in (16, 90):
        tiled = logits(llm, step)
        assert 0 < np.abs(tiled - rounded).mean() < error
        assert np.abs(tiled - unrounded).mean() < 1.02 * error
    per_token = 2 * sum(64 // 32 * bytes for bytes in (types.sizes[0] * 32, types.sizes[1] * 32))
    assert llm.kv().used == dense.kv().used == N * per_token * tiny.n_layer
    llm.force = "none"
    llm.reset()
    with llm.recording() as batches:
        llm.eval(TOKENS[0].tolist())
    active = batches[0][0]
    assert 0.3 < active.mean() < 0.7
    used = sum(expected_cells(tiny, active, N))  # of single heads in routed layers
    assert llm.kv().cells_used == used
    whole = 2 * N * per_token  # layers 0 and 3 have no units
    assert llm.kv().used == whole + (used - 2 * N) * per_token / 2


@patched
def test_a_changed_threshold_holds_for_the_whole_next_prompt(mod):
    """Also for the part that is in the cache already."""
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    generate(llm, TOKENS[0], 1)
    for change, force, shift in (
        ("shift", "none", 0.8),
        ("force", "active", 0.8),
        ("force", "inactive", 0.8),
    ):
        setattr(llm, change, shift if change == "shift" else force)
        generate(llm, TOKENS[0], 1)
        close(llm.scores[:N], tiny.forward(TOKENS[0], force, shift).logits)
    llm.force, llm.shift = "none", 0.0
    llm.set_threshold(llm.units[0], 0.7)
    assert llm.thresholds[0] == pytest.approx(0.7)
    generate(llm, TOKENS[0], 1)
    other = make("all")
    other.routers[other.units[0]][2] = 0.7
    close(llm.scores[:N], other.forward(TOKENS[0]).logits)


@patched
def test_a_shift_from_the_start_and_one_from_now_on(mod):
    """threshold_shift holds for all tokens; set_shift without reread for those from then on, as in
    the numpy model.
    """
    tiny, path = mod
    llm = MoDLlama(path, **EXACT, threshold_shift=0.8)
    generate(llm, TOKENS[0], 1)
    close(llm.scores[:N], tiny.forward(TOKENS[0], shift=0.8).logits)
    llm = MoDLlama(path, **EXACT)
    generate(llm, TOKENS[0][:100], 1)
    llm.set_shift(0.8, reread=False)
    llm.reset_stats()
    generate(llm, TOKENS[0], 1)
    assert {s.seen for s in llm.stats()} == {N - 100}
    close(
        llm.scores[:N], tiny.forward(TOKENS[0], shift=np.repeat([0.0, 0.8], [100, N - 100])).logits
    )


@patched
def test_bad_values_are_refused(mod):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="threshold shift"):
            MoDLlama(mod[1], **EXACT, threshold_shift=bad)
    llm = MoDLlama(mod[1], **EXACT)
    for bad in (
        lambda: llm.set_threshold(0, 1.0),
        lambda: llm.set_threshold(99, 0.5),
        lambda: setattr(llm, "shift", float("nan")),
        lambda: setattr(llm, "force", "sometimes"),
        lambda: setattr(llm, "kv_rollback", -1),
    ):
        with pytest.raises(UserError):
            bad()


@patched
@pytest.mark.parametrize("cls", [llama_cpp.Llama, MoDLlama])
@pytest.mark.parametrize("common", [130, 60])
def test_a_prompt_that_shares_a_beginning(mod, cls, common, capfd):
    """The tail is taken back where that is exact, else llama_cpp.Llama reads the prompt again by
    itself.
    """
    tiny, path = mod
    exact = {k: v for k, v in EXACT.items() if k != "threads"}
    llm = cls(str(path), verbose=False, **exact) if cls is llama_cpp.Llama else cls(path, **EXACT)
    generate(llm, TOKENS[0], 1)
    prompt = [*TOKENS[0][:common], *TOKENS[1][:15]]
    answer = generate(llm, prompt, 5)
    fresh = MoDLlama(path, **EXACT)
    assert answer == generate(fresh, prompt, 5)
    n = len(prompt) + 4
    close(llm.scores[common:n], fresh.scores[common:n])
    assert llm.n_tokens == n
    assert capfd.readouterr().err == ""


@patched
def test_a_rewind_by_hand_beyond_the_margin(mod):
    """llama_cpp.Llama.eval ignores that a tail could not be taken back; MoDLlama reads the past
    again.
    """
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    llm.eval(TOKENS[0].tolist())
    llm.n_tokens = 20
    llm.eval(TOKENS[0][20:40].tolist())
    assert llm.n_tokens == 40
    close(llm.scores[20:40], tiny.forward(TOKENS[0][:40]).logits[20:])


@patched
def test_states(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    llm.eval(TOKENS[0][:100].tolist())
    state = llm.save_state()
    llm.reset()
    llm.eval(TOKENS[1].tolist())
    llm.load_state(state)
    llm.eval(TOKENS[0][100:].tolist())
    close(llm.scores[100:N], tiny.forward(TOKENS[0]).logits[100:])


@patched
def test_too_many_tokens_and_a_stop_leave_it_usable(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT, n_batch=64)
    with pytest.raises(UserError, match="300 tokens do not fit a context of 256"):
        llm.eval([1] * 300)
    llm.eval(TOKENS[0][:100].tolist())
    llm.stop = True
    with pytest.raises(StoppedError):
        llm.eval(TOKENS[0][100:].tolist())
    llm.stop = False
    llm.eval(TOKENS[0][100:].tolist())
    close(llm.scores[:N], tiny.forward(TOKENS[0]).logits)


def test_a_dense_file(tmp_path, capfd):
    tiny = Tiny()
    llm = MoDLlama(tiny.write(tmp_path / "dense.gguf"), **EXACT)
    llm.eval(TOKENS[0].tolist())
    close(llm.scores[:N], tiny.forward(TOKENS[0]).logits)
    assert (llm.units, llm.stats(), llm.activation(), llm.perf(), llm.force) == (
        [],
        [],
        1.0,
        None,
        "none",
    )
    kv = llm.kv()
    assert kv.used == kv.dense == N * 2 * 4 * 2 * 32 * 5
    assert kv.reserved == 256 * 2 * 4 * 2 * 32 * 5
    with pytest.raises(UserError):
        llm.shift = 1.0
    with pytest.raises(UserError):
        MoDLlama(tmp_path / "dense.gguf", **EXACT, threshold_shift=1.0)
    assert capfd.readouterr() == ("", "")  # quiet


def test_a_file_without_a_tokenizer_and_a_context_that_no_machine_holds(tmp_path):
    """llama.cpp would abort, and take all memory there is."""
    path = Tiny(n_layer=2).route([1], "kv").write(tmp_path / "numbers.gguf")
    llm = MoDLlama(path, n_ctx=64)
    with pytest.raises(UserError, match="numbers.gguf has no tokenizer"):
        llm.tokenize(b"hi")
    llm.close()
    for n_ctx in (99_999_999_999, 1 << 31):
        with pytest.raises(
            UserError, match=f"a context of {n_ctx} tokens takes .* use a smaller context"
        ):
            MoDLlama(path, n_ctx=n_ctx)


def test_files_that_do_not_load(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        MoDLlama(tmp_path / "none.gguf")
    tiny = Tiny()
    path = tiny.write(tmp_path / "bad.gguf", tensors={"blk.3.attn_q.weight": None})
    with pytest.raises(UserError, match="blk.3.attn_q.weight"):
        MoDLlama(path)
    dense = tiny.write(tmp_path / "dense.gguf")
    with pytest.raises(UserError, match="V in q8_0 needs flash attention; switch flash"):
        MoDLlama(dense, n_ctx=256, flash_attn=False, type_v=Q8_0)
    with pytest.raises(UserError, match="cannot hold K in 'q6_k'; use one of f32, f16"):
        MoDLlama(dense, n_ctx=256, type_k="q6_k")
    narrow = Tiny(n_embd=96).write(tmp_path / "narrow.gguf")  # a head has 24 values
    with pytest.raises(UserError, match="V in q4_0 has blocks of 32 values, but a head .* has 24"):
        MoDLlama(narrow, n_ctx=256, type_v="q4_0")
    llm = MoDLlama(narrow, n_ctx=256)
    with pytest.raises(UserError, match="K in q8_0 has blocks of 32"):
        llm.new_context(type_k="q8_0")
    llm.eval([1, 2])


STOCK = """
import sys
from mod_export.runtime import bindings
from mod_export.errors import UserError
from mod_export.runtime import MoDLlama
import numpy as np
llm = MoDLlama(sys.argv[1], n_ctx=256, n_batch=128, threads=1, logits_all=True)
llm.eval([int(t) for t in sys.argv[3:]])
np.save(sys.argv[2], llm.scores[: llm.n_tokens])
try:
    bindings.require()
    print("patched")
except UserError as exc:
    print(exc)
"""


def test_a_dense_file_is_the_same_on_the_stock_library_bit_for_bit(tmp_path):
    import os

    file = Tiny().write(tmp_path / "dense.gguf")
    command = [sys.executable, "-c", STOCK, file, tmp_path / "stock.npy", *map(str, TOKENS[0])]
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(stock_lib()), "LD_LIBRARY_PATH": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "lacks llama_mod_n_units" in done.stdout and "unset LLAMA_CPP_LIB_PATH" in done.stdout
    llm = MoDLlama(file, n_ctx=256, n_batch=128, threads=1, logits_all=True)
    llm.eval(TOKENS[0].tolist())
    np.testing.assert_array_equal(llm.scores[:N], np.load(tmp_path / "stock.npy"))
