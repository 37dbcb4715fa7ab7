"""What a task of RULER makes: a prompt in two parts, the first of which is read alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Prompt:
    """A context, a question that the context does not have, and the beginning of the answer.

    answers: what has to be found.
    """

    context: str
    question: str
    begun: str
    answers: Sequence[str]


def spread(rng: random.Random, lines: Sequence[str], others: Sequence[str]) -> list[str]:
    """The lines with the others between them, at most one at a place, both in their order."""
    places = sorted(rng.sample(range(len(lines) + 1), len(others)))
    result = list(lines)
    for place, other in reversed(list(zip(places, others, strict=True))):
        result.insert(place, other)
    return result
