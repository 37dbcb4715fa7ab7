"""Measure how many tokens a model's routers take, by the length of what is read.

The sequences begin all over a text.
"""

from __future__ import annotations

from statistics import mean, stdev

from mod_export.common.progress import Progress
from mod_export.common.tables import format_table
from mod_export.data import text as data_text
from mod_export.errors import UserError
from mod_export.evaluation.open import open_pair


def activation_by_length(
    target: str,
    texts: dict[str, str],
    lengths: tuple[int, ...],
    count: int,
    threads: int | None = None,
) -> dict[str, list[list[float]]]:
    """Return the share of active (token, unit) pairs in the first so many tokens.

    The result is {text: [count][len(lengths)]}.

    target: a MoD directory or GGUF file, thresholds as they come; texts: {name: file}. Each of the
    `count` sequences,
    spread evenly over a text, is read once, to the largest of the lengths: a decision depends on no
    later token. Raises UserError for a dense target, a text that is too short, and lengths beyond
    the model's context.
    """
    reader = open_pair(target, threads=threads).measured
    if not reader.units:
        raise UserError(f"{target} is a dense model, so it decides nothing", "use a MoD model")
    reader.reserve(max(lengths))
    found = {}
    for name, file in texts.items():
        sequences, found[name] = (
            data_text.pack(reader.tokenizer, data_text.read_texts([file]), max(lengths), count),
            [],
        )
        for ids in Progress().count(name, sequences.tolist()):
            reader.reset()
            reader.last(ids)
            active = reader.active.float().mean(-1)
            found[name].append([active[:length].mean().item() for length in lengths])
    return found


def lengths_table(found: dict[str, list[list[float]]], lengths: tuple[int, ...]) -> str:
    """Return means over a text's sequences and (standard errors) as a table.

    The last column is the distance from the least to the most of a row's means.
    """
    rows = []
    for name, sequences in found.items():
        columns = list(zip(*sequences, strict=True))
        means = [mean(column) for column in columns]
        errors = [f" ({stdev(c) / len(c) ** 0.5:.3f})" if len(c) > 1 else "" for c in columns]
        cells = [f"{m:.3f}{e}" for m, e in zip(means, errors, strict=True)]
        rows.append([name, *cells, f"{max(means) - min(means):.3f}"])
    return format_table(["text", *map(str, lengths), "moves by"], rows, markdown=True)
