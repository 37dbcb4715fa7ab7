"""A sampler of llama_cpp.Llama whose mistakes are errors: in llama.cpp they end the process.

Example:

    sampler = CheckedSampler(llm._init_sampler(...), n_vocab, processors)
    token = sampler.sample(llm._ctx, -1)
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mod_export.runtime import bindings  # noqa: F401  first: it tells of a missing llama_cpp
from mod_export.runtime.guard import InputError
from mod_export.runtime.log import kept_log, reason

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

# llama_token_data of llama.h
CANDIDATE = np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)], align=True)
FLOATS = ctypes.POINTER(ctypes.c_float)
WHOLE_NUMBERS = ("top_k", "mirostat_mode")


def check_sampling(options: dict) -> None:
    """Raise InputError for sampling parameters that are no finite numbers.

    A penalty of 0 would divide by it.
    """
    for name, value in options.items():
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise InputError(f"{name} {value!r} is no finite number", "use a number")
        if name in WHOLE_NUMBERS and value != int(value):
            raise InputError(f"{name} {value!r} is no whole number", "use a whole number")
    if options["repeat_penalty"] <= 0:
        raise InputError(f"repeat_penalty {options['repeat_penalty']} is not above 0", "1 is off")


def check_grammar(grammar: object, vocab: object) -> None:
    """Raise InputError for a grammar that llama.cpp cannot read: it would use a null pointer."""
    if not isinstance(grammar, llama_cpp.LlamaGrammar):
        raise InputError(
            f"{type(grammar).__name__} is no grammar", "use LlamaGrammar.from_string(text)"
        )
    with kept_log() as log:
        sampler = llama_cpp.llama_sampler_init_grammar(
            vocab, grammar._grammar.encode(), grammar._root.encode()
        )
    if not sampler:
        raise InputError(f"the grammar cannot be read: {reason(log)}", "correct the grammar")
    llama_cpp.llama_sampler_free(sampler)


class CallbackErrors:
    """Logits processors whose exceptions are kept: ctypes would print them and go on."""

    def __init__(self, processors: Sequence[Callable]):
        self._processors = processors
        self.error: BaseException | None = None

    def __call__(self, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """What the processors make of the logits [n_vocab]; these as they are after an error."""
        try:
            changed = logits
            for process in self._processors:
                changed = process(ids, changed)
            changed = np.asarray(changed, np.single)
            if changed.shape != logits.shape:
                raise InputError(
                    f"a logits processor returned the shape {changed.shape} for {logits.shape}",
                    "return a logit for each token",
                )
            if np.isnan(changed).any():
                raise InputError("a logits processor returned NaN", "return numbers or -inf")
            return changed
        except BaseException as exc:
            self.error = exc
            return logits

    def raise_error(self) -> None:
        """Raise what a processor raised."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class CheckedSampler:
    """A chain of samplers, and the processors of the caller that are its first part.

    `can_fail`: processors or a grammar may leave no token.
    """

    def __init__(
        self,
        chain: _internals.LlamaSampler,
        n_vocab: int,
        processors: CallbackErrors | None,
        can_fail: bool,
    ):
        self._chain, self._processors, self._can_fail = chain, processors, can_fail
        self._n_vocab = n_vocab
        self._first = True
        self._candidates = np.zeros(n_vocab if can_fail else 0, CANDIDATE)

    def sample(self, ctx: _internals.LlamaContext, row: int = -1) -> int:
        """The token that the chain draws from a row of the last batch.

        Raises InputError where the row has no logits or NaN, or no token is left to draw, and what
        a logits processor raised.
        """
        if self._can_fail or self._first:
            logits = row_logits(ctx, row, self._n_vocab)
            self._first = False
        else:  # NaN that is in a weight was there in the first row, other NaN reaches all logits
            logits = row_pointer(ctx, row)
            check_numbers(logits[0])
        if not self._can_fail:
            return self._chain.sample(ctx, row)
        token = self._draw(logits)
        llama_cpp.llama_sampler_accept(self._chain.sampler, token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        """llama_sampler_sample of llama.cpp up to where it would take any token."""
        candidates = self._candidates
        candidates["id"] = np.arange(len(candidates), dtype=np.intc)
        candidates["logit"], candidates["p"] = logits, 0
        data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data, len(candidates), -1, False)
        llama_cpp.llama_sampler_apply(self._chain.sampler, ctypes.byref(array))
        if self._processors:
            self._processors.raise_error()
        if not (
            0 <= array.selected < array.size and math.isfinite(array.data[array.selected].logit)
        ):
            raise InputError(
                "no token is left: the grammar, the logits processors or the bias exclude all",
                "allow some token",
            )
        return array.data[array.selected].id

    def close(self) -> None:
        """Frees the chain."""
        self._chain.close()


def row_pointer(ctx: _internals.LlamaContext, row: int) -> Any:
    """A pointer to the logits of a row of the last batch. Raises InputError where it has none."""
    pointer = llama_cpp.llama_get_logits_ith(ctx.ctx, row)
    if not pointer:
        raise InputError(f"row {row} of the last batch has no logits", "evaluate tokens first")
    return pointer


def row_logits(ctx: _internals.LlamaContext, row: int, n_vocab: int) -> np.ndarray:
    """The logits of a row of the last batch, float32 [n_vocab], valid until the next batch.

    Raises InputError where the row has none, or some that are NaN: llama.cpp would sort those.
    """
    pointer = ctypes.cast(row_pointer(ctx, row), FLOATS)
    logits = np.ctypeslib.as_array(pointer, (n_vocab,))
    check_numbers(np.dot(logits, logits))  # isnan of each takes twice as long
    return logits


def check_numbers(value: float) -> None:
    """Raise InputError where the value, made of logits, is NaN."""
    if math.isnan(value):
        raise InputError("the model computes NaN", "make the file again")
