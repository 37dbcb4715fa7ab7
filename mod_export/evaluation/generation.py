"""Prompts and greedy answers, for what `mod-export eval` lets a model generate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mod_export.errors import template_error
from mod_export.evaluation.readers import Reader


def encode(tokenizer, text: str) -> list[int]:
    """The tokens of a part of a prompt."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def chat_frame(tokenizer) -> tuple[str, str] | None:
    """What stands before and after a user's words in the model's chat format, None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "\0"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as exc:  # whatever the template raises
        raise template_error(exc, "a question") from exc
    before, _, after = text.partition("\0")
    return before, after


@torch.no_grad()
def greedy(reader: Reader, row: torch.Tensor, n_tokens: int, enough: Callable[[str], bool]) -> str:
    """The likeliest text after what the reader has read, at most n_tokens long.

    row: logits [n_vocab] of the first token. enough: whether nothing that follows a text matters.
    """
    ids: list[int] = []
    text = ""
    while len(ids) < n_tokens and (token := int(row.argmax())) != reader.tokenizer.eos_token_id:
        ids.append(token)
        text = reader.tokenizer.decode(ids)
        if enough(text):
            break
        row = reader.last([token])
    return text
