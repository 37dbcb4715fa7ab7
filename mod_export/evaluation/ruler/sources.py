"""What RULER's tasks are made of: essays, words, and questions with documents.

The published tasks take Paul Graham's essays, the word lists of wonderwords, SQuAD and HotpotQA.
None of them comes with the package. A user gives essays and questions as files, in the forms in
which they are published. Where no file is given there are stand-ins: the packaged texts, their
words, and made-up questions (made_up.py).

    sources = read(essays="PaulGrahamEssays.json", squad="dev-v2.0.json")
    sources.stand_ins            # {"words": ..., "hotpotqa": ...}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mod_export.data.text import default_texts, read_texts
from mod_export.errors import UserError
from mod_export.evaluation.ruler import made_up
from mod_export.evaluation.ruler.made_up import Library, Question

STAND_INS = {
    "words": "words of the packaged texts, not of the lists of wonderwords",
    "essays": "the packaged texts, not Paul Graham's essays",
    "squad": "made-up documents and questions, not SQuAD's",
    "hotpotqa": "made-up documents and questions, not HotpotQA's",
}


@dataclass(frozen=True)
class Sources:
    """Texts of the tasks. stand_ins: what stands for each source that is not the published one."""

    essays: str
    squad: Library
    hotpotqa: Library
    stand_ins: Mapping[str, str]

    @cached_property
    def essay_words(self) -> list[str]:
        """The words of the essays, in order, with what is written at them."""
        return self.essays.split()

    @cached_property
    def words(self) -> list[str]:
        """The words of lists and keys, sorted: those of 4 to 10 letters in the packaged texts."""
        text = " ".join(default_texts())
        return sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])", text)))


def read(
    essays: str | Path | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
) -> Sources:
    """The files that are given, and stand-ins for the others.

    essays: text, or JSON with a `text`. squad: JSON of SQuAD 1.1 or 2.0. hotpotqa: JSON of
    HotpotQA's distractor setting. Raises UserError for a file of another form.
    """
    given = {"words": None, "essays": essays, "squad": squad, "hotpotqa": hotpotqa}
    return Sources(
        _essays(essays) if essays else "\n\n".join(reversed(default_texts())),
        _json(squad, "SQuAD", _squad) if squad else made_up.single_hop(),
        _json(hotpotqa, "HotpotQA", _hotpotqa) if hotpotqa else made_up.two_hops(),
        {name: STAND_INS[name] for name, path in given.items() if path is None},
    )


def _essays(path: str | Path) -> str:
    text = _json(path, "essays", lambda raw: raw["text"]) if _is_json(path) else read_texts([path])
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path} has no text", "give essays as text, or as JSON with a `text`")
    return text


def _is_json(path: str | Path) -> bool:
    return Path(path).suffix == ".json"


def _json(path: str | Path, what: str, build: Callable):
    """What `build` makes of a JSON file. Raises UserError where the file has another form."""
    text = read_texts([path])
    try:
        return build(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise UserError(
            f"{path} is no file of {what}", f"give the JSON in which {what} is published"
        ) from exc


def _squad(raw) -> Library:
    """Each paragraph is a document; those of the same article are the first distractors."""
    articles = [article["paragraphs"] for article in raw["data"]]
    documents = _numbered(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for article in articles:
        numbers = {documents[paragraph["context"]] for paragraph in article}
        for paragraph in article:
            own = documents[paragraph["context"]]
            questions += [
                Question(
                    asked["question"],
                    _texts(answer["text"] for answer in asked["answers"]),
                    (own,),
                    tuple(sorted(numbers - {own})),
                )
                for asked in paragraph["qas"]
                if not asked.get("is_impossible")
            ]
    return _library(documents, questions)


def _hotpotqa(raw) -> Library:
    """Each question has its ten documents."""

    def document(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = _numbered(document(*part) for item in raw for part in item["context"])
    return _library(
        documents,
        [
            Question(
                item["question"],
                _texts([item["answer"]]),
                tuple(dict.fromkeys(documents[document(*part)] for part in item["context"])),
            )
            for item in raw
        ],
    )


def _numbered(texts) -> dict[str, int]:
    return {text: number for number, text in enumerate(sorted(set(texts)))}


def _texts(texts) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(texts))
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise ValueError("an answer is no text")
    return found


def _library(documents: dict[str, int], questions: list[Question]) -> Library:
    if not questions:
        raise ValueError("no question")
    return Library(list(documents), questions)
