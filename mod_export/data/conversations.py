"""Turn documents and conversations into token ids, and say which tokens are an answer's.

Example:

    ids, answers = encode(tokenizer, pieces, mark=True)     # of each piece int32 [n] and bool [n]
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from mod_export.data.sources import Piece
from mod_export.data.text import END
from mod_export.errors import UserError, template_error

Span = tuple[int, int]  # A span counts characters and does not include its end.


def encode(
    tokenizer, pieces: Sequence[Piece], mark: bool
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Return the token ids of each piece.

    The ids hold no special tokens but those of the chat template. With `mark` the function also
    returns which tokens are part of an assistant's answer, its end-of-turn token included. Text has
    no answers.

    Raises UserError naming the file and line where the chat template is missing or refuses a
    conversation.
    """
    if mark and not tokenizer.is_fast:
        raise UserError(
            "this tokenizer does not tell where its tokens are in the text",
            "use the loss on all tokens",
        )
    texts, spans = [], []
    for piece in pieces:
        text = piece.text + END if piece.messages is None else render(tokenizer, piece)
        texts.append(text)
        spans.append(answer_spans(tokenizer, piece, text) if mark and piece.messages else [])
    made = tokenizer(
        texts,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_offsets_mapping=mark,
    )
    ids = [np.array(x, np.int32) for x in made["input_ids"]]
    return ids, [
        _inside(o, s) for o, s in zip(made["offset_mapping"], spans, strict=True)
    ] if mark else None


def render(tokenizer, piece: Piece, count: int | None = None, prompt: bool = False) -> str:
    """Render the conversation, or its first `count` messages, through the chat template.

    With `prompt` the text goes up to where an answer begins.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{piece.where} is a conversation, and the model's tokenizer has no chat template",
            "use text, or a model tuned for chat",
        )
    try:
        return tokenizer.apply_chat_template(
            piece.messages[:count], tokenize=False, add_generation_prompt=prompt
        )
    except Exception as exc:  # whatever the template raises, such as "roles must alternate"
        raise template_error(exc, where=piece.where, cure="leave it out") from exc


def answer_spans(tokenizer, piece: Piece, full: str) -> list[Span]:
    """Find where the answers are in `full`, the rendered conversation.

    An answer goes from where the model would begin to write through its end-of-turn token. What the
    template adds after that token, such as a line end, is not the model's.

    The conversation is rendered up to each answer and through it. Where that is no beginning of
    `full` (templates that drop the reasoning of earlier answers), the answer's own text is looked
    for.
    """
    spans: list[Span] = []
    for i, message in enumerate(piece.messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip()
        before = render(tokenizer, piece, i, prompt=True) if i else ""
        through = render(tokenizer, piece, i + 1)
        # the answer lies behind all that both have in common, and what users say there
        least = max(spans[-1][1] if spans else 0, len(os.path.commonprefix([before, full])))
        start = len(before) if before and full.startswith(before) else full.find(content, least)
        if full.startswith(through):
            end = len(through.rstrip())
        else:
            turn = through[through.rfind(content) :].rstrip()
            at = full.find(turn, max(start, 0))
            end = at + len(turn) if at >= 0 else -1
        if not 0 <= start <= end:
            raise UserError(
                f"{piece.where}: cannot find the answers in what the chat template makes of it",
                "use the loss on all tokens",
            )
        spans.append((start, end))
    return spans


def _inside(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Which tokens overlap one of the spans, bool [n].

    Tokenizers may leave spaces out of a token's offsets, so a token reaches back to the end of the
    one before; and several tokens of one character have the same offsets.
    """
    first, last = np.array(offsets, np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(last)
    first = np.minimum(first, np.concatenate(([0], reached[:-1])) if len(first) else first)
    inside = np.zeros(len(first), bool)
    for start, end in spans:
        inside |= (last > start) & (first < end)
    return inside
