"""Multiple choice by likelihood: which of the choices does a model find likeliest?

Example:

    encoded = [encode(tokenizer, item) for item in read_tasks(["tasks.jsonl"])[0]]      # tasks.py
    rows = accuracy(pair, encoded)                # a row for each task, and their mean
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import torch

from mod_export.evaluation.readers import Pair, Reader, Usage
from mod_export.evaluation.tasks import Choices, Encoded, Item


@torch.no_grad()
def likelihoods(
    reader: Reader, encoded: Choices, usage: Usage | None = None
) -> list[tuple[float, bool]]:
    """Return each choice's log likelihood, and whether all its scored tokens were the best ones.

    A log likelihood is that of the choice's scored tokens, in nats. The beginning that the choices
    share is read once. After each choice the sequence is taken back to the end of that beginning.
    """
    shared = encoded.shared
    results = []
    reader.reset()
    row = reader.last(encoded.ids[0][:shared]) if shared else None
    reader.mark()
    for ids, given in zip(encoded.ids, encoded.given, strict=True):
        reader.rewind()
        total, best, start = 0.0, True, shared
        blocks = [row[None]] if given == shared else []
        start -= len(blocks)  # position of the block's first row
        for rows in chain(blocks, reader.blocks(ids[shared:-1])):
            first = max(given - 1 - start, 0)
            target = torch.tensor(
                ids[start + first + 1 : start + len(rows) + 1], dtype=torch.long, device=rows.device
            )
            scored = rows[first:].log_softmax(-1)
            total += scored.gather(1, target[:, None]).sum().item()
            best &= bool((scored.argmax(-1) == target).all())
            start += len(rows)
        if usage is not None:
            usage.add(reader)
        results.append((total, best))
    return results


def accuracy(pair: Pair, items: list[Encoded], progress: Callable = iter) -> list[dict]:
    """A row for each task, and with several tasks a row `mean`.

    The keys are task, items, dense, mod, agreement, activation, kv_share. dense and mod hold acc,
    acc_norm (by likelihood per byte) and their standard errors. agreement: share of the items where
    both choose the same. Without a MoD model `mod` and the keys after it are None.
    """
    tasks: dict[str, _Task] = {}
    for encoded in progress(items):
        task = tasks.setdefault(encoded.item.task, _Task())
        task.add(pair, encoded)
    rows = [{"task": name} | task.row(pair) for name, task in tasks.items()]
    return rows + [_mean(rows)] if len(rows) > 1 else rows


class _Task:
    """What the models chose in one task.

    hits: whether an item is right by likelihood, and by likelihood per byte.
    """

    def __init__(self):
        self.hits: dict[str, list[tuple[bool, bool | None]]] = {"dense": [], "mod": []}
        self.same = 0
        self.usage = Usage()

    def add(self, pair: Pair, encoded: Encoded) -> None:
        picks = set()
        for name, reader in pair.readers().items():
            found = likelihoods(reader, encoded, self.usage if reader is pair.measured else None)
            pick, right = choose(encoded.item, found)
            picks.add(pick)
            self.hits[name].append(right)
        self.same += len(picks) == 1

    def row(self, pair: Pair) -> dict:
        n = len(self.hits["dense"])
        row = {"items": n} | {
            name: _shares(hits) if hits else None for name, hits in self.hits.items()
        }
        if pair.mod is None:
            return row | dict.fromkeys(("agreement", "activation", "kv_share"))
        return row | {"agreement": self.same / n} | self.usage.shares()


def choose(item: Item, found: list[tuple[float, bool]]) -> tuple[int, tuple[bool, bool | None]]:
    """The choice that a model takes, and whether it is right by likelihood and per byte.

    found: what `likelihoods` gives. For a GREEDY item it is whether greedy decoding gives the
    answer, and None per byte.
    """
    if item.greedy:
        return int(found[0][1]), (found[0][1], None)
    plain = [total for total, _ in found]
    by_byte = [
        total / len(scored.strip().encode())
        for total, (_, scored) in zip(plain, item.texts, strict=True)
    ]
    first, second = (scores.index(max(scores)) for scores in (plain, by_byte))
    return first, (first == item.answer, second == item.answer)


def _shares(hits: list[tuple[bool, bool | None]]) -> dict:
    """acc and acc_norm, and the standard errors of these means."""
    result = {}
    for key, values in zip(("acc", "acc_norm"), zip(*hits, strict=True), strict=True):
        n, known = len(values), values[0] is not None
        share = sum(values) / n if known else None
        result[key] = share
        result[f"{key}_stderr"] = (
            math.sqrt(share * (1 - share) / (n - 1)) if known and n > 1 else None
        )
    return result


def _mean(rows: list[dict]) -> dict:
    """The mean of the tasks, each with the same weight; acc_norm is that of tasks that have one."""

    def mean(values: list, spread: bool = False):
        values = [v for v in values if v is not None]
        if not values:
            return None
        return (
            math.sqrt(sum(v * v for v in values)) / len(values)
            if spread
            else sum(values) / len(values)
        )

    row = {"task": "mean", "items": sum(row["items"] for row in rows)}
    for name in ("dense", "mod"):
        parts = [row[name] for row in rows if row[name]]
        row[name] = (
            {key: mean([p[key] for p in parts], "stderr" in key) for key in parts[0]}
            if parts
            else None
        )
    return row | {
        key: mean([r[key] for r in rows]) for key in ("agreement", "activation", "kv_share")
    }
