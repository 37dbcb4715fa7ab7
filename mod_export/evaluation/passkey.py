"""Passkey retrieval: a number is hidden in a long text, and the model is asked for it.

    trials = make_trials(tokenizer, text, lengths=(1024, 4096), depths=(0.1, 0.5, 0.9), n=2)
    rows = by_length(retrieve(pair, trials))        # [{"length": 1024, "dense": 1.0, ...}, ...]

The task of Mohtashami and Jaggi (arXiv 2305.16300); the answer is generated, greedily, from K/V
that the model kept.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mod_export.data.text import begun, tokenize
from mod_export.errors import UserError
from mod_export.evaluation.generation import chat_frame, encode, greedy
from mod_export.evaluation.readers import Pair, Reader, Usage

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = (
    "Some important information is hidden in the following text. Find it and memorize it.\n\n"
    "{text}\n\n"
    "What is the pass key mentioned in the text?"
)
ANSWER = "The pass key is {key}."  # the prompt ends with its beginning, up to the key
SPARE_TOKENS = 4  # that an answer may be longer than the expected one, such as a line break


@dataclass(frozen=True)
class Trial:
    """A prompt with the key at `depth` (0: beginning of the text, 1: end).

    length: tokens of the prompt and the answer.
    """

    length: int
    depth: float
    key: str
    prompt: list[int]
    n_answer: int


@dataclass
class Cell:
    """The trials at one length and depth, and how many of them each model got right."""

    length: int
    depth: float
    trials: int = 0
    right: dict[str, int] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


def make_trials(
    tokenizer,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    n: int = 2,
    seed: int = 0,
) -> list[Trial]:
    """n prompts for each length and depth, each with its own part of the text and its own key.

    The text is repeated where it is too short. Raises UserError where a prompt does not fit into a
    length, and for an empty text.
    """
    hay = tokenize(tokenizer, haystack)
    if not hay:
        raise UserError("the passkey text is empty", "give a long text")
    trials = []
    for length in lengths:
        for depth in depths:
            for number in range(n):
                # A trial does not depend on which other trials run.
                rng = random.Random(f"{seed} {length} {depth} {number}")
                trials.append(_trial(tokenizer, hay, length, depth, rng))
    return trials


def _trial(tokenizer, hay: list[int], length: int, depth: float, rng: random.Random) -> Trial:
    key = str(rng.randrange(10000, 100000))
    first, last = chat_frame(tokenizer) or ("", "\n\n")
    before, _, after = QUESTION.partition("{text}")
    after += last
    head, tail, needle = (
        encode(tokenizer, text)
        for text in (first + before, after + ANSWER.format(key=key), NEEDLE.format(key=key))
    )
    head = begun(tokenizer, head)
    # The prompt has all that comes before the first digit. After `is` alone a model may speak of
    # the key instead of giving it.
    asked = next(
        i
        for i in range(len(encode(tokenizer, after)), len(tail))
        if re.search(r"\d", tokenizer.decode(tail[i : i + 1]))
    )
    n_hay = length - sum(map(len, (head, tail, needle))) - SPARE_TOKENS
    if n_hay < 1:
        raise UserError(
            f"a passkey prompt does not fit into {length} tokens",
            f"use {length - n_hay + 1} or more",
        )
    start = rng.randrange(max(1, len(hay) - n_hay + 1))
    text = (hay[start:] + hay * -(-n_hay // len(hay)))[:n_hay]
    cut = round(depth * n_hay)
    return Trial(
        length,
        depth,
        key,
        head + text[:cut] + needle + text[cut:] + tail[:asked],
        len(tail) - asked,
    )


def retrieve(pair: Pair, trials: Sequence[Trial], progress: Callable = iter) -> list[Cell]:
    """Ask both models; a cell for each length and depth, in the order of the trials."""
    cells: dict[tuple, Cell] = {}
    for trial in progress(trials):
        cell = cells.setdefault((trial.length, trial.depth), Cell(trial.length, trial.depth))
        cell.trials += 1
        for name, reader in pair.readers().items():
            text = generate(reader, trial.prompt, trial.n_answer + SPARE_TOKENS)
            cell.right[name] = cell.right.get(name, 0) + (first_number(text) == trial.key)
        cell.usage.add(pair.measured)
    return list(cells.values())


def first_number(text: str) -> str | None:
    """What counts as a model's answer."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def generate(reader: Reader, prompt: list[int], n_tokens: int) -> str:
    """Greedy continuation of the prompt, at most n_tokens, not beyond the end of a number."""
    reader.reset()
    row = reader.last(prompt)
    return greedy(reader, row, n_tokens, lambda text: bool(re.search(r"\d\D", text)))


def by_length(cells: Sequence[Cell]) -> list[dict]:
    """A row for each length, with the shares of keys that were found (in all, and by depth).

    mod, activation and kv_share are None where there is no MoD model.
    """
    rows = []
    for length in dict.fromkeys(cell.length for cell in cells):
        mine = [cell for cell in cells if cell.length == length]
        trials = sum(cell.trials for cell in mine)
        row: dict = {"length": length, "trials": trials}
        for name in ("dense", "mod"):
            there = name in mine[0].right
            row[name] = sum(cell.right[name] for cell in mine) / trials if there else None
            row[f"{name}_by_depth"] = (
                {f"{c.depth:g}": c.right[name] / c.trials for c in mine} if there else None
            )
        usage = Usage(
            *(
                sum(getattr(c.usage, f) for c in mine)
                for f in ("pairs", "active", "kv_shares", "sequences")
            )
        )
        row |= (
            usage.shares() if row["mod"] is not None else dict.fromkeys(("activation", "kv_share"))
        )
        rows.append(row)
    return rows
