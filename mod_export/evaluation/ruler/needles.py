"""RULER's needles in a haystack: eight tasks that look up values of keys in a long text.

prompt = needles(rng, 900, sources, haystack="essay", n_keys=4)       # 900 words of essays
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable

from mod_export.evaluation.ruler.prompt import NOISE, Prompt, spread
from mod_export.evaluation.ruler.sources import Sources

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# Needles among essays lie at some of so many depths, from the beginning to the end.
DEPTH_COUNT = 40


def needles(
    rng: random.Random,
    size: int,
    sources: Sources,
    haystack: str,
    keys: str = "words",
    values: str = "numbers",
    n_keys: int = 1,
    n_values: int = 1,
    n_queries: int = 1,
) -> Prompt:
    """Ask for all values of `n_queries` of `n_keys` keys, each of which has `n_values` values.

    size: of the haystack, in words ("essay"), or in lines of "noise" or of other "needles". keys,
    values: "words", "numbers" or "uuids".
    """
    make_key, make_value = _unique(rng, sources, keys), _unique(rng, sources, values)
    found = {make_key(): [make_value() for _ in range(n_values)] for _ in range(n_keys)}
    hidden = [
        NEEDLE.format(kind=values, key=key, value=value)
        for key, own in found.items()
        for value in own
    ]
    rng.shuffle(hidden)
    if haystack == "essay":
        context = _among_sentences(rng, " ".join(_words(sources.essay_words, size)), hidden)
    else:
        lines = [
            NOISE
            if haystack == "noise"
            else NEEDLE.format(kind=values, key=make_key(), value=make_value())
            for _ in range(size)
        ]
        context = "\n".join(spread(rng, lines, hidden))
    asked = rng.sample(list(found), n_queries)
    return _prompt(context, asked, [value for key in asked for value in found[key]], values)


def _prompt(context: str, asked: list[str], answers: list[str], kind: str) -> Prompt:
    """The published words, which differ for one value and for several."""
    query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
    if len(answers) == 1:
        kind = kind.removesuffix("s")
        some, be, be_all = f"A special magic {kind} is", "is", "is the"
    else:
        some, be, be_all = f"Some special magic {kind} are", "are", "are all the"
    return Prompt(
        f"{some} hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {kind} afterwards.\n{context}\n",
        f"What {be_all} special magic {kind} for {query} mentioned in the provided text?",
        f"The special magic {kind} for {query} mentioned in the provided text {be}",
        answers,
    )


def _unique(rng: random.Random, sources: Sources, kind: str) -> Callable[[], str]:
    """A function that makes another word, number or UUID each time."""
    made = set()
    draw = {
        "words": lambda: f"{rng.choice(sources.words)}-{rng.choice(sources.words)}",
        "numbers": lambda: str(rng.randrange(10**6, 10**7)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }[kind]

    def make() -> str:
        while (text := draw()) in made:
            pass
        made.add(text)
        return text

    return make


def _words(words: list[str], size: int) -> list[str]:
    """The first `size` words of a text, which is repeated where it is too short."""
    return (words * -(-size // len(words)))[:size]


def _among_sentences(rng: random.Random, text: str, hidden: list[str]) -> str:
    """The text with the needles between its sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    depths = sorted(rng.sample(range(DEPTH_COUNT), len(hidden)))
    for depth, needle in reversed(list(zip(depths, hidden, strict=True))):
        sentences.insert(round(len(sentences) * depth / (DEPTH_COUNT - 1)), needle)
    return " ".join(sentences)
