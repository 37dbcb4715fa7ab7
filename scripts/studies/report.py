"""Make tables and pictures of the rows of the studies."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mod_export.common.tables import format_table
from mod_export.units import UNIT_KINDS

STYLES = {"router": "-o", "static": "--s", "random": ":^", "sinks + window": "--D", "window": ":v"}


def write_report(out: Path, docs: Path) -> None:
    """Write the tables and pictures for which there are rows."""
    rows = {
        path.stem: [json.loads(line) for line in path.open()]
        for path in sorted(out.glob("*.jsonl"))
    }
    parts = []
    if "scores" in rows:
        parts.append(scores_table(rows["scores"]))
        scores_picture(rows["scores"], docs / "calibration_scores.png")
    for name in [name for name in rows if name.startswith("table")]:
        parts.append(f"### {name}\n\n" + targets_table(rows[name]))
        targets_picture(rows[name], docs / f"calibration_{name}.png")
    if "passkey" in rows:
        parts.append(passkey_table(rows["passkey"]))
    (out / "study.md").write_text("\n\n".join(parts) + "\n")
    (out / "study.json").write_text(json.dumps(rows, indent=1) + "\n")


def scores_table(rows: list[dict]) -> str:
    """Return one table per kind, the best way first."""
    tables = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["kl"])
        lines = [
            [
                label(row),
                *(f"{row[key]:.3f}" for key in ("activation", "kv_share")),
                f"{row['kl']:.4f}",
                f"{row['kl_late']:.4f}",
            ]
            for row in of_kind
        ]
        header = ["way", "activation", "KV of dense", "KL", "KL, second half"]
        tables.append(f"### {kind}\n\n" + format_table(header, lines, markdown=True))
    return "\n\n".join(tables)


def label(row: dict) -> str:
    return f"{row['score']}, {row['method']}" if row["variant"] == "router" else row["variant"]


def targets_table(rows: list[dict]) -> str:
    texts = list(rows[0]["perplexity"])
    lines = []
    for row in sorted(
        rows, key=lambda row: (row.get("kind", ""), row["variant"] != "router", row["variant"])
    ):
        both = [f"{row['perplexity'][text]:.2f} / {row['kl_by_text'][text]:.4f}" for text in texts]
        lines.append(
            [
                row.get("kind", "-"),
                row["variant"],
                f"{row.get('target', 1)}",
                f"{row['activation']:.3f}",
                f"{row['kv_share']:.3f}",
                *both,
                f"{row['kl']:.4f}",
            ]
        )
    header = [
        "kind",
        "what decides",
        "target",
        "activation",
        "KV of dense",
        *(f"{t}: ppl / KL" for t in texts),
        "KL",
    ]
    return format_table(header, lines, markdown=True)


def passkey_table(rows: list[dict]) -> str:
    lines = [
        [row["length"], row["trials"], f"{row['dense']:.2f}", f"{row['mod']:.2f}"] for row in rows
    ]
    return format_table(["prompt tokens", "trials", "dense", "MoD"], lines, markdown=True)


def _axes(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def scores_picture(rows: list[dict], path: Path) -> None:
    """Draw a bar for each way, kinds one below the other.

    Bars of routers are full, and bars of baselines are pale.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    ordered = [
        row
        for kind in kinds
        for row in sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["kl"])
    ]
    figure, axes = _axes(8, 1 + 0.21 * len(ordered))
    for position, row in enumerate(ordered):
        alpha = 1 if row["variant"] == "router" else 0.4
        axes.barh(position, row["kl"], color=UNIT_KINDS[row["kind"]].colour, alpha=alpha)
        axes.text(row["kl"] * 1.05, position, f"{row['kl']:.4f}", va="center", fontsize=7)
    axes.set_yticks(
        range(len(ordered)), [f"{row['kind']}: {label(row)}" for row in ordered], fontsize=7
    )
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(
        f"mean KL to the dense model (nats), activation {ordered[0]['target']}; "
        "pale: plain baselines"
    )
    figure.savefig(path, dpi=110)


