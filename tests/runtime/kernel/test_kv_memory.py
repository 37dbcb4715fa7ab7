"""KV memory on demand: committed as cells are used, given back, grown, moved together; and what
happens without it.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from tests.support import c_api as raw
from tests.support.c_api import F16, F32, Raw
from tests.support.oracle import NOISE, TOKENS, N, cells, close, expected_cells, make, restore, save
from tests.support.tiny_gguf import Tiny

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="memory is read from the kernel as Linux tells it"
)

FA_NOISE = 0.1  # it accumulates in f16 on a CPU; logits have a standard deviation of 2
LONG = np.random.default_rng(5).integers(0, 96, (2, 700))
MODES = [("lazy", True), ("lazy", False), ("grow", True), ("grow", False), ("full", False)]
MODES += [("pool", True), ("pool", False)]


@pytest.fixture(params=MODES, ids=lambda mode: f"{mode[0]}-{'fa' if mode[1] else 'nofa'}")
def mode(request, monkeypatch):
    """(how memory follows, flash attention); "lazy" is what is chosen without being asked."""
    if request.param[0] != "lazy":
        monkeypatch.setenv("LLAMA_MOD_KV", request.param[0])
    return request.param


def smollm2_like(kinds: str) -> Tiny:
    """K and V rows of 384 bytes in f16, as in SmolLM2-135M; window and share of active tokens as
    converted.
    """
    tiny = Tiny(n_embd=192, n_head=3, n_head_kv=3, n_ff=64, kv_window=64, n_ctx=8192)
    return tiny.route(range(1, 5), kinds).place_biases(LONG[:1], 0.45)


def script(code: str, path, **env) -> str:
    """Runs code in a process of its own, with `path`, `Raw` and TOKENS; what it prints."""
    head = f"""
import os, resource, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
import llama_cpp, numpy as np
from tests.support.c_api import F16, F32, Raw
from tests.support import c_api as raw
path, TOKENS = {str(path)!r}, np.random.default_rng(0).integers(0, 96, (4, {N}))

def limit(kind, name, extra):
    with open("/proc/self/status") as f:
        used = next(int(line.split()[1]) << 10 for line in f if line.startswith(name))
    resource.setrlimit(kind, (used + extra, resource.RLIM_INFINITY))

def cells(r):
    return [r.kv(layer).n_used for layer in range(llama_cpp.llama_model_n_layer(r.model))]
"""
    command = [sys.executable, "-c", head + code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- committed follows used


@pytest.mark.parametrize("n_ubatch", [512, 2048, 64])
@pytest.mark.parametrize("kinds", ["kv", "attn", "block", "attn+kv"])
def test_committed_is_at_most_a_tenth_above_used(kinds, n_ubatch, tmp_path):
    """Above 2048 tokens, whether a prompt comes in one batch or several, and while a long text is
    decoded on.
    """
    path = smollm2_like(kinds).write(tmp_path / "mod.gguf")
    tokens = np.random.default_rng(1).integers(0, 96, 3400)
    with Raw(path, n_ctx=4096, n_batch=2048, n_ubatch=n_ubatch, fa=True, kv=F16) as r:
        sizes = [2048, 512, 512, 30, *[1] * 200] if n_ubatch > 64 else [2048, *[64] * 4, *[4] * 50]
        n = 0
        for size in sizes:
            r.decode(tokens[n : n + size], logits=[0] * (size - 1) + [1])
            n += size
            kv = r.kv()
            assert kv.bytes_used <= kv.bytes_committed <= 1.1 * kv.bytes_used, n


def test_few_active_tokens_and_a_large_window(tmp_path):
    """What is freed together lies together: the memory of a window that has passed goes back."""
    tiny = Tiny(n_embd=192, n_head=3, n_head_kv=3, n_ff=64, kv_window=300, n_ctx=8192)
    path = tiny.route(range(1, 5), "kv").place_biases(LONG[:1], 0.05).write(tmp_path / "mod.gguf")
    tokens = np.random.default_rng(1).integers(0, 96, 3000)
    with Raw(path, n_ctx=4096, fa=True, kv=F16) as r:
        for i in range(0, 3000, 500):
            r.decode(tokens[i : i + 500], logits=[0] * 499 + [1])
            kv = r.kv(2)
            assert kv.bytes_committed <= kv.bytes_used + 6 * 4096
        assert kv.n_used < 600


def test_memory_of_a_prompt_is_not_held_by_all_layers_at_once(tmp_path):
    """Peak memory of a prompt of which little stays, measured by the kernel."""
    tiny = Tiny(n_layer=24, n_embd=128, n_head=4, n_head_kv=4, n_ff=64, kv_window=16, n_ctx=8192)
    path = (
        tiny.route(range(1, 24), "kv")
        .place_biases(LONG[:1, :100], 0.05)
        .write(tmp_path / "mod.gguf")
    )
    out = script(
        """
