"""A text that is shorter than what is wanted is taken as it is, and said to be."""

import logging

import pytest

from mod_export.data.text import pack
from mod_export.errors import UserError
from mod_export.evaluation.run import EvaluationPlan, evaluate
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import byte_tokenizer


def test_what_is_there_is_packed():
    tokenizer = byte_tokenizer()
    assert pack(tokenizer, 98 * "a", 40, 4, least=16).shape == (2, 40)
    assert pack(tokenizer, 98 * "a", 200, 4, least=16).shape == (1, 100)
    assert pack(tokenizer, 998 * "a", 40, 4, least=16).shape == (4, 40)
    with pytest.raises(UserError, match="12 tokens where 16 are needed; give more text"):
        pack(tokenizer, 10 * "a", 40, 4, least=16)
    with pytest.raises(UserError, match="100 tokens where 160 are needed"):
        pack(tokenizer, 98 * "a", 40, 4)


def test_eval_takes_what_is_there(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mod_export")
    tiny.save_small(tmp_path / "mod", {"kv": [2, 3]})
    names = {"short.txt": 98, "middle.txt": 1100, "tiny.txt": 5}
    for name, size in names.items():
        (tmp_path / name).write_text(size * "a")
    texts = [str(tmp_path / name) for name in names]
    result = evaluate(tmp_path / "mod", EvaluationPlan(texts=texts[:2]))
    # the context of the model, 512, is less than the default of 2048
    assert [(row["sequences"], row["length"]) for row in result["texts"]] == [(1, 100), (2, 512)]
    assert caplog.messages == [
        f"note: {texts[0]} has one sequence of 100 tokens, not 512",
        f"note: {texts[1]} has 2 of 4 sequences of 512 tokens",
    ]
    for plan, message in (
        (EvaluationPlan(texts=texts[2:]), "tiny.txt: text too short: 7 tokens where 16"),
        (EvaluationPlan(texts=texts[:1], skip=99), "short.txt: skipping 99 of 100 tokens"),
        (EvaluationPlan(texts=texts[:1], length=513), "use at most 512 tokens with --length"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / "mod", plan)
