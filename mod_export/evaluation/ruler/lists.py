"""RULER's tasks that gather from the whole context: chains of variables, and frequent words.

Each function makes a prompt of a given size; the words are the published ones.
"""

from __future__ import annotations

import math
import random
import string

from mod_export.evaluation.ruler.prompt import NOISE, Prompt, spread
from mod_export.evaluation.ruler.sources import Sources

HOPS = 4
EXAMPLE_LINES = 10  # of noise in the example of variable tracking

COMMON_COUNT = 10
# (words of the example, its repeats of common words, of others; the same repeats of the list).
# Contexts of fewer than SHORT_TOKENS have fewer repeats.
SHORT_TOKENS = 4096
SHORT_REPEATS, LONG_REPEATS = (20, (3, 1), (6, 1)), (40, (10, 3), (30, 3))

CODED_LETTERS = 6
FREQUENT_COUNT = 3
LEAST_CODED_WORDS = 200  # so that the counts of the first ranks differ
TOKENS_PER_CODED_WORD = 50  # tokens of the context for each word of the vocabulary


def variable_tracking(rng: random.Random, size: int, _sources: Sources, _length: int) -> Prompt:
    """Name all variables of a chain of assignments in `size` lines of noise; one example first."""
    example = _chain(rng, EXAMPLE_LINES, 3)
    asked = _chain(rng, size, 5)
    return Prompt(
        f"{_whole(example)}\n\n{asked.context}", asked.question, asked.begun, asked.answers
    )


def _chain(rng: random.Random, size: int, letters: int) -> Prompt:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = rng.randrange(10000, 99999)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
    context = "\n".join(spread(rng, [NOISE] * size, chain))
    return Prompt(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        names,
    )


def common_words(rng: random.Random, size: int, sources: Sources, length: int) -> Prompt:
    """Name the ten words that a list repeats most; `size` words in all, and one example first."""
    n_example, example_repeats, repeats = SHORT_REPEATS if length < SHORT_TOKENS else LONG_REPEATS
    example = _word_list(rng, sources.words, n_example, *example_repeats)
    asked = _word_list(rng, sources.words, size, *repeats)
    return Prompt(
        f"{_whole(example, numbered=True)}\n{asked.context}",
        asked.question,
        asked.begun,
        asked.answers,
    )


def _word_list(
    rng: random.Random, words: list[str], size: int, common: int, uncommon: int
) -> Prompt:
    chosen = rng.sample(words, size)
    often = chosen[:COMMON_COUNT]
    listed = often * common + chosen[COMMON_COUNT:] * uncommon
    rng.shuffle(listed)
    return Prompt(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(listed)}\n",
        f"Question: What are the {COMMON_COUNT} most common words in the above list?",
        f"Answer: The top {COMMON_COUNT} words that appear most often in the list are:",
        often,
    )


def frequent_words(rng: random.Random, size: int, _sources: Sources, length: int) -> Prompt:
    """Name the three commonest made-up words of a text whose counts follow a zeta distribution.

    The word of rank k comes size / (k^2 zeta(2)) times. The commonest of all is dots, which do not
    count.
    """
    count = length // TOKENS_PER_CODED_WORD
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
    ranked = ["...", *words][:count]
    text = [
        word
        for rank, word in enumerate(ranked, 1)
        for _ in range(int(size / (rank * rank * math.pi**2 / 6)))
    ]
    rng.shuffle(text)
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(text)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        ranked[1 : 1 + FREQUENT_COUNT],
    )


def _whole(example: Prompt, numbered: bool = False) -> str:
    """An example with its answer."""
    answer = _numbered(example.answers) if numbered else " ".join(example.answers)
    return f"{example.context}{example.question} {example.begun} {answer}"


def _numbered(words) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
