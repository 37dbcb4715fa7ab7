"""States of tokens that were read before: in RAM, on disk, between objects.

A state goes on only where its K/V are those that the context would compute. Else the tokens are
read again, and what comes out equals the result of a new object.
"""

import copy

import llama_cpp
import numpy as np
import pytest

from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime.llama import MoDLlama
from tests.support.c_api import F16, F32
from tests.support.oracle import TOKENS, N, close, make, needs_patched
from tests.support.tiny_gguf import Tiny

pytestmark = needs_patched

EXACT = {"n_ctx": 256, "threads": 1, "flash_attn": False, "type_k": F32, "type_v": F32}
EXACT |= {"logits_all": True, "n_batch": 256}
LONG = "The lamp of a lighthouse turns all night, and ships far away can see it from the dark sea."
OTHER = "Bread needs flour, water, salt and time."
CHANGES = {
    "shift": lambda llm: setattr(llm, "shift", 0.8),
    "threshold": lambda llm: llm.set_threshold(0, 0.7),
    "force": lambda llm: setattr(llm, "force", "active"),
}
REASONS = {
    "shift": "shift 0, the context has 0.8",
    "threshold": "other thresholds",
    "force": "force none, the context has active",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def mod(folder):
    """(a model with units of all kinds, its file)"""
    tiny = make("all", vocab=True)
    return tiny, tiny.write(folder / "mod.gguf")


def complete(llm, text: str) -> str:
    answer = llm.create_completion(text.replace(" ", "_"), max_tokens=8, temperature=0.0)
    return answer["choices"][0]["text"]


def assert_like_new(llm, path, change, text: str) -> None:
    """What `llm` has just completed is what a new object with the change makes of the text."""
    new = MoDLlama(path, **EXACT)
    change(new)
    answer = complete(new, text)
    assert llm.n_tokens == new.n_tokens
    np.testing.assert_array_equal(llm.input_ids[: llm.n_tokens], new.input_ids[: new.n_tokens])
    close(llm.scores[: llm.n_tokens], new.scores[: new.n_tokens])
    assert llm.kv().cells_used == new.kv().cells_used
    assert llm.activation() == pytest.approx(new.activation())
    assert complete(llm, text) == answer
    new.close()


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_gives_no_state_of_other_thresholds(mod, tmp_path, change, kind):
    _, path = mod
    cache = llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(tmp_path)
    llm = MoDLlama(path, **EXACT)
    llm.set_cache(cache)
    complete(llm, LONG)
    CHANGES[change](llm)
    complete(llm, OTHER)
    llm.reset_stats()
    complete(llm, LONG)
    assert_like_new(llm, path, CHANGES[change], LONG)
    llm.close()


def test_a_cache_gives_the_state_of_the_same_thresholds(mod):
    _, path = mod
    llm = MoDLlama(path, **EXACT, threshold_shift=0.8)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    answer = complete(llm, LONG)
    complete(llm, OTHER)
    read = llm.perf().tokens
    assert complete(llm, LONG) == answer
    assert llm.perf().tokens - read < 12 < len(LONG)
    llm.close()


def test_a_cache_is_shared_by_objects_that_agree(mod):
    """An object with another shift takes none of its states, one with the same shift does."""
    _, path = mod
    cache = llama_cpp.LlamaRAMCache()
    objects = [MoDLlama(path, **EXACT, threshold_shift=shift) for shift in (0.0, 0.8, 0.0)]
    answers, read = [], []
    for llm in objects:
        llm.set_cache(cache)
        answers.append(complete(llm, LONG))
        read.append(llm.perf().tokens)
    assert_like_new(objects[1], path, CHANGES["shift"], LONG)
    assert read[1] >= len(LONG) > 12 > read[2]
    assert answers[0] == answers[2]
    for llm in objects:
        llm.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_is_refused_after_a_change_and_taken_when_it_is_undone(mod, change):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    before = llm.thresholds
    llm.eval(TOKENS[0][:100].tolist())
    state = llm.save_state()
    CHANGES[change](llm)
    with pytest.raises(UserError, match=REASONS[change]):
        llm.load_state(state)
    # the object works on, first with the change
    complete(llm, OTHER)
    llm.reset_stats()
    complete(llm, LONG)
    assert_like_new(llm, path, CHANGES[change], LONG)
    with pytest.raises(UserError, match=REASONS[change]):
        llm.load_state(state)
    llm.force, llm.shift = "none", 0.0
    llm.set_threshold(0, before[0])
    llm.load_state(state)
    llm.eval(TOKENS[0][100:].tolist())
    close(llm.scores[100:N], tiny.forward(TOKENS[0]).logits[100:])
    llm.close()


def test_a_refused_state_leaves_the_tokens_that_were_there(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT, threshold_shift=0.8)
    llm.eval(TOKENS[1][:60].tolist())
    state = llm.save_state()
    llm.shift = 0.0
    llm.reset()
    llm.eval(TOKENS[0][:100].tolist())
    cells = llm.kv().cells_used
    with pytest.raises(UserError, match="shift 0.8, the context has 0"):
        llm.load_state(state)
    assert (llm.n_tokens, llm.kv().cells_used) == (100, cells)
    llm.eval(TOKENS[0][100:].tolist())
    close(llm.scores[:N], tiny.forward(TOKENS[0]).logits)
    llm.close()


@pytest.fixture(scope="module")
def saved(mod):
    """The state of an object with the file's own settings."""
    llm = MoDLlama(mod[1], **EXACT)
    llm.eval(TOKENS[0][:100].tolist())
    state = llm.save_state()
    llm.close()
    return state


def _other(mod, folder, name: str):
    """(a file, arguments) of another object, as the parameters of the test below name it."""
    tiny, path = mod
    if name == "weights":  # those of one layer, as after more training
        other = Tiny(**{**tiny.__dict__, "tensors": dict(tiny.tensors)})
        key = "blk.3.ffn_down.weight"
        other.tensors[key] = (1.01 * other.tensors[key]).astype(np.float32)
        return other.write(folder / "weights.gguf"), {}
    if name in ("kv_window", "sink_tokens"):
        other = Tiny(**{**tiny.__dict__, name: 5, "tensors": dict(tiny.tensors)})
        return other.write(folder / f"{name}.gguf"), {}
    if name == "lora":
        tiny.lora(folder / "lora.gguf")
        return path, {"lora_path": str(folder / "lora.gguf")}
    return path, {
        "shift": {"threshold_shift": 0.8},
        "type": {"type_k": F16},
        "flash": {"flash_attn": True},
        "rope": {"rope_freq_base": 20000.0},
    }[name]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("weights", "another model"),
        ("kv_window", "another model"),
        ("sink_tokens", "another model"),
        ("lora", "other adapters"),
        ("shift", "shift 0, the context has 0.8"),
        ("type", "K/V of another type"),
        ("flash", "K/V of another type"),
        ("rope", "other RoPE"),
    ],
)
def test_another_object_refuses_a_state_that_it_would_not_make(mod, folder, saved, name, reason):
    path, arguments = _other(mod, folder, name)
    llm = MoDLlama(path, **(EXACT | arguments))
    with pytest.raises(UserError, match=reason):
        llm.load_state(saved)
    assert llm.n_tokens == 0
    llm.eval(TOKENS[0][:20].tolist())
    state = llm.save_state()
    llm.load_state(state)  # its own
    llm.close()


