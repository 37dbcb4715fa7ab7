"""The rows of evaluate() as tables, plain or Markdown, and as JSON.

Example:

    print(table("tasks", result["tasks"]))
"""

from pathlib import Path

from mod_export.common.tables import format_table
from mod_export.common.text import NO_KV_SAVED

TEXTS = {
    "text": "text",
    "tokens": "tokens",
    "perplexity_dense": "perplexity dense",
    "perplexity": "MoD",
    "ratio": "MoD/dense",
    "kl": "KL",
    "top1_agreement": "same best token",
}
USAGE = {"activation": "activation", "kv_share": "KV of dense"}


def table(name: str, rows: list[dict], markdown: bool = False) -> str:
    """The table of one part of a result: texts, tasks, passkey or ruler.

    A figure that is None in all rows has no column. A line below tells why no K/V are saved.
    """
    columns, lines = {"texts": _texts, "tasks": _tasks, "passkey": _passkey, "ruler": _ruler}[name](
        rows
    )
    columns |= USAGE
    lines = [line | {key: row[key] for key in USAGE} for line, row in zip(lines, rows, strict=True)]
    shown = [key for key in columns if any(line[key] is not None for line in lines)]
    text = format_table(
        [columns[key] for key in shown], [[line[key] for key in shown] for line in lines], markdown
    )
    nothing_saved = any(row["kv_share"] == 1 and (row["activation"] or 1) < 1 for row in rows)
    return f"{text}\n\n{NO_KV_SAVED}" if nothing_saved else text


def _texts(rows: list[dict]) -> tuple[dict, list[dict]]:
    lines = []
    for row in rows:
        ratio = (
            None
            if row["perplexity"] is None
            else f"{row['perplexity'] / row['perplexity_dense']:.4f}"
        )
        lines.append(row | {"text": Path(row["text"]).name, "ratio": ratio})
    return dict(TEXTS), lines


def _tasks(rows: list[dict]) -> tuple[dict, list[dict]]:
    columns = {"task": "task", "items": "items"}
    columns |= {
        f"{model}_{key}": f"{key} {title}"
        for key in ("acc", "acc_norm")
        for model, title in (("dense", "dense"), ("mod", "MoD"))
    }
    columns["agreement"] = "same answer"
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("task", "items", "agreement")}
        for model in ("dense", "mod"):
            for key in ("acc", "acc_norm"):
                line[f"{model}_{key}"] = _with_error(row[model], key) if row[model] else None
        lines.append(line)
    return columns, lines


def _ruler(rows: list[dict]) -> tuple[dict, list[dict]]:
    columns = {
        "task": "RULER",
        "length": "tokens",
        "samples": "samples",
        "dense": "dense",
        "mod": "MoD",
    }
    lines = [
        {key: row[key] for key in ("task", "length", "samples")}
        | {model: _with_error(row, model) for model in ("dense", "mod")}
        for row in rows
    ]
    return columns, lines


def _with_error(scores: dict, key: str) -> str | None:
    if scores[key] is None:
        return None
    error = scores[f"{key}_stderr"]
    return f"{scores[key]:.3f}" + (f" ±{error:.3f}" if error is not None else "")


def _passkey(rows: list[dict]) -> tuple[dict, list[dict]]:
    """Columns and lines of the table of passkeys, with a column for each depth."""
    depths = list(rows[0]["dense_by_depth"])
    columns = {"length": "passkey: tokens", "trials": "trials", "dense": "dense", "mod": "MoD"}
    columns |= {depth: f"at {depth}" for depth in depths}
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("length", "trials")}
        line |= {
            name: None if row[name] is None else f"{row[name]:.2f}" for name in ("dense", "mod")
        }
        for depth in depths:
            parts = [
                row[f"{name}_by_depth"][depth] for name in ("dense", "mod") if row[name] is not None
            ]
            line[depth] = " / ".join(f"{share:.2f}" for share in parts)
        lines.append(line)
    return columns, lines
