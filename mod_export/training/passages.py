"""Training sequences that ask for what was said long before.

Ordinary text seldom needs a name or a number from a thousand tokens ago, so routers of K/V trained
on it alone do not keep them. In some sequences the text becomes what a user says, who then asks for
passages of the text by their first words. The original model answers by copying. The student must
copy too, from the K/V that its routers kept.

Source: KVzip (Kim et al., arXiv 2505.23416), which scores K/V by their use in repeating the
context.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mod_export.data.conversations import encode, render
from mod_export.data.sources import Piece
from mod_export.data.text import begun
from mod_export.errors import UserError

# Largest share of the text in a sequence. Questions and answers are the rest.
TEXT_SHARE = 3 / 4
# Tokens of a passage, and how many of them the question gives.
PASSAGE_TOKENS = 48
WORDS_TOKENS = 8
# The name of the text in error messages.
TEXT_NAME = Path("the training text")
REQUEST = "Repeat the passage that begins with: {}"


def ask_for_passages(
    tokenizer,
    item: dict[str, torch.Tensor],
    share: float,
    seed: int,
    number: int,
    answers: bool = False,
) -> dict[str, torch.Tensor]:
    """Make a conversation about its text of a share of the items, and return the others unchanged.

    The conversation has the model's chat format where the model has one. The same seed and number
    give the same result. All tokens count in the loss; with `answers`, those of the passages only.

    item: input_ids, loss and novel, each [T], as PackedData has them. share: the chance of an item.
    number: the number of the item. Raises UserError where the chat template refuses the
    conversation, or leaves parts of it out.
    """
    rng = np.random.RandomState([seed, 1, number])
    if rng.random_sample() >= share:
        return item
    ids, length = item["input_ids"].tolist(), len(item["input_ids"])
    text, messages, made = ids[: int(TEXT_SHARE * length)], [], []
    document = tokenizer.decode(text, skip_special_tokens=True).strip() + "\n\n"
    while len(made) < length:
        start = rng.randint(0, max(1, len(text) - PASSAGE_TOKENS))
        words, passage = (
            tokenizer.decode(text[start : start + n], skip_special_tokens=True)
            for n in (WORDS_TOKENS, PASSAGE_TOKENS)
        )
        messages += [
            {"role": "user", "content": document + REQUEST.format(words.strip())},
            {"role": "assistant", "content": passage.strip()},
        ]
        document = ""  # The first question alone holds the document.
        so_far, made = len(made), begun(tokenizer, _encode(tokenizer, messages))
        if len(made) <= so_far:
            raise UserError(
                "the model's chat template leaves messages out", "train without --recall"
            )
    loss = torch.ones(length, dtype=torch.bool)
    if answers:
        _, (marks,) = encode(tokenizer, [Piece(TEXT_NAME, messages=messages)], mark=True)
        loss[len(made) - len(marks) :] = torch.from_numpy(marks)[
            : length - (len(made) - len(marks))
        ]
    loss[0] = False
    return {
        "input_ids": torch.tensor(made[:length]),
        "loss": loss,
        "novel": torch.ones(length, dtype=torch.bool),
    }


def _encode(tokenizer, messages: list[dict]) -> list[int]:
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages)
    else:
        text = render(tokenizer, Piece(TEXT_NAME, messages=messages))
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