def targets_picture(rows: list[dict], path: Path) -> None:
    """Draw KL against activation, a line for each kind and way."""
    figure, axes = _axes(8, 5)
    series = dict.fromkeys(
        (row["kind"], row["variant"]) for row in rows if row["variant"] != "dense"
    )
    for kind, variant in series:
        found = [r for r in rows if (r.get("kind"), r["variant"]) == (kind, variant)]
        points = sorted(
            (r["target" if "window" in variant else "activation"], r["kl"]) for r in found
        )
        strength = 2 if variant == "router" else 1
        axes.plot(
            *zip(*points, strict=True),
            STYLES[variant],
            color=UNIT_KINDS[kind].colour,
            linewidth=strength,
            markersize=4,
            label=f"{kind}: {variant}",
            alpha=1 if variant == "router" else 0.6,
        )
    axes.set_yscale("log")
    axes.set_xlabel(
        "activation (token-unit pairs that run); "
        "windows: as many K/V as kv routers at this activation"
    )
    axes.set_ylabel("mean KL to the dense model (nats)")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def training_table(rows: list[dict], docs: Path) -> str:
    """Draw training.png in docs, and return the table as Markdown."""
    table, points = [], []
    for row in rows:
        texts = row.get("equal", row["texts"])
        kl = sum(text["kl"] for text in texts.values()) / len(texts)
        ratio = [text["perplexity"] / text["perplexity_dense"] for text in texts.values()]
        activation, share = (
            sum(t.get(key, math.nan) for t in texts.values())
            / len(texts)  # not all is kept in docs/
            for key in ("activation", "kv_share")
        )
        points.append(
            {
                **row,
                "judged": texts,
                "kl": kl,
                "ratio": max(ratio),
                "activation": activation,
                "share": share,
            }
        )
    names = list(rows[0]["texts"]) if rows else []
    for point in sorted(
        points, key=lambda p: (p["units"], -p["activation"] if p["units"] != "kv" else -p["share"])
    ):
        goal = point.get("kv_share", point.get("target", ""))  # a judged model may have none
        if isinstance(goal, dict):
            goal = ", ".join(f"{kind} {share}" for kind, share in goal.items())
        of_texts = [
            f"{text['perplexity']:.2f} / {text['perplexity_dense']:.2f}"
            for text in point["judged"].values()
        ]
        figures = [f"{point['activation']:.3f}", f"{point['share']:.3f}", *of_texts]
        table.append(
            [
                point["units"],
                goal,
                point["way"],
                *figures,
                f"{point['ratio']:.4f}",
                f"{point['kl']:.4f}",
            ]
        )
    training_picture(points, docs)
    header = [
        "units",
        "goal",
        "way",
        "activation",
        "K/V of dense",
        *[f"{name}: ppl / dense" for name in names],
        "worst ratio",
        "KL",
    ]
    return format_table(header, table, markdown=True)


def training_picture(points: list[dict], docs: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    kinds = sorted({p["units"] for p in points}, key=lambda units: (units != "kv", units))
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    fig, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 4 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(kinds) :]:
        axis.remove()
    ways = list(dict.fromkeys(p["way"] for p in points))
    legend = {}
    for axis, kind in zip(axes.flat, kinds, strict=False):
        x = "share" if kind == "kv" else "activation"
        for number, way in enumerate(ways):
            some = sorted(
                (p for p in points if p["units"] == kind and p["way"] == way), key=lambda p: p[x]
            )
            if some:
                (legend[way],) = axis.plot(
                    [p[x] for p in some],
                    [p["kl"] for p in some],
                    "osD^vPX*"[number % 8] + "-",
                    color=f"C{number}",
                )
        axis.set(
            title=f"{kind} units",
            yscale="log",
            ylabel="mean KL to dense, nats per token",
            xlabel="K/V of dense" if kind == "kv" else "activation",
        )
        axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    fig.legend(
        legend.values(), legend, loc="outside lower center", ncols=min(3, len(legend)), fontsize=9
    )
    fig.savefig(docs / "training.png", dpi=110)
    plt.close(fig)
