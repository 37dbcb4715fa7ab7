"""RULER's questions on documents: those that have the answer, among others that do not.

prompt = ask(rng, 12, library, library.questions[0])       # 12 documents
"""

from __future__ import annotations

import random

from mod_export.evaluation.ruler.made_up import Library, Question
from mod_export.evaluation.ruler.prompt import Prompt

ASKED = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


def ask(rng: random.Random, size: int, library: Library, question: Question) -> Prompt:
    """A question on `size` documents.

    Its own come first, then those that belong next to them, then any others; all are shuffled.
    """
    numbers = list(question.own)
    if missing := size - len(numbers):
        near = list(question.more)
        numbers += rng.sample(near, min(missing, len(near)))
    if missing := size - len(numbers):
        there = set(numbers)
        far = [number for number in range(len(library.documents)) if number not in there]
        numbers += rng.sample(far, missing)
    rng.shuffle(numbers)
    documents = "\n\n".join(
        f"Document {i}:\n{library.documents[number]}" for i, number in enumerate(numbers, 1)
    )
    return Prompt(
        f"{ASKED}\n\nThe following are given documents.\n\n{documents}\n\n",
        f"{ASKED}\n\nQuestion: {question.text}",
        "Answer:",
        question.answers,
    )


def ask_any(rng: random.Random, size: int, library: Library) -> Prompt:
    """Any question of the library on `size` documents, or on its own where these are more."""
    question = rng.choice(library.questions)
    return ask(rng, max(size, len(question.own)), library, question)