def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))

tokens = np.random.default_rng(1).integers(0, 96, 2048)
with Raw(path, n_ctx=8192, n_ubatch=2048, fa=True, kv=F32, n_seq=1) as r:
    one = [0] * 2047 + [1]
    r.set(force="inactive")
    r.decode(tokens, logits=one)
    r.clear()
    before = peak()
    r.set(force="none")
    r.decode(tokens, logits=one)
    print(peak() - before, r.kv().bytes_used, r.kv(2).bytes_per_cell * 2048 * 23)
""",
        path,
    )
    grown, used, dense = map(int, out.split())
    assert used < 0.25 * dense
    assert grown < used + 0.15 * dense


def test_without_flash_attention_memory_follows_in_steps(tmp_path):
    """V is transposed then, so its tensors grow instead, and shrink."""
    tiny = smollm2_like("kv")
    tokens = np.random.default_rng(1).integers(0, 96, 3000)
    with Raw(tiny.write(tmp_path / "mod.gguf"), n_ctx=16384, kv=F16) as r:
        for i in range(0, 3000, 500):
            r.decode(tokens[i : i + 500], logits=[0] * 499 + [1])
            if i > 1000:
                kv = r.kv()
                assert kv.bytes_used < kv.bytes_committed < 1.45 * kv.bytes_used
                assert kv.bytes_reserved < 1.7 * kv.bytes_used
        full = kv.bytes_committed
        r.clear()
        assert r.kv().bytes_committed < full / 10
        r.decode(tokens[:20])


# --- every way gives the same results


def test_every_way_computes_the_same(mode, tmp_path):
    """Four sequences outgrow the first tensors in the middle of a batch of several ubatches."""
    kind, fa = mode
    tiny = make("attn+ffn+kv" if not fa else "attn")
    expected = [tiny.forward(TOKENS[i], force="active" if fa else "none").logits for i in range(4)]
    noise = FA_NOISE if fa else NOISE
    with Raw(tiny.write(tmp_path / "mod.gguf"), n_ctx=1024, n_ubatch=100, fa=fa) as r:
        if fa:
            r.set(force="active")
        got = [[] for _ in range(4)]
        for i in range(0, N, 50):
            seqs = [s for s in range(4) for _ in range(50)]
            logits = r.decode(np.concatenate([TOKENS[s][i : i + 50] for s in range(4)]), seqs)
            for s in range(4):
                got[s].append(logits[50 * s : 50 * s + 50])
            sizes = r.kv().bytes_reserved
            if kind == "grow" and i == 0:
                first = sizes
        if kind == "grow" or (kind == "lazy" and not fa):
            assert sizes < 1024 * r.kv().bytes_per_cell
        if kind == "grow":
            assert sizes > first
        for s in range(2 if not fa else 4):  # gaps between scores were made for these
            close(np.concatenate(got[s]), expected[s], noise)


def test_single_tokens_across_a_growth(mode, tmp_path):
    """Graphs that are kept from token to token are built anew when tensors are replaced."""
    kind, fa = mode
    tiny = make("kv", sequences=LONG[:1, :300], n_ctx=1024)
    expected = tiny.forward(LONG[0, :300], force="active" if fa else "none").logits
    with Raw(tiny.write(tmp_path / "mod.gguf"), n_ctx=1024, fa=fa) as r:
        if fa:
            r.set(force="active")
        r.decode(LONG[0, :230])
        logits = [r.decode(LONG[0, i : i + 1]) for i in range(230, 300)]
    close(np.concatenate(logits), expected[230:], FA_NOISE if fa else NOISE)


def test_states_go_through_every_way(mode, tmp_path, monkeypatch):
    """A state of more cells than the new context's tensors have; sequences one by one as well."""
    _, fa = mode
    tiny = make("kv", sequences=LONG[:1, :400], n_ctx=2048)
    expected = tiny.forward(LONG[0, :400], force="active").logits[350:]
    noise = FA_NOISE if fa else NOISE
    path = tiny.write(tmp_path / "mod.gguf")
    with Raw(path, n_ctx=2048, fa=fa) as r:
        r.set(force="active")
        r.decode(LONG[0, :350])
        r.decode(LONG[1, :100], [1] * 100)
        data, held = save(r), cells(r)
        one = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(r.ctx, 0))()
        assert llama_cpp.llama_state_seq_get_data(r.ctx, one, len(one), 0) > 0
    with Raw(path, n_ctx=2048, fa=fa) as r:
        r.set(force="active")
        assert restore(r, data) == len(data)
        assert cells(r) == held
        r.pos = {0: 350, 1: 100}
        close(r.decode(LONG[0, 350:400]), expected, noise)
    with Raw(path, n_ctx=2048, fa=fa) as r:
        r.set(force="active")
        r.decode(LONG[1, :200], [1] * 200)
        for _ in range(2):
            assert llama_cpp.llama_state_seq_set_data(r.ctx, one, len(one), 2) == len(one)
        r.pos[2] = 350
        close(r.decode(LONG[0, 350:400], [2] * 50), expected, noise)


