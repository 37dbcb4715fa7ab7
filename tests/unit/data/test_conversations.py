"""Which tokens are an answer's, in many chat templates."""

import pytest
import torch

from mod_export.errors import UserError
from tests.support import tiny_torch as tiny
from tests.support.byte_tokenizer import TEXT, byte_tokenizer
from tests.support.training_text import CHAT, all_ids, answers_of, write


def test_answers_are_the_assistants_words_and_the_end_of_turn(opened, tmp_path):
    tokenizer = tiny.tokenizer()
    path = write(
        tmp_path / "c.jsonl.gz", [{"messages": CHAT[:2]}, {"messages": CHAT}, {"text": TEXT}]
    )
    packed = opened(tokenizer, [path], 60, loss_on="answers")
    first, second = (f"{CHAT[i]['content']}<|im_end|>" for i in (1, 3))
    assert answers_of(tokenizer, packed) in (first + first + second, first + second + first)
    everything = opened(tokenizer, [path], 60)
    assert torch.equal(all_ids(packed), all_ids(everything))
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in (CHAT[:2], CHAT)]
    whole = tokenizer.decode(everything.source.read(0, everything.source.count)[0])
    assert all(text in whole for text in texts)
    for i in range(len(packed)):
        assert packed[i]["loss"].tolist() == [False, *packed.source.read(60 * i, 60)[1][1:]]
        assert everything[i]["loss"].sum() == 59


TEMPLATES = {  # template -> what the answers of CHAT are in it
    # no end of turn, a space before the answer, content stripped
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content.strip() }}</s>{% endif %}{% endfor %}": [
        " Hello\n\n  you 🐛</s>",
        " Ωmega, 12.5 % of it</s>",
    ],
    # reasoning in the last answer only, as in templates of reasoning models
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
    "<think></think>{% endif %}{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}": [
        CHAT[1]["content"] + "<end>",
        "<think></think>" + CHAT[3]["content"] + "<end>",
    ],
    # a generation prompt that no finished turn holds, and an answer that is among the user's words
    # too
    "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}{% if m.role == 'user' %} "
    + CHAT[1]["content"].strip()
    + "{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}": [
        "Hello\n\n  you 🐛<end>",
        "Ωmega, 12.5 % of it<end>",
    ],
    # no generation prompt, and the header is the template's word, so it is the model's too
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}": [
        "assistant: Hello\n\n  you 🐛",
        "assistant: Ωmega, 12.5 % of it",
    ],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_in_other_templates(template, opened, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    packed = opened(
        tokenizer, [write(tmp_path / "c.jsonl", [{"messages": CHAT}])], 2, loss_on="answers"
    )
    assert answers_of(tokenizer, packed) == "".join(TEMPLATES[template])


def test_offsets_without_spaces_make_the_same_marks(opened, tmp_path):
    """Many tokenizers leave the space before a word out of the word's offsets."""
    from tokenizers import processors

    path = write(tmp_path / "c.jsonl", [{"messages": CHAT[2:]}, {"messages": [CHAT[0], CHAT[3]]}])
    plain, trimmed = byte_tokenizer(), byte_tokenizer()
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for tokenizer in (plain, trimmed):
        tokenizer.chat_template = next(iter(TEMPLATES))
    marks = [
        t.read(0, t.count)[1]
        for t in (opened(x, [path], 8, loss_on="answers").source for x in (plain, trimmed))
    ]
    assert marks[0].tolist() == marks[1].tolist() and 0 < marks[0].sum() < len(marks[0])


def test_a_template_that_refuses_is_quoted(opened, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "c.jsonl", [{"messages": CHAT}])
    with pytest.raises(
        UserError, match="c.jsonl, line 1: .*refuses this conversation: roles must alternate"
    ):
        opened(tokenizer, [path], 64)
