"""Task files: every task's wording, what is refused, and where the scored tokens begin."""

import json

import pytest

from mod_export.errors import UserError
from mod_export.evaluation.tasks import LETTERS, encode, read_tasks
from tests.support.byte_tokenizer import byte_tokenizer

CHOICES = ["north", "a south wind"]
BASE = {"question": "Which one?", "choices": CHOICES, "answer": 1}
MMLU = (
    "The following are multiple choice questions (with answers) about reef lights.\n\nWhich one?\n"
    "A. north\nB. a south wind\nAnswer:"
)


def write(path, *items):
    path.write_text(
        "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items)
    )
    return path


@pytest.mark.parametrize(
    ("item", "texts"),
    [
        (
            {},
            [
                ("Question: Which one?\nAnswer:", " north"),
                ("Question: Which one?\nAnswer:", " a south wind"),
            ],
        ),
        (
            {"passage": "It blew."},
            [("It blew.\nQuestion: Which one?\nAnswer:", f" {choice}") for choice in CHOICES],
        ),
        (
            {"task": "arc_easy"},
            [("Question: Which one?\nAnswer:", f" {choice}") for choice in CHOICES],
        ),
        (
            {"task": "hellaswag", "question": "Sailing: he "},
            [("Sailing: he", f"  {choice}") for choice in CHOICES],
        ),
        ({"task": "openbookqa"}, [("Which one?", f" {choice}") for choice in CHOICES]),
        ({"task": "mmlu", "subject": "reef lights"}, [(MMLU, " A"), (MMLU, " B")]),
        (
            {"task": "winogrande", "question": "Not Ann but _ rowed.", "choices": ["Bo", "Cy"]},
            [("Not Ann but Bo", " rowed."), ("Not Ann but Cy", " rowed.")],
        ),
        ({"task": "lambada", "choices": None, "answer": "lamp"}, [("Which one?", " lamp")]),
    ],
)
def test_wording(tmp_path, item, texts):
    ((found,), skipped) = read_tasks([write(tmp_path / "quiz.jsonl", BASE | item)])
    assert found.texts == texts and found.answer == (0 if item.get("task") == "lambada" else 1)
    assert found.task == item.get("task", "quiz") and not skipped


def test_limits_are_for_each_task_and_what_has_no_choices_is_counted(tmp_path):
    free = {"task": "gsm8k", "question": "2 + 3?", "choices": None, "answer": "5"}
    file = write(
        tmp_path / "a.jsonl",
        *[BASE | {"task": task} for task in ("x", "x", "x", "y")],
        free,
        free,
        "",
    )
    items, skipped = read_tasks([file], limit=2)
    assert [item.task for item in items] == ["x", "x", "y"] and skipped == {"gsm8k": 2}
    with pytest.raises(UserError, match="nothing to choose from"):
        read_tasks([write(tmp_path / "b.jsonl", free)])
    with pytest.raises(UserError, match="nothing to choose from"):
        read_tasks([write(tmp_path / "c.jsonl")])


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("The quick brown fox", "is no task item"),
        ("[1, 2]", "is no task item"),
        ({"question": "q"}, "is no task item"),
        (r'{"question": "a \ud800 b", "choices": ["c"], "answer": 0}', "is no task item"),
        ("[" * 100_000, "is no task item"),
        (BASE | {"task": "lambada"}, "has choices, and lambada has none"),
        (BASE | {"answer": 2}, "answer 2, which is none of its 2 choices"),
        (BASE | {"answer": -1}, "answer -1"),
        (BASE | {"answer": "north"}, "answer 'north'"),
        (BASE | {"answer": True}, "answer True"),
        (BASE | {"choices": "north"}, "choices that are no texts"),
        (BASE | {"choices": ["a", ""]}, "choices that are no texts"),
        (BASE | {"choices": []}, "none of its 0 choices"),
        (BASE | {"question": " "}, "no text as its question"),
        (BASE | {"passage": None}, "no text as its passage"),
        (BASE | {"task": "winogrande"}, "no slot `_` in its question"),
        (BASE | {"task": "winogrande", "question": "Ann was _"}, "nothing to score"),
        (BASE | {"task": "mmlu"}, "no subject, which mmlu needs"),
        (
            BASE | {"task": "mmlu", "subject": "x", "choices": ["c"] * (len(LETTERS) + 1)},
            "more than 26 choices",
        ),
        (BASE | {"task": ["x"]}, "no text as its task"),
    ],
)
def test_bad_lines_are_named(tmp_path, item, told):
    with pytest.raises(UserError, match=r"quiz\.jsonl:2 ") as caught:
        read_tasks([write(tmp_path / "quiz.jsonl", BASE, item)])
    assert told in caught.value.message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        read_tasks([tmp_path / "none.jsonl"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_tasks([tmp_path / "binary"])


class Pairs:
    """A tokenizer whose tokens are pairs of characters: seams fall into tokens."""

    bos_token_id = 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [hash(text[i : i + 2]) for i in range(0, len(text), 2)]
        return {"input_ids": [0] * add_special_tokens + ids}


def test_scored_tokens_begin_at_the_seam(tmp_path):
    (item,), _ = read_tasks(
        [write(tmp_path / "quiz.jsonl", BASE | {"question": "one", "task": "openbookqa"})]
    )
    encoded = encode(byte_tokenizer(), item)
    assert (
        encoded.given == [3, 3]
        and encoded.shared == 3
        and [len(ids) for ids in encoded.ids] == [9, 16]
    )
    encoded = encode(Pairs(), item)  # bos, "on", then "e " which holds the seam
    assert encoded.given == [2, 2] and encoded.ids[0][:2] == [0, hash("on")]
    assert encoded.n_tokens == 2 + sum(len(ids) - 2 for ids in encoded.ids)