def test_contexts_of_other_sizes_take_a_state(mod, saved):
    tiny, path = mod
    llm = MoDLlama(path, **(EXACT | {"n_ctx": 512, "n_batch": 32}))
    llm.load_state(saved)
    llm.eval(TOKENS[0][100:].tolist())
    close(llm.scores[:N], tiny.forward(TOKENS[0]).logits)
    assert len(llm.input_ids) == 512
    llm.close()
    small = MoDLlama(path, **(EXACT | {"n_ctx": 256, "n_batch": 32}))
    longer = MoDLlama(path, **(EXACT | {"n_ctx": 512}))
    longer.eval([1] * 300)
    with pytest.raises(UserError, match="cannot load the state"):
        small.load_state(longer.save_state())
    complete(small, LONG)
    assert_like_new(small, path, lambda llm: None, LONG)
    small.close()
    longer.close()


def test_a_state_of_dense_files_belongs_to_its_file(mod, folder, saved):
    tiny, path = mod
    files = [folder / "dense0.gguf", folder / "dense1.gguf"]
    tiny.dense().write(files[0])
    Tiny(**{**tiny.dense().__dict__, "seed": 1, "tensors": {}}).write(files[1])
    states = []
    for file in files:
        llm = MoDLlama(file, **EXACT)
        for state in (saved, *states):
            with pytest.raises(UserError, match="cannot load the state"):
                llm.load_state(state)
        llm.eval(TOKENS[0][:50].tolist())
        states.append(llm.save_state())
        llm.reset()
        llm.load_state(states[-1])
        llm.eval(TOKENS[0][50:].tolist())
        assert llm.n_tokens == N
        llm.close()
    llm = MoDLlama(path, **EXACT)
    with pytest.raises(UserError, match="another model"):
        llm.load_state(states[0])
    llm.close()


