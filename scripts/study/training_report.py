"""Table and plots of the training study."""

from pathlib import Path

from mod_export.tables import format_table


def report(rows: list[dict], docs: Path) -> str:
    """Draws training.png in docs; -> the table as Markdown."""
    table, points = [], []
    for row in rows:
        texts = row.get("equal", row["texts"])
        kl = sum(text["kl"] for text in texts.values()) / len(texts)
        ratio = [text["perplexity"] / text["perplexity_dense"] for text in texts.values()]
        activation, share = (sum(t[key] for t in texts.values()) / len(texts) for key in ("activation", "kv_share"))
        points.append({**row, "judged": texts, "kl": kl, "ratio": max(ratio), "activation": activation, "share": share})
    names = list(rows[0]["texts"]) if rows else []
    for point in sorted(points, key=lambda p: (p["units"], -p["activation"] if p["units"] != "kv" else -p["share"])):
        goal = point.get("kv_share", point.get("target", ""))  # a judged model may have none
        if isinstance(goal, dict):
            goal = ", ".join(f"{kind} {share}" for kind, share in goal.items())
        of_texts = [f"{text['perplexity']:.2f} / {text['perplexity_dense']:.2f}" for text in point["judged"].values()]
        figures = [f"{point['activation']:.3f}", f"{point['share']:.3f}", *of_texts]
        table.append([point["units"], goal, point["way"], *figures, f"{point['ratio']:.4f}", f"{point['kl']:.4f}"])
    plot(points, docs)
    header = ["units", "goal", "way", "activation", "K/V of dense", *[f"{name}: ppl / dense" for name in names],
              "worst ratio", "KL"]  # fmt: skip
    return format_table(header, table, markdown=True)


def plot(points: list[dict], docs: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({p["units"] for p in points}, key=lambda units: (units != "kv", units))
    fig, axes = plt.subplots(1, len(kinds), figsize=(5.5 * len(kinds), 4.5), layout="constrained", squeeze=False)
    ways = list(dict.fromkeys(p["way"] for p in points))
    for axis, kind in zip(axes[0], kinds, strict=True):
        x = "share" if kind == "kv" else "activation"
        for number, way in enumerate(ways):
            some = sorted((p for p in points if p["units"] == kind and p["way"] == way), key=lambda p: p[x])
            if some:
                axis.plot([p[x] for p in some], [p["kl"] for p in some], "osD^vPX*"[number % 8] + "-", label=way,
                          color=f"C{number}")  # fmt: skip
        axis.set(title=f"{kind} units", yscale="log", ylabel="mean KL to dense, nats per token",
                 xlabel="K/V of dense" if kind == "kv" else "activation")  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    fig.savefig(docs / "training.png", dpi=110)
    plt.close(fig)