def test_a_shift_touches_the_cells_in_use_only(mode, tmp_path):
    _, fa = mode
    tiny = make("block", sequences=LONG[:1, :400], n_ctx=4096)
    path, dense_path = (
        tiny.write(tmp_path / "mod.gguf"),
        tiny.dense().write(tmp_path / "dense.gguf"),
    )
    with Raw(dense_path, n_ctx=65536, fa=fa) as dense, Raw(path, n_ctx=65536, fa=fa) as r:
        r.set(force="active")
        results = []
        for x in (dense, r):
            x.decode(LONG[0, :300])
            assert llama_cpp.llama_memory_seq_rm(x.mem, 0, 4, 24)
            llama_cpp.llama_memory_seq_add(x.mem, 0, 24, -1, -20)
            results.append(x.decode(LONG[0, 300:330], pos=np.arange(280, 310)))
        if mode[0] != "full":
            assert r.kv().bytes_committed < 3 * r.kv().bytes_used
        close(*results, FA_NOISE if fa else NOISE)


# --- given back, moved together


def test_clear_and_removed_tails_give_memory_back(mode, tmp_path):
    kind, fa = mode
    path = smollm2_like("attn").write(tmp_path / "mod.gguf")
    with Raw(path, n_ctx=4096, fa=fa, kv=F16) as r:
        r.decode(LONG[0], logits=[0] * 699 + [1])
        r.decode(LONG[1], [1] * 700, logits=[0] * 699 + [1])
        both = r.kv()
        assert r.seq_rm(1, 0)
        half = r.kv()
        if kind == "lazy" and fa:
            assert half.bytes_committed < half.bytes_used + 5 * 2 * 4096
        assert r.seq_rm(0, 100)
        less = r.kv()
        r.clear()
        none = r.kv()
        if kind != "full":
            assert both.bytes_committed > half.bytes_committed > less.bytes_committed
        if kind == "pool":  # the piece of an empty cache has rows
            assert none.bytes_committed <= less.bytes_committed
        elif kind != "full":
            assert less.bytes_committed > none.bytes_committed
        if fa and kind != "pool":
            assert none.bytes_committed == 0
        close(r.decode(TOKENS[0][:20]), Raw_again(path, fa, TOKENS[0][:20]), FA_NOISE)


def Raw_again(path, fa, tokens):
    with Raw(path, n_ctx=4096, fa=fa, kv=F16) as r:
        return r.decode(tokens)