def test_tokens_read_with_two_shifts_make_no_state(mod):
    """set_shift(reread=False) leaves what was read: no context would compute such a mixture."""
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    llm.eval(TOKENS[0][:60].tolist())
    llm.set_shift(0.8, reread=False)
    llm.eval(TOKENS[0][60:100].tolist())
    mixed = llm.save_state()
    for shift in (0.8, 0.0):
        llm.set_shift(shift, reread=False)
        with pytest.raises(UserError, match="different thresholds"):
            llm.load_state(mixed)
    llm.reset()
    llm.eval(TOKENS[0][:100].tolist())
    llm.load_state(llm.save_state())
    llm.eval(TOKENS[0][100:].tolist())
    close(llm.scores[:N], tiny.forward(TOKENS[0]).logits)
    llm.close()


def test_a_completion_with_two_shifts_is_not_cached(mod):
    _, path = mod
    llm = MoDLlama(path, **EXACT)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    complete(llm, LONG)
    llm.set_shift(0.8, reread=False)
    complete(llm, LONG + OTHER)
    complete(llm, OTHER)
    llm.reset_stats()
    complete(llm, LONG + OTHER)
    assert_like_new(llm, path, CHANGES["shift"], LONG + OTHER)
    llm.close()


def test_a_damaged_state_is_refused_and_the_object_usable(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    llm.eval(TOKENS[0][:100].tolist())
    whole = llm.save_state()
    data = whole.llama_state
    for damaged in (data[:-7], data[: len(data) // 3], data + b"more", b""):
        whole.llama_state = damaged
        with pytest.raises(UserError, match="cannot load the state"):
            llm.load_state(whole)
        with pytest.raises(UserError, match="no state"):
            llm.load_state(damaged)
        generated = next(llm.generate(TOKENS[0][:120].tolist(), temp=0.0))
        assert generated == tiny.forward(TOKENS[0][:120]).logits[-1].argmax()
    llm.close()


# --- other things that could outlive what made them


def test_a_change_before_the_first_token_of_a_generator_counts(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT)
    llm.eval(TOKENS[0].tolist())
    generator = llm.generate(TOKENS[0].tolist(), temp=0.0)
    llm.shift = 0.8
    next(generator)
    close(llm.scores[:N], tiny.forward(TOKENS[0], shift=0.8).logits)
    llm.close()


def test_a_new_context_keeps_the_settings_and_forgets_the_tokens(mod):
    tiny, path = mod
    llm = MoDLlama(path, **EXACT, threshold_shift=0.8)
    llm.set_threshold(1, 0.6)
    llm.kv_rollback = 17
    next(llm.generate(TOKENS[0].tolist(), temp=0.0))
    scores = llm.scores[:N].copy()
    expected = llm.thresholds
    llm.new_context(n_ctx=512)
    assert (llm.shift, llm.thresholds, llm.force) == (pytest.approx(0.8), expected, "none")
    assert (llm.kv_rollback, llm.n_tokens, len(llm.input_ids)) == (17, 0, 512)
    llm.scores[:] = 0
    next(llm.generate(TOKENS[0].tolist(), temp=0.0))
    close(llm.scores[:N], scores)
    llm.close()


def test_files_of_one_shape_differ_in_their_digest(mod, folder):
    _, path = mod
    other, _ = _other(mod, folder, "weights")
    again = folder / "again.gguf"
    again.write_bytes(path.read_bytes())
    assert path.stat().st_size == other.stat().st_size
    digests = [GGUFFile.open(file).digest() for file in (path, again, other)]
    assert digests[0] == digests[1] != digests[2]


# --- checkpoints


EDITED = {"n_ctx": 2048, "n_batch": 256, "threads": 1, "flash_attn": False}
EDITED |= {"type_k": F32, "type_v": F32, "checkpoint_step": 256, "checkpoint_bytes": 1 << 28}
HISTORY = np.random.default_rng(3).integers(0, 96, 1500).tolist()
CHANGED = [*HISTORY[:1000], *HISTORY[:30], *HISTORY[1040:]]  # 40 tokens became 30


@pytest.fixture(scope="module", params=["heads", "sliding+kv"])
def forgetful(request, folder):
    tiny = make(request.param, 0.3, vocab=True, n_ctx=2048)
    return tiny.write(folder / f"{request.param}.gguf")


def answered(llm, ids) -> tuple[np.ndarray, int]:
    """The logits after a prompt, and how many tokens were read for it."""
    read = llm.perf().tokens
    next(llm.generate(ids, temp=0.0))
    return llm.last_logits().copy(), llm.perf().tokens - read


def test_an_edited_history_costs_what_comes_after_the_edit(forgetful):
    llm, new = (MoDLlama(forgetful, **EDITED) for _ in range(2))
    first, read = answered(llm, HISTORY)
    assert read == len(HISTORY)
    llm.eval(HISTORY[:200])  # an answer
    logits, read = answered(llm, CHANGED)
    assert len(CHANGED) - 1000 <= read <= len(CHANGED) - 1000 + EDITED["checkpoint_step"]
    expected, _ = answered(new, CHANGED)
    close(logits, expected)
    assert llm.kv().cells_used == new.kv().cells_used
    for _ in range(2):  # the same again
        llm.eval(HISTORY[:200])
        logits, read = answered(llm, CHANGED)
        assert read == 1
        close(logits, expected)
    logits, read = answered(llm, HISTORY)
    assert read <= len(HISTORY) - 1000 + EDITED["checkpoint_step"]
    close(logits, first)
    llm.close()
    new.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_other_thresholds_is_not_used(forgetful, change):
    llm = MoDLlama(forgetful, **EDITED)
    answered(llm, HISTORY)
    CHANGES[change](llm)
    llm._thresholds_changed = False  # as set_shift(x, reread=False) leaves it
    logits, read = answered(llm, CHANGED)
    assert read == len(CHANGED)
    llm.reset()
    expected, _ = answered(llm, CHANGED)
    close(logits, expected)
    llm.close()


def test_checkpoints_are_few_and_small(forgetful):
    options = EDITED | {"checkpoint_step": 64, "n_batch": 64}
    one = MoDLlama(forgetful, **options)
    answered(one, HISTORY)
    assert len(one._checkpoints) == 24
    size = one._checkpoints.bytes // len(one._checkpoints)
    for limits in ({"checkpoints": 5}, {"checkpoint_bytes": 6 * size}):
        llm = MoDLlama(forgetful, **options | limits)
        answered(llm, HISTORY)
        assert 4 <= len(llm._checkpoints) <= 6
        at = [0, *(checkpoint.n_tokens for checkpoint in llm._checkpoints._made)]
        assert at[-1] == len(HISTORY)
        assert max(np.diff(at)) < len(HISTORY) / 2
        copied = copy.copy(llm)
        assert copied._checkpoints.limit == llm._checkpoints.limit
        assert len(copied._checkpoints) == 0
        copied.close()
        llm.close()
    none = MoDLlama(forgetful, **options, checkpoints=0)
    answered(none, HISTORY)
    assert len(none._checkpoints) == 0
    assert answered(none, CHANGED)[1] == len(CHANGED)
    none.close()
    one.close()


def test_checkpoints_take_an_eighth_of_the_dense_kv(forgetful):
    """The newest is there in any case, and gives way to no other."""
    options = EDITED | {"checkpoint_step": 64, "n_batch": 64}
    del options["checkpoint_bytes"]
    llm = MoDLlama(forgetful, **options)
    for size in (2048, 4096):
        made = llm._checkpoints
        answered(llm, HISTORY)
        room = llm._dense_bytes(size) / 8
        assert made.bytes <= room or len(made) == 1
        assert made.last == len(HISTORY)
        assert made.bytes > room / 2
        llm.new_context(n_ctx=4096)
    llm.close()


def test_short_prompts_leave_checkpoints_a_step_apart(forgetful):
    llm = MoDLlama(forgetful, **EDITED)
    for i in range(0, 1500, 20):
        llm.eval(HISTORY[i : i + 20])
    at = [0, *(checkpoint.n_tokens for checkpoint in llm._checkpoints._made)]
    assert at[-1] == 1500 and max(np.diff(at)) <= 256 + 20 and len(at) < 20
    llm.close()


def test_a_model_that_gives_nothing_back_needs_none(folder):
    llm = MoDLlama(make("attn+ffn", vocab=True).write(folder / "attn.gguf"), **EXACT)
    llm.eval(TOKENS[0].tolist())
    read = llm.perf().tokens
    llm.n_tokens = 3
    llm.eval(TOKENS[1][:10].tolist())
    assert (llm.perf().tokens - read, len(llm._checkpoints)) == (10, 0)
    llm.close()
