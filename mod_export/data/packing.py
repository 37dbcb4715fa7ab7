"""Pack text and conversations into training sequences of a fixed length.

Documents and conversations follow one another as in text.pack, so a sequence may hold the end of
one and the beginning of the next. The tokens lie in memory-mapped files (token_cache.py).

    data = open_data(tokenizer, ["books/", "chat.jsonl.gz"], length=1024, loss_on="all")
    train, held_out = split(data, 16)
    for k in order(len(train), seed=0, epoch=0): train[k]["input_ids"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from mod_export.data.token_cache import Tokens, tokens_of
from mod_export.errors import UserError

LOSS_ON = ("all", "answers")


@dataclass(frozen=True, eq=False)
class PackedData(torch.utils.data.Dataset):
    """Sequences of `length` tokens.

    fingerprint: identifies texts, tokenizer, options and, after `split`, the part. A run can be
    resumed with data of the same fingerprint. index: int64 [n], the numbers of the sequences in the
    source.
    """

    length: int
    fingerprint: str
    source: Tokens = field(repr=False)
    index: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Return input_ids, loss and novel of a sequence, each [length].

        input_ids: int64. loss: bool, tokens that are to be predicted. The first token of a sequence
        is never one of them, because nothing comes before it. novel: bool, tokens that do not
        repeat what the data have said before (repeats.py).
        """
        begin = np.array(self.source.begin, np.int64)
        body, of_begin = self.length - len(begin), np.zeros(len(begin), bool)
        ids, loss, repeats = self.source.read(int(self.index[i]) * body, body)
        ids, loss = np.concatenate((begin, ids)), np.concatenate((of_begin, loss))
        loss[0] = False
        novel = np.concatenate((of_begin, ~repeats))
        return {
            "input_ids": torch.from_numpy(ids),
            "loss": torch.from_numpy(loss),
            "novel": torch.from_numpy(novel),
        }

    @property
    def tokens(self) -> int:
        """Return the number of tokens in all sequences."""
        return len(self) * self.length


def open_data(
    tokenizer,
    paths: Sequence[str | Path],
    length: int,
    loss_on: str = "all",
    limit: int | None = None,
    cache: str | Path | None = None,
) -> PackedData:
    """Return the text and conversations in files and directories (sources.py) as sequences.

    length: the tokens of a sequence. loss_on: "all" tokens, or only the "answers" of the assistant
    in conversations, each with its end-of-turn token. limit: the largest number of tokens, of all
    files in proportion. cache: the directory for tokens (token_cache.py). Raises UserError for
    files that cannot be read, for data without answers where these are wanted, and for data that
    are too short for one sequence.
    """
    if loss_on not in LOSS_ON:
        raise UserError(f"loss on {loss_on!r} is unknown", f"use one of {', '.join(LOSS_ON)}")
    if length < 2:
        raise UserError(
            f"sequences of {length} tokens have nothing to predict", "use a length of 2 or more"
        )
    source = tokens_of(tokenizer, paths, loss_on == "answers", limit, cache)
    body = length - len(source.begin)
    if source.count < body:
        raise UserError(
            f"data too short: {source.count} tokens where a sequence needs {body}",
            "give more data, or use shorter sequences (--length)",
        )
    return PackedData(
        length, f"{source.fingerprint}-{length}", source, np.arange(source.count // body)
    )


def split(data: PackedData, held_out: int) -> tuple[PackedData, PackedData]:
    """Return the data without `held_out` sequences, and these sequences.

    The held-out sequences are always the same, spread evenly. Their neighbours stay in the first
    part, so the beginning or end of a document may be in both parts. Raises UserError where the
    data have too few sequences.
    """
    n = len(data)
    if not 0 <= held_out < n:
        raise UserError(
            f"cannot hold out {held_out} of {n} sequences", "hold out fewer, or give more data"
        )
    # The middle of each of `held_out` equal parts.
    out = [(2 * i + 1) * n // (2 * held_out) for i in range(held_out)]
    rest = np.setdiff1d(np.arange(n), out)
    parts = ((rest, f"without-{held_out}"), (np.array(out, np.int64), f"only-{held_out}"))
    first, second = (
        replace(data, index=data.index[i], fingerprint=f"{data.fingerprint}-{part}")
        for i, part in parts
    )
    return first, second


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of n sequences in an epoch, int64 [n].

    The permutation depends on the three arguments only. Step k after a resume takes element k, so
    that nothing before it has to be drawn again.
    """
    # The streams of RandomState are frozen, so an order outlives numpy's versions.
    return np.random.RandomState([seed, epoch]).permutation(n)