def interleaved(r: Raw, n: int):
    """Two sequences that take turns token by token: their cells alternate, no page belongs to one
    alone.
    """
    for i in range(0, n, 40):
        r.decode(LONG[:, i : i + 40].T.ravel(), [0, 1] * 40, logits=[0] * 79 + [1])


def undisturbed(path, n: int, more, fa, **settings):
    """Logits of sequence 0 alone, cut in the same way."""
    with Raw(path, n_ctx=2048, fa=fa, kv=F32) as r:
        r.set(**settings)
        for i in range(0, n, 40):
            r.decode(LONG[0, i : i + 40], logits=[0] * 40)
        return np.concatenate([r.decode(LONG[0, a:b]) for a, b in more])


@pytest.mark.parametrize("case", ["attn", "kv", "all"])
def test_cells_move_together_when_a_sequence_between_others_goes(case, mode, tmp_path):
    kind, fa = mode
    path = make(case, sequences=LONG[:2, :440], n_ctx=2048).write(tmp_path / "mod.gguf")
    settings = {"force": "active"} if fa else {"force": "none"}
    more = [(400, 440), *[(i, i + 1) for i in range(440, 460)]]
    with Raw(path, n_ctx=2048, fa=fa, kv=F32) as r:
        r.set(**settings)
        interleaved(r, 400)
        assert r.seq_rm(1, 0)
        before, held = r.kv(), cells(r)
        logits = [r.decode(LONG[0, a:b]) for a, b in more[:1]]
        after = r.kv()
        logits += [r.decode(LONG[0, a:b]) for a, b in more[1:]]
    close(
        np.concatenate(logits),
        undisturbed(path, 400, more, fa, **settings),
        FA_NOISE if fa else NOISE,
    )
    assert max(held) == 400
    if kind == "lazy" and fa:
        assert before.bytes_committed > 1.5 * before.bytes_used
        assert after.bytes_committed < 1.2 * after.bytes_used
    elif kind != "full":
        assert after.bytes_committed < 0.8 * before.bytes_committed


def test_cells_that_are_shared_or_shifted_move_together_too(mode, tmp_path):
    """A hole in the middle, a copy, and positions that wait to be shifted, all before the next
    decode.
    """
    _, fa = mode
    path = make("attn", sequences=LONG[:2, :440], n_ctx=2048).write(tmp_path / "mod.gguf")
    results = []
    with Raw(path, n_ctx=2048, fa=fa, kv=F32) as r:
        r.set(force="active")
        interleaved(r, 400)
        r.seq_cp(0, 2)
        assert r.seq_rm(1, 0)
        llama_cpp.llama_memory_seq_add(r.mem, 0, 0, -1, 7)
        r.pos[0] += 7
        r.pos[2] += 7  # shared cells move for both
        held = cells(r)
        results.append(r.decode(LONG[0, 400:440], pos=np.arange(407, 447)))
        results.append(r.decode(LONG[0, 400:440], [2] * 40, pos=np.arange(407, 447)))
        assert cells(r) == [x + 80 for x in held]
    expected = undisturbed(path, 400, [(400, 440)], fa, force="active")
    for logits in results:
        close(logits, expected, FA_NOISE if fa else 1e-3)


def test_decisions_move_with_their_cells(tmp_path):
    """Dropped tokens within the window are moved, then hidden and freed like all others."""
    tiny = make("kv", 0.5, sequences=LONG[:2, :440], kv_window=200, n_ctx=2048)
    path = tiny.write(tmp_path / "mod.gguf")
    active = tiny.forward(LONG[0, :460]).active
    more = [(400, 440), *[(i, i + 1) for i in range(440, 460)]]
    for fa in (False, True):
        with Raw(path, n_ctx=2048, fa=fa, kv=F32) as r:
            interleaved(r, 400)
            assert r.seq_rm(1, 0)
            logits = np.concatenate([r.decode(LONG[0, a:b]) for a, b in more])
            if not fa:
                close(logits, undisturbed(path, 400, more, fa))
                assert cells(r) == expected_cells(tiny, active, 460)


