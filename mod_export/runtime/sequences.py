"""Many texts written at once: each job has a sequence of its own in one context.

Example:

    llm.new_context(n_ctx=4 * 512, n_seq_max=4)
    for number, result, n_tokens in write(llm, jobs, 4, max_tokens=100, sampling=Sampling()):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from mod_export.runtime.llama import MoDLlama, Row
from mod_export.runtime.sampling import Sampling

if TYPE_CHECKING:
    from llama_cpp._internals import LlamaSampler


@dataclass
class Written:
    """Tokens that the model wrote.

    ended: a token that ends a turn was the last one (it is not among the tokens). Otherwise the
    number of tokens has reached its limit.
    """

    tokens: list[int] = field(default_factory=list)
    ended: bool = False


# A job yields the tokens of a prompt and is sent what the model wrote after the prompt, once or
# several times. What it returns is its result.
Job = Generator[list[int], Written, object]


def write(
    llm: MoDLlama,
    jobs: Iterable[Job],
    parallel: int,
    max_tokens: int,
    sampling: Sampling,
    first: int = 0,
) -> Iterator[tuple[int, object, int]]:
    """Run jobs, `parallel` at a time; as one ends, the next one begins in its place.

    Yields (number, result of the job, tokens that were written for it) as the jobs end. The jobs
    are numbered from `first`. Each prompt and `max_tokens` must fit a sequence's part of the
    context.
    """
    numbered = zip(count(first), jobs, strict=False)
    free = list(range(parallel))[::-1]
    running: list[_Slot] = []
    while True:
        while free and (following := next(numbered, None)):
            number, job = following
            sampler = sampling.sampler(number, llm.n_vocab())
            slot = _Slot(llm, free[-1], number, job, sampler, max_tokens)
            if slot.begin():
                running.append(slot)
                free.pop()
            else:
                yield slot.end()
        if not running:
            return
        llm.decode_rows([slot.row() for slot in running])
        # All tokens are drawn before any sequence begins anew, which overwrites the logits.
        drawn = [slot.draw(i) for i, slot in enumerate(running)]
        still = []
        for slot, token in zip(running, drawn, strict=True):
            if slot.take(token):
                still.append(slot)
            else:
                free.append(slot.sequence)
                yield slot.end()
        running = still


@dataclass
class _Slot:
    """A job at work in a sequence of the context.

    position: where the next token goes. total: tokens of all texts of the job.
    """

    llm: MoDLlama
    sequence: int
    number: int
    job: Job
    sampler: LlamaSampler
    max_tokens: int
    position: int = 0
    total: int = 0
    written: Written = field(default_factory=Written)
    result: object = None

    def begin(self) -> bool:
        """Read the job's first prompt; False if the job ended."""
        return self._read(lambda: next(self.job))

    def row(self) -> Row:
        """The last token, as a row of a batch."""
        return self.written.tokens[-1], self.position, self.sequence, True

    def draw(self, row: int) -> int:
        """Draw the token that follows row `row` of the last batch."""
        self.position += 1
        return self.llm.sample_row(self.sampler, row)

    def take(self, token: int) -> bool:
        """Add a token, and let the job go on where its text is complete; False if the job ended."""
        self.total += 1
        # A control token ends a text too: not every chat format ends the user's turn with the token
        # that ends the assistant's.
        if self.llm.is_end(token) or self.llm.is_control(token):
            self.written.ended = True
        else:
            self.written.tokens.append(token)
        if not self.written.ended and len(self.written.tokens) < self.max_tokens:
            return True
        return self._read(lambda: self.job.send(self.written))

    def _read(self, ask: Callable[[], list[int]]) -> bool:
        """Read the job's next prompt and draw the first token after it; False if the job ended."""
        try:
            prompt = ask()
        except StopIteration as end:
            self.result = end.value
            return False
        self.llm.remove_tail(self.sequence)
        for start in range(0, len(prompt), self.llm.n_batch):
            part = prompt[start : start + self.llm.n_batch]
            self.llm.decode_rows(
                [
                    (token, position, self.sequence, position == len(prompt) - 1)
                    for position, token in enumerate(part, start)
                ]
            )
        self.position = len(prompt)
        self.written = Written()
        return self.take(self.llm.sample_row(self.sampler))

    def end(self) -> tuple[int, object, int]:
        """Free the sequence; what `write` yields for the job."""
        self.llm.remove_tail(self.sequence)
        self.sampler.close()
        return self.number, self.result, self.total
