"""A thin context over llama.cpp's C functions for tests.

A decode takes chosen positions, sequences and outputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from mod_export.llamacpp import build as llama_build

F32, F16, Q8_0 = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0
THREADS = int(
    os.environ.get("MOD_EXPORT_TEST_THREADS", "1")
)  # more where races are looked for: scripts/sanitize.py
PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
FORCE = {"none": 0, "active": 1, "inactive": 2}


@llama_cpp.llama_log_callback
def _silent(level, text, user_data):
    pass


def stock_lib() -> Path:
    """Return the path of an unpatched libllama; the test is skipped if there is none."""
    if lib := llama_build.stock_lib():
        return lib
    if llama_build.installed_build() is None:  # the package as it comes from pip
        return Path(llama_cpp.__file__).parent / "lib"
    pytest.skip("needs the stock library: run `mod-export build --stock`")


class Raw:
    """A model and one context on it.

    By default K/V are in F32 and flash attention is off. The other choices round, and tests compare
    results closely.

    start: the position of the first token of a text. All methods count positions from there.
    """

    def __init__(
        self,
        path,
        n_ctx=512,
        n_batch=2048,
        n_ubatch=512,
        fa=False,
        kv=F32,
        n_seq=4,
        threads=THREADS,
        start=0,
        **params,
    ):
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        mp = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), mp)
        assert self.model, f"cannot load {path}"
        cp = llama_cpp.llama_context_default_params()
        cp.n_ctx, cp.n_batch, cp.n_ubatch, cp.n_seq_max = n_ctx, n_batch, n_ubatch, n_seq
        cp.n_threads = cp.n_threads_batch = threads
        cp.kv_unified, cp.no_perf = True, True
        cp.type_k = cp.type_v = kv
        cp.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if fa
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        for name, value in params.items():
            setattr(cp, name, value)
        self.ctx = llama_cpp.llama_init_from_model(self.model, cp)
        assert self.ctx, "cannot create the context"
        self.mem = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        self.pos, self.start = {}, start

    def try_decode(self, tokens, seqs=None, pos=None, logits=None) -> int:
        """Run llama_decode on one batch, and return the return code.

        seqs: the sequence of each token, by default 0.
        """
        n = len(tokens)
        seqs = [0] * n if seqs is None else seqs
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        following = dict(self.pos)
        for i, token in enumerate(tokens):
            at = following.get(seqs[i], 0) if pos is None else pos[i]
            following[seqs[i]] = at + 1
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = (
                int(token),
                at + self.start,
                1,
                seqs[i],
            )
            batch.logits[i] = 1 if logits is None else logits[i]
        batch.n_tokens = n
        rc = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if rc == 0:
            self.pos = following
        return rc

    def decode(self, tokens, seqs=None, pos=None, logits=None):
        """Decode one batch, and return its logits [n_outputs, n_vocab]."""
        rc = self.try_decode(tokens, seqs, pos, logits)
        assert rc == 0, f"llama_decode returned {rc}"
        n_out = len(tokens) if logits is None else int(sum(logits))
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.ctx), (n_out, self.n_vocab)
        ).copy()

    def decode_cut(self, tokens, size, seq=0):
        """Decode tokens in pieces, and return the logits and decisions of all tokens."""
        logits, active = [], []
        for i in range(0, len(tokens), size):
            part = tokens[i : i + size]
            logits.append(self.decode(part, [seq] * len(part)))
            active.append(self.trace()[0])
        return np.concatenate(logits), np.concatenate(active)

    def embeddings(self, n):
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_embeddings(self.ctx), (n, self.n_embd)
        ).copy()

    def _at(self, p: int) -> int:
        return p if p < 0 else p + self.start

    def seq_rm(self, seq, p0, p1=-1) -> bool:
        ok = llama_cpp.llama_memory_seq_rm(self.mem, seq, self._at(p0), self._at(p1))
        if ok and p1 < 0:
            self.pos[seq] = max(p0, 0)
        return ok

    def seq_cp(self, src, dst, p0=-1, p1=-1):
        llama_cpp.llama_memory_seq_cp(self.mem, src, dst, self._at(p0), self._at(p1))
        self.pos[dst] = self.seq_pos(dst)[1] + 1

    def seq_add(self, seq, p0, p1, by):
        llama_cpp.llama_memory_seq_add(self.mem, seq, self._at(p0), self._at(p1), by)

    def seq_pos(self, seq) -> tuple[int, int]:
        """Return where a sequence cannot end, and its last position; -1 where it is empty.

        A sequence cannot end at the first number and before, which a stock library takes for that
        of the first position.
        """
        first = llama_cpp.llama_memory_seq_pos_min(self.mem, seq)
        last = llama_cpp.llama_memory_seq_pos_max(self.mem, seq)
        return (first - self.start, last - self.start) if last >= 0 else (-1, -1)

    def checkpoint(self, seq=0) -> bytes:
        """Return the partial state of a sequence."""
        size = llama_cpp.llama_state_seq_get_size_ext(self.ctx, seq, PARTIAL)
        buffer = (ctypes.c_uint8 * size)()
        n = llama_cpp.llama_state_seq_get_data_ext(self.ctx, buffer, size, seq, PARTIAL)
        assert 0 < n == size
        return bytes(buffer)

    def go_back(self, data: bytes, seq=0) -> bool:
        """Restore a checkpoint; False where it is refused."""
        from mod_export.runtime import bindings

        buffer, size = (ctypes.c_uint8 * len(data)).from_buffer_copy(data), len(data)
        fits = bindings.llama_mod_checkpoint_fits(self.ctx, buffer, size, seq)
        read = llama_cpp.llama_state_seq_set_data_ext(self.ctx, buffer, size, seq, PARTIAL)
        assert read == (size if fits else 0)
        self.pos[seq] = self.seq_pos(seq)[1] + 1
        return fits

    def can_shift(self) -> bool:
        return llama_cpp.llama_memory_can_shift(self.mem)

    def rope_type(self) -> int:
        return llama_cpp.llama_model_rope_type(self.model)

    def clear(self):
        llama_cpp.llama_memory_clear(self.mem, True)
        self.pos = {}

    # what only the patched library has

    def trace(self):
        """Return decisions (uint8) and scores (float32) of the last decode, each [T, n_units]."""
        from mod_export.runtime import bindings

        return bindings.get_trace(self.model, self.ctx)

    def kv(self, layer=-1):
        from mod_export.runtime import bindings

        return bindings.get_kv_stats(self.ctx, layer)

    def set(self, **values):
        """Set runtime values of the context, such as force="active", shift=0.5 or kv_rollback=0."""
        from mod_export.runtime import bindings

        for name, value in values.items():
            value = FORCE[value] if name == "force" else value
            rc = getattr(bindings, f"llama_mod_set_{name}")(self.ctx, value)
            assert rc == 0, f"llama_mod_set_{name} returned {rc}"

    def close(self):
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
            llama_cpp.llama_model_free(self.model)
            self.ctx = self.model = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextlib.contextmanager
def aborting(r: Raw, after: int):
    """Let the abort callback stop a decode from its call number `after` on.

    The context yields a list, whose only item counts the calls.
    """
    calls = [0]

    @llama_cpp.ggml_abort_callback
    def callback(_data):
        calls[0] += 1
        return calls[0] > after

    llama_cpp.llama_set_abort_callback(r.ctx, callback, None)
    yield calls
    llama_cpp.llama_set_abort_callback(
        r.ctx, ctypes.cast(None, llama_cpp.ggml_abort_callback), None
    )
