"""22,000 random operations on the runtime's KV memory.

Each is compared with the slow reference of kv_reference.py.

After every operation: return code, cells in use per layer, first and last position of each
sequence. Now and then the logits of sequences that are a plain text by now, against the oracle. A
failure prints the shortest list of operations found that still fails, for `replay`; where the
process dies, ops.log in pytest's temporary directory tells the last ones.
MOD_EXPORT_TEST_OPERATIONS says how many operations each case and seed has.
"""

import ctypes
import os
import time
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest

from tests.support import oracle
from tests.support.architectures import memory
from tests.support.c_api import Raw, aborting
from tests.support.kv_operations import next_operation
from tests.support.kv_reference import END, MIXED, Full, Reference
from tests.support.oracle import close, needs_patched, without_origins
from tests.support.tiny_gguf import logit
from tests.support.windows import Window

pytestmark = needs_patched

N_SEQ, N_CTX, N_UBATCH, SINKS = 4, 256, 16, 2
OPERATIONS = int(os.environ.get("MOD_EXPORT_TEST_OPERATIONS", "500"))  # of each case and seed
SEEDS = 2
DRAFTS = " with drafts"  # so many of whose tokens can be taken back
N_BACK = 6
ALL_CASES = (*oracle.CASES, *oracle.WINDOWED, *memory.WITHOUT_V, *memory.BIASED, *memory.HYBRIDS)
ALL_CASES += tuple(name + DRAFTS for name in memory.DRAFTED)
SHIFTS = {"active": -1e9, "inactive": 1e9}  # force, as the oracle's shift


def make(case: str, path):
    sequences = np.random.default_rng(9).integers(0, 96, (2, 100))
    shape = {"n_embd": 64, "n_head": 2, "n_head_kv": 1, "n_ff": 64}
    name = case.removesuffix(DRAFTS)
    tiny = oracle.make(name, sequences=sequences, sink_tokens=SINKS, **shape)
    if name != case:
        tiny = replace(tiny, n_back=N_BACK)
    return tiny, tiny.write(path / "mod.gguf")


