"""Checkpoints: the way back where a memory has given K/V back.

A MoD memory refuses to take back a tail where the next token would see K/V that are gone. A
checkpoint holds those that are about to go, so it is small, whatever the length of the text. The
library checks that the context still holds its tokens, made with the same thresholds.

    checkpoints = Checkpoints(limit=32, step=512, max_bytes=1 << 28)
    checkpoints.take(context, n_tokens=300, rollback=64)
    n = checkpoints.go_back(context, n_tokens=250)     # tokens that need not be read again
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from mod_export.runtime import bindings

import llama_cpp  # isort: skip

PARTIAL = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
SEQUENCE = 0  # the one of llama_cpp.Llama


def take_state(ctx, sequence: int) -> ctypes.Array | None:
    """What a sequence needs to end here again, beside what the memory keeps; None for nothing."""
    size = llama_cpp.llama_state_seq_get_size_ext(ctx, sequence, PARTIAL)
    data = (ctypes.c_uint8 * size)()
    got = llama_cpp.llama_state_seq_get_data_ext(ctx, data, size, sequence, PARTIAL)
    return data if size and got == size else None


def put_state(ctx, sequence: int, data: ctypes.Array) -> bool:
    """Put back what take_state gave; False where the library refuses it."""
    size = len(data)
    return size == llama_cpp.llama_state_seq_set_data_ext(ctx, data, size, sequence, PARTIAL)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a context after n_tokens tokens.

    fixed: from it, the context can go back to any number of tokens above.
    """

    n_tokens: int
    fixed: int
    data: ctypes.Array

    def fits(self, ctx) -> bool:
        """Whether the context still holds the tokens, as it would compute them now."""
        return bindings.llama_mod_checkpoint_fits(ctx, self.data, len(self.data), SEQUENCE)


@dataclass
class Checkpoints:
    """The checkpoints of a context, at most `limit` of them in at most `max_bytes`.

    The newest one is kept in any case.

    step: tokens from one to the next, while there is room for all; then some are left out.
    """

    limit: int
    step: int
    max_bytes: int
    _made: list[Checkpoint] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._made)

    @property
    def bytes(self) -> int:
        """Bytes that the checkpoints take."""
        return sum(len(checkpoint.data) for checkpoint in self._made)

    @property
    def last(self) -> int:
        """Tokens at the last checkpoint; 0 for none."""
        return self._made[-1].n_tokens if self._made else 0

    def clear(self) -> None:
        """Forget all checkpoints."""
        self._made.clear()

    def cut(self, n_tokens: int) -> None:
        """Forget the checkpoints of tokens that are no longer there, but for one more.

        A prompt that is asked again has its last token read again.
        """
        self._made = [c for c in self._made if c.n_tokens <= n_tokens + 1]

    def take(self, ctx, n_tokens: int, rollback: int) -> None:
        """Make a checkpoint of a context that holds n_tokens tokens.

        rollback: how many tokens one can go back from it. It replaces the last checkpoint where
        that is among them, and the one before is not more than a step away.
        """
        if self.limit < 1 or n_tokens < 1:
            return
        size = llama_cpp.llama_state_seq_get_size_ext(ctx, SEQUENCE, PARTIAL)
        if not size:
            return
        fixed = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(ctx), SEQUENCE)
        before = [c for c in self._made if c.n_tokens < n_tokens]
        if before and max(n_tokens - rollback, fixed) < before[-1].n_tokens:
            further = before[-2].n_tokens if len(before) > 1 else 0
            if n_tokens - further <= self.step:
                before.pop()
        self._made = before
        # Room is made first, so that there are never more bytes than allowed.
        while self._made and (len(self._made) >= self.limit or self.bytes + size > self.max_bytes):
            self._leave_one_out(n_tokens)
        if data := take_state(ctx, SEQUENCE):
            self._made.append(Checkpoint(n_tokens, fixed, data))

    def _leave_one_out(self, n_tokens: int) -> None:
        """Forget the one without which the longest way between two is the shortest.

        n_tokens: where one more will be made.
        """
        at = [0, *(c.n_tokens for c in self._made), n_tokens]
        gaps = [following - before for before, following in zip(at, at[2:], strict=False)]
        del self._made[gaps.index(min(gaps))]

    def go_back(self, ctx, n_tokens: int) -> int:
        """Have the context end at n_tokens tokens or less, and return how many it holds then.

        0 where no checkpoint fits; the context is as it was then.
        """
        usable = [c for c in self._made if c.fixed < n_tokens]
        usable.sort(key=lambda c: (min(c.n_tokens, n_tokens), -c.n_tokens), reverse=True)
        memory = llama_cpp.llama_get_memory(ctx)
        for checkpoint in usable:
            if checkpoint.fits(ctx) and put_state(ctx, SEQUENCE, checkpoint.data):
                held = llama_cpp.llama_memory_seq_pos_max(memory, SEQUENCE) + 1
                if held <= n_tokens or llama_cpp.llama_memory_seq_rm(
                    memory, SEQUENCE, n_tokens, -1
                ):
                    return min(held, n_tokens)
        return 0
