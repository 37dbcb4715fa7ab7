"""Table and plots of the training study."""

import math
from pathlib import Path

from mod_export.common.tables import format_table


def report(rows: list[dict], docs: Path) -> str:
    """Draws training.png in docs; -> the table as Markdown."""
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
    plot(points, docs)
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


def plot(points: list[dict], docs: Path) -> None:
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
