"""RULER's 13 tasks: what each asks, and samples of them that fill a number of tokens.

samples = make_samples(tokenizer, read(), ["niah_single_1"], [4096], n=10)
samples[0].context, samples[0].question         # token ids: read first, read after
samples[0].score("... 1234567")                 # share of the answers that are in a text
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mod_export.data.text import begun
from mod_export.errors import UserError
from mod_export.evaluation.generation import chat_frame, encode
from mod_export.evaluation.ruler import lists, needles, questions
from mod_export.evaluation.ruler.prompt import Prompt
from mod_export.evaluation.ruler.sources import Sources

LENGTHS = (2048, 4096, 8192)
SAMPLE_COUNT = 10
UNLIMITED_SIZE = 1 << 30
# A question whose own documents do not fit gives way to another, at most so often.
ATTEMPT_COUNT = 50


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    make: (rng, size, sources, length) to a prompt; its tokens grow with the size. n_answer: tokens
    that a model may generate. least: the smallest size. most: the largest one. any_answer: one of
    the answers is enough. uses: names of the sources that it is made of.
    """

    make: Callable[[random.Random, int, Sources, int], Prompt]
    n_answer: int
    uses: tuple[str, ...] = ()
    least: int = 1
    most: Callable[[Sources], int] = lambda _sources: UNLIMITED_SIZE
    any_answer: bool = False


def _needles(haystack: str, keys: str = "words", **options) -> Task:
    def make(rng: random.Random, size: int, sources: Sources, _length: int) -> Prompt:
        return needles.needles(rng, size, sources, haystack, keys, **options)

    uses = (("words",) if keys == "words" else ()) + (("essays",) if haystack == "essay" else ())
    return Task(make, n_answer=128, uses=uses, least=max(1, options.get("n_keys", 1) - 1))


def _questions(name: str) -> Task:
    def make(rng: random.Random, size: int, sources: Sources, _length: int) -> Prompt:
        return questions.ask_any(rng, size, getattr(sources, name))

    def most(sources: Sources) -> int:
        return len(getattr(sources, name).documents)

    return Task(make, n_answer=32, uses=(name,), most=most, any_answer=True)


_essay = partial(_needles, haystack="essay")

# The settings of the paper (appendix B) and of its published configuration.
TASKS = {
    "niah_single_1": _needles(haystack="noise"),
    "niah_single_2": _essay(),
    "niah_single_3": _essay(values="uuids"),
    "niah_multikey_1": _essay(n_keys=4),
    "niah_multikey_2": _needles(haystack="needles"),
    "niah_multikey_3": _needles(haystack="needles", keys="uuids", values="uuids"),
    "niah_multivalue": _essay(n_values=4),
    "niah_multiquery": _essay(n_keys=4, n_queries=4),
    "vt": Task(lists.variable_tracking, n_answer=30, least=lists.HOPS),
    "cwe": Task(
        lists.common_words,
        n_answer=120,
        uses=("words",),
        least=lists.COMMON_COUNT,
        most=lambda sources: len(sources.words),
    ),
    "fwe": Task(lists.frequent_words, n_answer=50, least=lists.LEAST_CODED_WORDS),
    "qa_1": _questions("squad"),
    "qa_2": _questions("hotpotqa"),
}


def stand_ins(sources: Sources, tasks: Sequence[str]) -> dict[str, str]:
    """What stands for the published sources of these tasks, by the name of the source."""
    used = {name for task in tasks for name in TASKS[task].uses}
    return {name: text for name, text in sources.stand_ins.items() if name in used}


@dataclass(frozen=True)
class Sample:
    """A prompt of a task as tokens.

    length: tokens that context, question and answer may have. context: is read before the model
    can know the question. question: is read then; it ends with the beginning of the answer.
    """

    task: str
    length: int
    number: int
    context: list[int]
    question: list[int]
    answers: Sequence[str]

    @property
    def n_answer(self) -> int:
        """Tokens that a model may generate."""
        return TASKS[self.task].n_answer

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, and of an answer of full length."""
        return len(self.context) + len(self.question) + self.n_answer

    def score(self, text: str) -> float:
        """The share of the answers that stand in the text, in any case; 0 or 1 for questions."""
        found = [answer.lower() in text.lower() for answer in self.answers]
        return float(any(found)) if TASKS[self.task].any_answer else sum(found) / len(found)


def make_samples(
    tokenizer,
    sources: Sources,
    tasks: Sequence[str],
    lengths: Sequence[int],
    n: int = SAMPLE_COUNT,
    seed: int = 0,
) -> list[Sample]:
    """n samples of each task and length, each as large as fits.

    A sample depends on its own task, length, number and seed only. Raises UserError where a task
    does not fit into a length.
    """
    frame = chat_frame(tokenizer) or ("", " ")
    return [
        _sample(tokenizer, frame, sources, task, length, number, seed)
        for length in lengths
        for task in tasks
        for number in range(n)
    ]


def _sample(
    tokenizer,
    frame: tuple[str, str],
    sources: Sources,
    name: str,
    length: int,
    number: int,
    seed: int,
) -> Sample:
    task = TASKS[name]
    before, after = frame

    def make(size: int, attempt: int) -> Sample:
        rng = random.Random(f"{seed} {name} {length} {number} {attempt}")
        prompt = task.make(rng, size, sources, length)
        return Sample(
            name,
            length,
            number,
            begun(tokenizer, encode(tokenizer, before + prompt.context)),
            encode(tokenizer, f"{prompt.question}{after}{prompt.begun}"),
            prompt.answers,
        )

    smallest = []
    for attempt in range(ATTEMPT_COUNT):
        sample = make(task.least, attempt)
        smallest.append(sample.n_tokens)
        if sample.n_tokens <= length:
            return _largest(partial(make, attempt=attempt), sample, task.least, task.most(sources))
    raise UserError(
        f"{name} does not fit into {length} tokens",
        f"use {min(smallest)} or more as --ruler-lengths",
    )


def _largest(make: Callable[[int], Sample], best: Sample, least: int, most: int) -> Sample:
    """The sample of the largest size that fits. best: that of size `least`, which does.

    Tokens grow nearly in proportion to the size, so that few sizes have to be tried.
    """
    start = best.n_tokens
    low, high, size = least, most + 1, least + 10
    while high - low > 1:
        size = min(max(size, low + 1), high - 1)
        sample = make(size)
        each = max(sample.n_tokens - start, 1) / (size - least)
        if sample.n_tokens <= best.length:
            low, best = size, sample
        else:
            high = size
        size = low + int((best.length - best.n_tokens) / each)
    return best
