"""Passkey prompts, and what counts as an answer."""

import pytest

from mod_export.data.text import default_texts
from mod_export.errors import UserError
from mod_export.evaluation import passkey
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer, with_bos

TEXT = default_texts()[1]


def test_passkey_prompts():
    tokenizer = tiny.tokenizer()
    trials = passkey.make_trials(
        tokenizer, "A long shore. " * 40, [256, 700], depths=[0, 0.5, 1], n=2
    )
    assert len(trials) == 12 and len({trial.key for trial in trials}) == 12
    for trial in trials:
        text = tokenizer.decode(trial.prompt)
        assert (
            text.endswith("<|im_start|>assistant\nThe pass key is ") and text.count(trial.key) == 2
        )
        assert len(trial.prompt) + trial.n_answer + passkey.SPARE_TOKENS == trial.length
        body = text[text.index("memorize it.") : text.index("What is the pass key")]
        assert body.index(trial.key) / len(body) == pytest.approx(trial.depth, abs=0.25)
    again = passkey.make_trials(tokenizer, "A long shore. " * 40, [700], depths=[1], n=1)
    assert again[0] == trials[10], "a trial depends on others"
    with pytest.raises(UserError, match="does not fit into 64 tokens; use 1"):
        passkey.make_trials(tokenizer, TEXT, [64])


@pytest.mark.parametrize(
    "template", [None, "<s>{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_passkey_prompts_have_one_beginning(template):
    tokenizer = with_bos(byte_tokenizer())
    tokenizer.chat_template = template
    (trial,) = passkey.make_trials(tokenizer, TEXT, [600], depths=[0.5], n=1)
    assert (
        trial.prompt[0] == tokenizer.bos_token_id
        and trial.prompt.count(tokenizer.bos_token_id) == 1
    )
    assert len(trial.prompt) + trial.n_answer + passkey.SPARE_TOKENS == 600


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 12345.", "12345"), (" **12345", "12345"), (" the lamp", None), (" 1, 2", "1")],
)
def test_number_in_an_answer(text, number):
    assert passkey.first_number(text) == number
