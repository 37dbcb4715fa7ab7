"""Several sequences in one context: batches of their tokens, and many texts written at once.

new_context(llm, n_ctx=4 * 512, n_seq_max=4) for number, result, tokens in write(llm, jobs,
parallel=4, max_tokens=100, sampler=Sampling().sampler):
    ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

import llama_cpp
import numpy as np
from llama_cpp import _internals

from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama


@dataclass
class Written:
    """Tokens that the model wrote; ended: by a token that ends a turn (not among them), else they
    were enough.
    """

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


# yields the tokens of a prompt, is sent what the model wrote after it, once or several times;
# returns a result
Job = Generator[list[int], Written, object]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the likeliest. top_p 1 and min_p 0 are off.

    As in llama.cpp, top_p and min_p cut the model's own distribution, and the temperature applies
    to what is left.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0

    def sampler(self, number: int) -> _internals.LlamaSampler:
        """The sampler of job `number`: what it draws does not depend on the other jobs."""
        chain = _internals.LlamaSampler()
        if self.temperature == 0:
            chain.add_greedy()
            return chain
        if self.top_p < 1:
            chain.add_top_p(self.top_p)
        if self.min_p > 0:
            chain.add_min_p(self.min_p)
        chain.add_temp(self.temperature)
        # 31 bits: llama.cpp takes the largest 32-bit seed for "any"
        chain.add_dist(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) >> 1)
        return chain


def new_context(llm: MoDLlama, **params) -> None:
    """Replace the context by one with other llama_context_params; llama_cpp.Llama can make it for
    one sequence only.
    """
    llm._ctx.close()
    for name, value in params.items():
        setattr(llm.context_params, name, value)
    with llm._log() as log:
        try:
            llm._ctx = _internals.LlamaContext(
                model=llm._model, params=llm.context_params, verbose=False
            )
        except ValueError as exc:
            raise UserError(
                f"cannot create a context of {llm.context_params.n_ctx} tokens: {log[0] if log else exc}",
                "use a smaller context",
            ) from exc


def decode(llm: MoDLlama, rows: list[tuple[int, int, int, bool]]) -> float:
    """One batch of (token, position, sequence, whether its logits are wanted); the ms that it took."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, pos, seq, logits) in enumerate(rows):
        batch.token[i], batch.pos[i] = token, pos
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, seq, logits
    with llm._log() as log:
        start = time.perf_counter()
        code = llama_cpp.llama_decode(llm.ctx, batch)
        llama_cpp.llama_synchronize(llm.ctx)
        ms = (time.perf_counter() - start) * 1e3
    llama_cpp.llama_batch_free(batch)
    if code:
        raise UserError(
            f"llama_decode returned {code}{': ' + log[0] if log else ''}", "use a smaller context"
        )
    return ms


def write(
    llm: MoDLlama,
    jobs: Iterable[Job],
    parallel: int,
    max_tokens: int,
    sampler: Callable[[int], _internals.LlamaSampler],
    first: int = 0,
) -> Iterator[tuple[int, object, int]]:
    """Run jobs, `parallel` at a time; as one ends, the next begins in its place.

    Yields (number, what the job returned, how many tokens it had written) as they end. The jobs are
    numbered from `first`, and each prompt and `max_tokens` must fit a sequence's part of the
    context.
    """
    numbered, free, running = zip(count(first), jobs, strict=False), list(range(parallel))[::-1], []
    while True:
        while free and (following := next(numbered, None)):
            number, job = following
            slot = _Slot(llm, free[-1], number, job, sampler(number), max_tokens)
            if slot.begin():
                running.append(slot)
                free.pop()
            else:
                yield slot.end()
        if not running:
            return
        decode(llm, [slot.row() for slot in running])
        # all tokens are drawn before any sequence begins anew, which overwrites the logits
        drawn = [slot.draw(i) for i, slot in enumerate(running)]
        still = []
        for slot, token in zip(running, drawn, strict=True):
            if slot.take(token):
                still.append(slot)
            else:
                free.append(slot.seq)
                yield slot.end()
        running = still


@dataclass
class _Slot:
    """A job at work in a sequence of the context."""

    llm: MoDLlama
    seq: int
    number: int
    job: Job
    sampler: _internals.LlamaSampler
    max_tokens: int
    at: int = 0  # position of the token that comes next
    total: int = 0  # tokens of all that the job has had written
    written: Written = field(default_factory=Written)
    result: object = None

    def begin(self) -> bool:
        """The job's first prompt; False if the job ended."""
        return self._read(lambda: next(self.job))

    def row(self) -> tuple[int, int, int, bool]:
        """The last token, as a row of a batch."""
        return self.written.tokens[-1], self.at, self.seq, True

    def draw(self, row: int) -> int:
        """The token to follow that of row `row` of the last batch."""
        self.at += 1
        return self.sampler.sample(self.llm._ctx, row)

    def take(self, token: int) -> bool:
        """Adds a token; at the end of what is to be written the job goes on. False if the job
        ended.
        """
        llm, written = self.llm, self.written
        self.total += 1
        # control tokens too: not every chat format ends the user's turn as it ends the assistant's
        if llm.is_end(token) or llama_cpp.llama_vocab_is_control(llm._model.vocab, token):
            written.ended = True
        else:
            written.tokens.append(token)
        if not written.ended and len(written.tokens) < self.max_tokens:
            return True
        return self._read(lambda: self.job.send(written))

    def _read(self, ask: Callable[[], list[int]]) -> bool:
        """Reads the prompt that the job asks for and draws the first token after it; False if the
        job ended.
        """
        try:
            prompt = ask()
        except StopIteration as end:
            self.result = end.value
            return False
        llama_cpp.llama_memory_seq_rm(self.llm._ctx.memory, self.seq, -1, -1)
        for start in range(0, len(prompt), self.llm.n_batch):
            part = prompt[start : start + self.llm.n_batch]
            at = range(start, start + len(part))
            decode(
                self.llm,
                [(t, i, self.seq, i == len(prompt) - 1) for t, i in zip(part, at, strict=True)],
            )
        self.at, self.written = len(prompt), Written()
        return self.take(self.sampler.sample(self.llm._ctx, -1))

    def end(self) -> tuple[int, object, int]:
        llama_cpp.llama_memory_seq_rm(self.llm._ctx.memory, self.seq, -1, -1)
        self.sampler.close()
        return self.number, self.result, self.total
