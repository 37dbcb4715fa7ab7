"""Decisions of the runtime, for a picture."""

import logging

import pytest

from mod_export.errors import UserError
from mod_export.runtime.llama import MoDLlama
from mod_export.trace import read_decisions

QUESTION = "What is a lighthouse?"


@pytest.fixture(scope="module")
def llm(model):
    with_all_units = MoDLlama(model, n_ctx=512)
    with_all_units.force = "active"  # as the original model answers
    yield with_all_units
    with_all_units.close()


def test_a_model_that_ends_the_text_at_once_is_said_to(llm, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    found = read_decisions(llm, QUESTION, generate=20)
    assert len(found.texts) == found.n_prompt == 5
    assert [line for line in caplog.messages if not line.endswith(" so far")] == [
        "note: the model ended the text after 0 of 20 tokens; with --chat the prompt is a question "
        "that the model answers"
    ]


def test_a_question_is_answered(llm, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    found = read_decisions(llm, QUESTION, generate=20, chat=True)
    text = "".join(found.texts)
    assert text.startswith("<|im_start|>system") and QUESTION in text
    assert len(found.texts) == found.n_prompt + 20
    assert "lighthouse" in "".join(found.texts[found.n_prompt :])
    assert not any(line.startswith("note") for line in caplog.messages)


def test_an_empty_prompt(llm):
    for chat in (False, True):
        with pytest.raises(UserError, match="the prompt is empty"):
            read_decisions(llm, "", chat=chat)