class Machine:
    """One context and its reference. An operation is a tuple: name, arguments; its method checks
    what it returns.
    """

    def __init__(self, tiny, path, log=None):
        self.tiny, self.path, self.log = tiny, path, log
        self.r = self._context(N_CTX)
        self.ref = Reference(
            tiny.units,
            tiny.n_layer,
            {"kv": Window(tiny.kv_window), "layer": tiny.window},
            N_CTX,
            N_SEQ,
            sliding=tiny.sliding,
            without_kv=tiny.without_kv,
            heads=tiny.heads,
            own_windows=tiny.windows,
            recurrent=tiny.recurrent,
            n_back=tiny.n_back,
        )
        self.text = [
            [] for _ in range(N_SEQ)
        ]  # (token, shift, decisions) where a sequence is a plain text, else None
        self.saved, self.marks = {}, {}
        self.compared = self.refused = self.taken = self.gone_back = self.ended = 0

    def _context(self, n_ctx: int) -> Raw:
        sizes = {"n_ctx": n_ctx, "n_ubatch": N_UBATCH, "n_seq": N_SEQ}
        return Raw(self.path, start=self.tiny.start, n_rs_seq=self.tiny.n_back, **sizes)

    def do(self, op) -> None:
        if self.log:
            print(op, file=self.log, flush=True)
        getattr(self, op[0])(*op[1:])
        assert oracle.cells(self.r) == self.ref.used()
        for s in range(N_SEQ):
            fixed, last = self.r.seq_pos(s)
            least, most = self.ref.fixed(s)
            assert last == self.ref.pos_max(s) and least <= fixed <= most, (
                f"positions of sequence {s}: {fixed} to {last}"
            )

    # --- decoding

    def decode(self, batch, outputs, compare, stop) -> None:
        """batch: (sequence, token); outputs: "all", "last" or "none"; stop: None, or abort after so
        many nodes.
        """
        tokens, following = [], {s: self.ref.pos_max(s) + 1 for s in range(N_SEQ)}
        for s, _ in batch:
            tokens.append((s, following[s]))
            following[s] += 1
        flags = [
            outputs == "all" or outputs == "last" and i == len(batch) - 1 for i in range(len(batch))
        ]
        args = [token for _, token in batch], [s for s, _ in batch], [pos for _, pos in tokens]
        with aborting(self.r, END if stop is None else stop):
            rc = self.r.try_decode(*args, logits=[int(f) for f in flags])
        broken = {self.ref.seqs[s].broken for s, _ in batch}
        if "must" in broken or rc == -2 and "may" in broken:
            assert rc == -2, "a copy that lacks K/V was decoded"
        elif rc == 2:
            assert stop is not None
        elif rc == 1:
            self._check_full(tokens, args)
        else:
            assert rc == 0, f"llama_decode returned {rc}"
            active = self.r.trace()[0].astype(bool)
            assert active.shape == (len(batch), len(self.tiny.units))
            self.ref.decode(tokens, active, N_UBATCH, args[0])
            self._remember(batch, tokens, active)
            if compare and any(flags):
                self._compare(tokens, flags)

    def _check_full(self, tokens, args) -> None:
        """Was there really no room? The decisions that the failed decode would have made come from
        a larger context.
        """
        active = np.ones((len(tokens), len(self.tiny.units)), bool)
        if self.ref.free(-1) >= len(tokens):
            with self._context(4 * N_CTX) as large:
                # tokens of several settings, which a state may not have
                data = without_origins(get_state(self.r, -1))
                assert set_state(large, data, -1) == len(data)
                large.set(kv_rollback=self.ref.rollback, **self.ref.settings)
                assert large.try_decode(*args, logits=[0] * len(tokens)) == 0
                active = large.trace()[0].astype(bool)
        with pytest.raises(Full):
            self.ref.decode(tokens, active, N_UBATCH, args[0])

    def _remember(self, batch, tokens, active) -> None:
        force = self.ref.settings["force"]
        for (s, token), (_, pos), row in zip(batch, tokens, active, strict=True):
            plain = self.text[s] is not None and len(self.text[s]) == pos
            if plain and not (force == "inactive" and pos < SINKS):  # which the oracle keeps active
                self.text[s].append((token, SHIFTS.get(force, self.ref.settings["shift"]), row))
            else:
                self.text[s] = None

    def _compare(self, tokens, flags) -> None:
        """Logits of this decode's outputs against the oracle, unless a decision lies within noise
        of its threshold.
        """
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.r.ctx), (sum(flags), self.r.n_vocab)
        )
        outputs = [token for token, flag in zip(tokens, flags, strict=True) if flag]
        for s in {s for s, _ in outputs}:
            if self.text[s] is None:
                continue
            ids, shift, active = (np.array(x) for x in zip(*self.text[s], strict=True))
            expected = self.tiny.forward(ids, shift=shift)
            at = np.array([logit(self.tiny.routers[u][2]) for u in self.tiny.units])
            if np.abs(expected.score - at - shift[:, None]).min() > 4 * self.tiny.noise:
                np.testing.assert_array_equal(active, expected.active)
                rows = [i for i, (seq, _) in enumerate(outputs) if seq == s]
                close(logits[rows], expected.logits[[outputs[i][1] for i in rows]], self.tiny.noise)
                self.compared += 1

    def gap(self, seq) -> None:
        """A batch that does not continue the sequence is refused.

        llama.cpp allows gaps where positions have several dimensions, for images.
        """
        multi = self.r.rope_type() in (
            llama_cpp.LLAMA_ROPE_TYPE_MROPE,
            llama_cpp.LLAMA_ROPE_TYPE_IMROPE,
        )
        if (end := self.ref.pos_max(seq)) >= 0:
            assert self.r.try_decode([1], [seq], [end if multi else end + 2]) == -1

    def set(self, name, value) -> None:
        self.r.set(**{name: value})
        if name == "kv_rollback":
            self.ref.rollback = value
        else:
            self.ref.settings[name] = value

    # --- memory

    def remove(self, seq, p0, p1) -> None:
        ends = [self.ref.pos_max(s) for s in range(N_SEQ)]
        fixed = [self.r.seq_pos(s)[0] for s in range(N_SEQ)]
        done = self.r.seq_rm(seq, p0, p1)
        tails = [
            s
            for s in (range(N_SEQ) if seq < 0 else [seq])
            if self.ref.pos_min(s) < p0 <= ends[s] and (p1 < 0 or p1 > ends[s])
        ]
        held = [max(p for p in self.ref.positions(s) if p < p0) + 1 for s in tails]
        told = all(fixed[s] < p for s, p in zip(tails, held, strict=True))
        # the states that drafts go back to are not told
        assert done == told or (done and self.tiny.n_back), "not as told"
        self.ended += done and len(tails)
        right = self.ref.remove(seq, p0, p1, done)
        assert right, (
            "K/V are gone that the next token sees" if done else "refused although nothing is gone"
        )
        for s in range(N_SEQ) if done else ():
            if seq in (s, -1) and p0 <= ends[s]:
                whole, tail = self.ref.pos_max(s) < 0, p1 < 0 or p1 > ends[s]
                self.text[s] = [] if whole else self.text[s][:p0] if tail and self.text[s] else None

    def copy(self, src, dst, p0, p1) -> None:
        if src == dst:
            return
        if self.ref.copy_collides(src, dst, p0, p1):
            self.remove(dst, 0, -1)
        empty = self.ref.pos_max(dst) < 0
        self.r.seq_cp(src, dst, p0, p1)
        self.ref.copy_sequence(src, dst, p0, p1)
        text = self.text[src] if empty and p0 <= 0 else None
        self.text[dst] = (
            [] if self.ref.pos_max(dst) < 0 else text and text[: p1 if p1 >= 0 else None]
        )

    def keep(self, seq) -> None:
        llama_cpp.llama_memory_seq_keep(self.r.mem, seq)
        self.ref.keep(seq)
        self.text = [text if s == seq else [] for s, text in enumerate(self.text)]

    def clear(self, data) -> None:
        llama_cpp.llama_memory_clear(self.r.mem, data)
        self.ref.keep(-1)
        self.text = [[] for _ in self.text]

    def shift(self, seq, p0, p1, by) -> None:
        if not self.r.can_shift() or self.ref.shift_collides(seq, p0, p1, by):
            return
        moved = [s for s in range(N_SEQ) if s == seq or self.ref.shares(s, seq)]
        self.r.seq_add(seq, p0, p1, by)
        self.ref.shift(seq, p0, p1, by)
        for s in moved:
            self.text[s] = None if self.ref.pos_max(s) >= 0 else []

    def close_gap(self, seq, p0, p1) -> None:
        """A piece is removed, what follows moves there."""
        self.remove(seq, p0, p1)
        self.shift(seq, p1, -1, p0 - p1)

    def save(self, slot, seq) -> None:
        texts = [text and list(text) for text in self.text]
        self.saved[slot] = seq, get_state(self.r, seq), self.ref.copy(), texts

    def load(self, slot, dst) -> None:
        if slot not in self.saved:
            return
        seq, data, ref, texts = self.saved[slot]
        origins = ref.origins(seq)
        if not origins <= {self.ref.origin}:
            self.refused += 1
            assert set_state(self.r, data, dst if seq >= 0 else -1) == 0
            if len(origins) == 1 and MIXED not in origins:
                self._load_with(*origins.pop(), slot, dst)
            return
        assert MIXED not in origins
        self.taken += bool(origins)
        if seq < 0:
            assert set_state(self.r, data, -1) == len(data)
            self.ref.restore(ref)
            self.text = [text and list(text) for text in texts]
        else:
            fits = self.ref.restore_sequence(ref, seq, dst)
            assert set_state(self.r, data, dst) == (len(data) if fits else 0)
            self.text[dst] = (texts[seq] and list(texts[seq])) if fits else []

    def mark(self, slot, seq) -> None:
        self.marks[slot] = seq, self.r.checkpoint(seq), self.ref.copy()

    def go_back(self, slot, dst) -> None:
        """A checkpoint is restored, perhaps to another sequence."""
        if slot not in self.marks:
            return
        seq, data, ref = self.marks[slot]
        dst = seq if dst < 0 else dst
        ends, may_refuse = self.ref.checkpoint_ends(ref, seq, dst)
        if not self.r.go_back(data, dst):
            assert may_refuse, "a checkpoint was refused"
            return
        end = self.r.seq_pos(dst)[1]
        assert end in ends, f"a checkpoint ends at {end}"
        self.gone_back += end >= 0
        self.ref.go_back(ref, seq, dst, end)
        self.text[dst] = self.text[dst] and self.text[dst][: end + 1]
        self.remove(dst, end + 1, -1)

    def way(self, slot, seq, tokens) -> None:
        """A checkpoint is made, tokens are read, and the checkpoint is restored."""
        self.mark(slot, seq)
        self.decode([(seq, token) for token in tokens], "last", False, None)
        self.go_back(slot, -1)

    def draft(self, seq, tokens, n) -> None:
        """Tokens are read, and the last n taken back."""
        self.decode([(seq, token) for token in tokens], "all", True, None)
        self.remove(seq, self.ref.pos_max(seq) + 1 - n, -1)

    def _load_with(self, force, shift, slot, dst) -> None:
        """Load the state with the settings that made it."""
        before = dict(self.ref.settings)
        for settings in ({"force": force, "shift": shift}, before):
            for name, value in settings.items():
                self.set(name, value)
            if settings is not before:
                self.load(slot, dst)