# --- what is chosen


def test_the_choice_is_told(monkeypatch, tmp_path):
    path = make("kv").write(tmp_path / "mod.gguf")
    lines = []
    log = llama_cpp.llama_log_callback(lambda level, text, user: lines.append(text.decode()))
    monkeypatch.setattr(raw, "_silent", log)
    for env, fa, words in [
        ("", True, "lazy (committed as cells are used)"),
        ("", False, "grow (without flash attention V is transposed)"),
        ("grow", True, "grow (LLAMA_MOD_KV)"),
        ("full", False, "full (LLAMA_MOD_KV)"),
        ("pool", True, "pool (LLAMA_MOD_KV)"),
    ]:
        monkeypatch.setenv("LLAMA_MOD_KV", env) if env else monkeypatch.delenv(
            "LLAMA_MOD_KV", raising=False
        )
        lines.clear()
        with Raw(path, fa=fa):
            assert any(f"K/V memory: {words}" in line for line in lines)
    monkeypatch.setenv("LLAMA_MOD_KV", "some")
    lines.clear()
    with pytest.raises(AssertionError, match="cannot create the context"):
        Raw(path)
    assert any("LLAMA_MOD_KV=some" in line for line in lines)


# --- no memory

OUT_OF_MEMORY = """
with Raw(path, n_ctx=4096, n_batch=4096, n_ubatch=2048, fa=True, kv=F32) as r:
    r.set(force="active")
    big, last = np.random.default_rng(1).integers(0, 96, 2000), [0] * 1999 + [1]
    # what else a decode needs is there from now on
    assert r.try_decode(big, [1] * 2000, logits=last) == 0
    assert r.seq_rm(1, 0)
    logits = [r.decode(TOKENS[0][:100])]
    before = cells(r)
    limit(resource.RLIMIT_DATA, "VmData", int(os.environ["EXTRA_MB"]) << 20)
    for at in (100, 110, 120):
        print(r.try_decode(big, [1] * 2000, pos=np.arange(2000), logits=last))
        r.seq_rm(1, 0)
        assert cells(r) == [at] * 6
        logits.append(r.decode(TOKENS[0][at : at + 10]))
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(r.try_decode(big, [1] * 2000, pos=np.arange(2000), logits=last))
    logits.append(r.decode(TOKENS[0][130:]))
np.save(path + ".npy", np.concatenate(logits))
"""


@pytest.mark.parametrize("way", ["lazy", "grow", "pool"])
@pytest.mark.parametrize("extra, result", [(3, 1), (7, 1), (14, 1), (20, 1), (400, 0)])
def test_out_of_memory_is_a_decode_without_a_slot(extra, result, way, tmp_path):
    """In the complete layers, in the middle of the routed ones; afterwards all is as before, and
    goes on.
    """
    tiny = Tiny(n_layer=6, n_embd=256, n_head=4, n_head_kv=4, n_ff=64, n_ctx=4096).route(
        range(2, 6), "attn"
    )
    path = tiny.write(tmp_path / "mod.gguf")
    env = {"LLAMA_MOD_KV": way} if way != "lazy" else {}
    out = script(OUT_OF_MEMORY, path, EXTRA_MB=str(extra), **env)
    assert [int(line) for line in out.split()] == [result] * 3 + [0]
    close(np.load(str(path) + ".npy"), tiny.forward(TOKENS[0], force="active").logits, FA_NOISE)


JUST_NOT_ENOUGH = """
with Raw(path, n_ctx=4096, n_batch=4096, n_ubatch=2048, fa=True, kv=F32) as r:
    r.set(force="active")
    big, last = np.random.default_rng(1).integers(0, 96, 2000), [0] * 1999 + [1]
    assert r.try_decode(big, [1] * 2000, logits=last) == 0
    assert r.seq_rm(1, 0)
    r.decode(TOKENS[0][:100])
    for extra in np.linspace(20.2, 20.8, 11):  # each layer takes 4 MB
        limit(resource.RLIMIT_DATA, "VmData", int(extra * 2**20))
        print(r.try_decode(big, [1] * 2000, pos=np.arange(2000), logits=last))
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert cells(r) == [100] * 6
"""


