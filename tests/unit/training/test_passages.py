"""Training sequences that ask for passages of their own text."""

import numpy as np
import pytest
import torch

from mod_export.data.text import default_texts
from mod_export.errors import UserError
from mod_export.training.passages import (
    PASSAGE_TOKENS,
    REQUEST,
    TEXT_SHARE,
    WORDS_TOKENS,
    ask_for_passages,
)
from tests.support.byte_tokenizer import byte_tokenizer, with_bos

LENGTH = 1024
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


def item(tokenizer):
    ids = tokenizer(default_texts()[0], add_special_tokens=False)["input_ids"][:LENGTH]
    return {"input_ids": torch.tensor(ids), "loss": torch.zeros(LENGTH, dtype=torch.bool)}


@pytest.fixture(params=[CHATML, None], ids=["chat", "no template"])
def tokenizer(request):
    made = byte_tokenizer()
    made.chat_template = request.param
    return made


def test_the_text_is_followed_by_questions_about_it(tokenizer):
    plain = item(tokenizer)
    made = ask_for_passages(tokenizer, plain, 1.0, seed=0, number=3)
    assert made["input_ids"].shape == (LENGTH,) and made["input_ids"].dtype == torch.int64
    assert made["loss"].tolist() == [False] + [True] * (LENGTH - 1)
    text, written = (
        tokenizer.decode(ids)
        for ids in (plain["input_ids"][: int(TEXT_SHARE * LENGTH)], made["input_ids"])
    )
    before, *asked = written.split(REQUEST.format(""))
    assert text.strip() in before and len(asked) >= 2
    for answer in asked[:-1]:  # the last one may be cut
        parts = (
            answer.replace("</><assistant>", "\n\n")
            .replace("</><user>", "\n\n")
            .strip()
            .split("\n\n", 1)
        )
        words, passage = parts[0], parts[1].strip()
        assert passage in text and passage.startswith(words)
        assert (
            WORDS_TOKENS - 2 <= len(words) <= WORDS_TOKENS
            and PASSAGE_TOKENS - 2 <= len(passage) <= PASSAGE_TOKENS
        )
    if tokenizer.chat_template:
        assert written.startswith("<user>") and written.count("<assistant>") >= 2


def test_only_the_passages_count_where_only_answers_do():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = ask_for_passages(tokenizer, item(tokenizer), 1.0, seed=0, number=3, answers=True)
    every = ask_for_passages(tokenizer, item(tokenizer), 1.0, seed=0, number=3)
    assert torch.equal(made["input_ids"], every["input_ids"])
    written = tokenizer.decode(made["input_ids"][made["loss"]])
    expected = [
        part.split("</>")[0] + "</>"
        for part in tokenizer.decode(made["input_ids"]).split("<assistant>")[1:]
    ]
    assert written.startswith(expected[0]) and "Repeat" not in written and len(expected) >= 2


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_there_is_one_beginning_whoever_writes_it(begin):
    tokenizer = with_bos(byte_tokenizer())
    tokenizer.chat_template = (
        begin + CHATML + "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = ask_for_passages(tokenizer, item(tokenizer), 1.0, seed=0, number=3, answers=True)
    ids = made["input_ids"].tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    written = tokenizer.decode(made["input_ids"][made["loss"]])
    assert written.startswith(tokenizer.decode(ids).split("<assistant>")[1].split("</>")[0])


def test_it_depends_on_seed_and_number_alone(tokenizer):
    plain = item(tokenizer)
    ids = ask_for_passages(tokenizer, plain, 1.0, 0, 3)["input_ids"]
    assert torch.equal(ask_for_passages(tokenizer, plain, 1.0, 0, 3)["input_ids"], ids)
    others = [ask_for_passages(tokenizer, plain, 1.0, *at)["input_ids"] for at in ((1, 3), (0, 4))]
    assert not any(torch.equal(other, ids) for other in others)


@pytest.mark.parametrize("share, least, most", [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_a_share_of_the_sequences_is_changed(tokenizer, share, least, most):
    short = {
        "input_ids": torch.from_numpy(np.arange(40, 104)),
        "loss": torch.ones(64, dtype=torch.bool),
    }
    made = [ask_for_passages(tokenizer, short, share, 0, k) for k in range(200)]
    assert least <= sum(one is not short for one in made) <= most
    assert all(len(one["input_ids"]) == 64 for one in made)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[-1].content }}", "leaves messages out"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        ask_for_passages(tokenizer, item(tokenizer), 1.0, 0, 0)