def get_state(r, seq: int) -> bytes:
    """A whole state (seq -1) or that of one sequence."""
    if seq < 0:
        size = llama_cpp.llama_state_get_size(r.ctx)
        buffer = (ctypes.c_uint8 * size)()
        n = llama_cpp.llama_state_get_data(r.ctx, buffer, size)
    else:
        size = llama_cpp.llama_state_seq_get_size(r.ctx, seq)
        buffer = (ctypes.c_uint8 * size)()
        n = llama_cpp.llama_state_seq_get_data(r.ctx, buffer, size, seq)
    assert n == size
    return bytes(buffer)


def set_state(r, data: bytes, seq: int) -> int:
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    if seq < 0:
        return llama_cpp.llama_state_set_data(r.ctx, buffer, len(data))
    return llama_cpp.llama_state_seq_set_data(r.ctx, buffer, len(data), seq)


def replay(tiny, path, ops, log=None) -> str:
    """Runs operations on a new context; what went wrong, or nothing."""
    machine = Machine(tiny, path, log)
    with machine.r:
        for i, op in enumerate(ops):
            try:
                machine.do(op)
            except AssertionError as exc:
                return f"operation {i}, {op}: {exc}"
    return ""


def shrink(tiny, path, ops, seconds: float = 20.0) -> list:
    """Leaves operations out as long as it still fails."""
    stop, size = time.monotonic() + seconds, max(1, len(ops) // 2)
    while size and time.monotonic() < stop:
        for i in range(len(ops) - size, -1, -size):
            if time.monotonic() < stop and replay(tiny, path, shorter := ops[:i] + ops[i + size :]):
                ops = shorter
        size //= 2
    return ops


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("case", ALL_CASES)
def test_random_operations(case, seed, tmp_path):
    tiny, path = make(case, tmp_path)
    rng, ops = np.random.default_rng([seed, *case.encode()]), []
    failed = ""
    with open(tmp_path / "ops.log", "w") as log:
        machine = Machine(tiny, path, log)
        with machine.r:
            try:
                for _ in range(OPERATIONS):
                    ops.append(next_operation(rng, machine.ref))
                    machine.do(ops[-1])
            except AssertionError as exc:
                failed = f"operation {len(ops)}: {exc}"
    if failed:
        ops = shrink(tiny, path, ops)
        why = replay(tiny, path, ops) or f"not again on a new context; {failed}"
        pytest.fail(f"{why}\nreplay(*make({case!r}, path), {ops})", pytrace=False)
    assert machine.compared >= 5 and machine.refused and machine.taken
    assert machine.gone_back >= 3
    assert machine.ended >= 3 or (tiny.recurrent and not tiny.n_back)