def test_memory_for_a_layer_but_not_for_the_lists_of_its_cells(tmp_path):
    """Wherever memory ends: where the system is asked for each of them, the next small allocation
    fails.
    """
    tiny = Tiny(n_layer=6, n_embd=256, n_head=4, n_head_kv=4, n_ff=64, n_ctx=4096).route(
        range(2, 6), "attn"
    )
    env = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0", "MALLOC_MMAP_THRESHOLD_": "4096"}
    out = script(JUST_NOT_ENOUGH, tiny.write(tmp_path / "mod.gguf"), **env)
    assert [int(line) for line in out.split()] == [1] * 11


STATES_WITHOUT_MEMORY = """
import ctypes
from tests.support.oracle import restore, save

def unlimited():
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

with Raw(path, n_ctx=4096, n_batch=4096, n_ubatch=2048, fa=True, kv=F32) as r:
    r.set(force="active")
    r.decode(np.random.default_rng(1).integers(0, 96, 2000), logits=[0] * 1999 + [1])
    whole = save(r)
    one = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(r.ctx, 0))()
    assert llama_cpp.llama_state_seq_get_data(r.ctx, one, len(one), 0) == len(one)
    r.clear()
    logits = [r.decode(TOKENS[0][:100], [1] * 100)]
    for extra in (3, 14):
        limit(resource.RLIMIT_DATA, "VmData", extra << 20)
        assert llama_cpp.llama_state_seq_set_data(r.ctx, one, len(one), 2) == 0
        assert cells(r) == [100] * 6
        assert llama_cpp.llama_memory_seq_pos_max(r.mem, 2) == -1
        close(r.decode(TOKENS[0][100:110], [1] * 10), expected[100:110])
        assert r.seq_rm(1, 100)
        unlimited()
    assert llama_cpp.llama_state_seq_set_data(r.ctx, one, len(one), 2) == len(one)
    assert cells(r) == [2100] * 6
    r.clear()
    limit(resource.RLIMIT_DATA, "VmData", len(whole) + (5 << 20))
    assert restore(r, whole) == 0
    assert cells(r) == [0] * 6
    unlimited()
    assert restore(r, whole) == len(whole)
    assert cells(r) == [2000] * 6
"""


def test_a_state_that_does_not_fit_into_memory(tmp_path):
    tiny = Tiny(n_layer=6, n_embd=256, n_head=4, n_head_kv=4, n_ff=64, n_ctx=4096).route(
        range(2, 6), "attn"
    )
    path = tiny.write(tmp_path / "mod.gguf")
    np.save(tmp_path / "expected.npy", tiny.forward(TOKENS[0], force="active").logits)
    head = f"""
expected = np.load({str(tmp_path / "expected.npy")!r})
def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol={FA_NOISE})
"""
    script(head + STATES_WITHOUT_MEMORY, path)


def test_without_address_space_the_caches_grow(tmp_path):
    tiny = make("kv", n_ctx=1 << 20)
    path = tiny.write(tmp_path / "mod.gguf")
    out = script(
        """
@llama_cpp.llama_log_callback
def log(level, text, user):
    if b"K/V memory" in text:
        print(text.decode(), end="")
raw._silent = log
limit(resource.RLIMIT_AS, "VmSize", 300 << 20)
with Raw(path, n_ctx=1 << 19, n_seq=2, fa=False) as r:
    got = [r.decode(TOKENS[0])]
    for i in range(8):
        r.decode(TOKENS[1], [1] * 150, logits=[0] * 149 + [1])
    print("reserved", r.kv().bytes_reserved)
with Raw(path, n_ctx=1 << 19, n_seq=1, fa=True, kv=F16) as r:
    r.decode(TOKENS[0])
np.save(path + ".npy", got[0])
""",
        path,
    )
    assert "grow (without flash attention V is transposed)" in out
    assert "grow (no address space for the whole context)" in out
    assert int(out.split("reserved ")[1].split()[0]) < 20e6
    close(np.load(str(path) + ".npy"), tiny.forward(TOKENS[0]).logits)
