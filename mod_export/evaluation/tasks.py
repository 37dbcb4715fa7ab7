"""Task files of multiple-choice questions: how they are read and put as text and as tokens.

A task file has a JSON object on each line, with the keys "question", "choices" and "answer". The
keys "task", "passage" and "subject" are optional. `answer` is the index of the right choice; where
`choices` is null, it is a text.

    items, skipped = read_tasks(["tasks.jsonl"], limit=50)
    encoded = [encode(tokenizer, item) for item in items]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mod_export.data.text import bos
from mod_export.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# task -> (text that is given, text that is scored), in the words of lm-evaluation-harness.
# {lettered}: the choices with letters, one a line. {before}, {after}: the parts of the question
# around its slot `_`; there the choice is given, not scored.
QUESTION = ("Question: {question}\nAnswer:", " {choice}")
PASSAGE = ("{passage}\nQuestion: {question}\nAnswer:", " {choice}")
CONTINUATION = ("{question}", " {choice}")
FORMATS = {
    "openbookqa": CONTINUATION,
    "hellaswag": CONTINUATION,
    "lambada": CONTINUATION,
    "winogrande": ("{before}{choice}", "{after}"),
    "mmlu": (
        "The following are multiple choice questions (with answers) about {subject}.\n\n"
        "{question}\n{lettered}\nAnswer:",
        " {letter}",
    ),
}
DEFAULT = QUESTION  # PASSAGE where an item has one
# Tasks without choices, which are right where greedy decoding gives the answer. Other items without
# choices are left out.
GREEDY = ("lambada",)


@dataclass(frozen=True)
class Item:
    """One question.

    texts: (given, scored) for each choice, or for the one answer of a GREEDY task. answer: index of
    the right one.
    """

    where: str
    task: str
    texts: list[tuple[str, str]]
    answer: int

    @property
    def greedy(self) -> bool:
        return self.task in GREEDY


@dataclass(frozen=True)
class Choices:
    """Texts as tokens; given: how many ids of each are given, not scored."""

    ids: list[list[int]]
    given: list[int]

    @property
    def n_tokens(self) -> int:
        """Tokens that are read; the shared beginning counts once."""
        return self.shared + sum(len(ids) - self.shared for ids in self.ids)

    @cached_property
    def shared(self) -> int:
        """How many tokens all choices begin with; none of these is scored."""
        shortest = min(self.given)
        columns = zip(*(ids[:shortest] for ids in self.ids), strict=True)
        return next((i for i, column in enumerate(columns) if len(set(column)) > 1), shortest)


@dataclass(frozen=True)
class Encoded(Choices):
    """The choices of an item."""

    item: Item


def read_tasks(
    paths: Sequence[str | Path], limit: int | None = None
) -> tuple[list[Item], dict[str, int]]:
    """The items of the files, the first `limit` of each task, and {task: items left out}.

    An item is left out if it has neither choices nor a GREEDY task. An item without a task belongs
    to the one that its file is named after. Raises UserError, naming the line, for a line that is
    no item, and where no item is left.
    """
    items: list[Item] = []
    count, skipped = Counter(), Counter()
    for path in paths:
        for where, raw in _lines(Path(path)):
            task = raw.get("task", Path(path).stem)
            if not isinstance(task, str):
                raise _bad(where, "has no text as its task", "write a string")
            if raw.get("choices") is None and task not in GREEDY:
                skipped[task] += 1
            elif limit is None or count[task] < limit:
                items.append(_item(where, task, raw))
                count[task] += 1
    if paths and not items:
        raise UserError(f"{paths[0]} holds nothing to choose from", "give items with `choices`")
    return items, dict(skipped)


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """(file and line number, object) of each line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UserError(f"{path} is not UTF-8 text", "give a JSONL task file") from exc
    except OSError as exc:
        raise UserError(f"cannot read {path}: {exc.strerror}", "check the path") from exc
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                raw = json.loads(line)
                # Half of a surrogate pair is no text, and cannot be encoded.
                json.dumps(raw, ensure_ascii=False).encode()
            except (ValueError, RecursionError):
                raw = None
            if not isinstance(raw, dict) or not {"question", "answer"} <= set(raw):
                raise _bad(
                    where,
                    "is no task item",
                    'write {"question": "...", "choices": ["..."], "answer": 0}',
                )
            yield where, raw


def _item(where: str, task: str, raw: dict) -> Item:
    choices, answer = raw.get("choices"), raw["answer"]
    if choices is not None and task in GREEDY:
        raise _bad(
            where, f"has choices, and {task} has none", "leave them out, or name another task"
        )
    if choices is None:
        choices, answer = [answer], 0
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise _bad(where, "has choices that are no texts", "write them as a list of strings")
    if len(choices) > len(LETTERS):
        raise _bad(where, f"has more than {len(LETTERS)} choices", "leave some out")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise _bad(
            where,
            f"has the answer {answer!r}, which is none of its {len(choices)} choices",
            "give the index of the right one, from 0",
        )
    for key in ("question", *(key for key in ("passage", "subject") if key in raw)):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise _bad(where, f"has no text as its {key}", "write a string")
    return Item(
        where, task, [_texts(where, task, raw, choices, i) for i in range(len(choices))], answer
    )


def _texts(where: str, task: str, raw: dict, choices: list[str], index: int) -> tuple[str, str]:
    """The given and the scored text of one choice; white space at the seam is scored."""
    before, slot, after = raw["question"].partition("_")
    fields = {
        "question": raw["question"],
        "choice": choices[index],
        "letter": LETTERS[index],
        "lettered": "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
        ),
    }
    fields |= {key: raw[key] for key in ("passage", "subject") if key in raw}
    if slot:
        fields |= {"before": before, "after": after}
    given, scored = FORMATS.get(task, PASSAGE if "passage" in raw else DEFAULT)
    try:
        given, scored = given.format(**fields), scored.format(**fields)
    except KeyError as exc:
        lacks = {"before": "slot `_` in its question"}.get(exc.args[0], exc.args[0])
        raise _bad(
            where, f"has no {lacks}, which {task} needs", "give it, or leave out the task's name"
        ) from exc
    stripped = given.rstrip()
    if not stripped or not scored.strip():
        raise _bad(where, "leaves nothing to score", "give some text on both sides of the slot")
    return stripped, given[len(stripped) :] + scored


def _bad(where: str, what: str, cure: str) -> UserError:
    return UserError(f"{where} {what}", cure)


def encode(tokenizer, item: Item) -> Encoded:
    """The item's tokens, with the model's own beginning (bos)."""
    begin = bos(tokenizer)

    def ids(text: str) -> list[int]:
        return begin + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    ids_all, n_given = [], []
    for given, scored in item.texts:
        alone, both = ids(given), ids(given + scored)
        # A token across the seam is scored, because a part of it belongs to the scored text.
        same = next(
            (i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone)
        )
        if not 0 < same < len(both):
            raise _bad(item.where, "has too few tokens to score", "give it a longer question")
        ids_all.append(both)
        n_given.append(same)
    return Encoded(ids_all, n_given, item)
