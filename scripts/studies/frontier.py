"""Measure what quality costs in decode time and K/V.

The runtime times points of the training study as GGUF files.
"""

import tempfile
from pathlib import Path

from mod_export.benchmark.run import BenchOptions, bench
from mod_export.common.tables import format_table
from mod_export.export import export

QUANT = "q8_0"


def time_point(made: Path, out: Path, context: int, rounds: int) -> dict:
    """Measure decode time and K/V of a made model beside the dense one.

    The model keeps its own thresholds. The times follow after `context` tokens.
    """
    dense = out / f"dense-{QUANT}.gguf"
    if not dense.exists():
        export(
            made, dense, quant=QUANT, dense=True
        )  # the original's weights, or others of the same shape: as fast
    with tempfile.TemporaryDirectory(dir=out) as folder:
        file = Path(folder) / "mod.gguf"
        export(made, file, quant=QUANT)
        options = BenchOptions(
            contexts=(context,), variants=("ceiling", "mod"), rounds=rounds, seconds=0.0
        )
        found = bench(file, dense, options)
    about, rows = found["about"], {row["phase"]: row for row in found["rows"]}
    kv = rows["decode"]["kv_bytes"]["mod"]
    ratios = {phase: row["ratios"]["mod/ceiling"] for phase, row in rows.items()}
    return {
        "measured": f"{about['date']}, {about['cpu']}",
        "context": context,
        **ratios,
        "activation": rows["decode"]["activation"],
        "kv": kv["used"] / kv["dense"],
    }


def report(rows: list[dict], times: list[dict], docs: Path) -> str:
    """Draw frontier.png in docs and return the table as Markdown.

    Quality and time are both those of the points' own thresholds.
    """
    judged, points, table = {row["name"]: row for row in rows}, [], []
    for time in (
        time for time in times if time["name"] in judged
    ):  # a point may be timed on several machines
        texts = judged[time["name"]]["texts"].values()
        ratio = sum(text["perplexity"] / text["perplexity_dense"] for text in texts) / len(texts)
        points.append({**judged[time["name"]], "ratio": ratio, **time})
    for p in sorted(points, key=lambda p: (p["units"], p["ratio"])):
        of_phase = [
            f"{p[phase]['median']:.3f} ({p[phase]['q1']:.3f} to {p[phase]['q3']:.3f})"
            for phase in ("prefill", "decode")
        ]
        table.append(
            [p["name"], f"{p['activation']:.3f}", *of_phase, f"{p['kv']:.3f}", f"{p['ratio']:.4f}"]
        )
    plot(points, docs)
    header = [
        "point",
        "activation",
        "prefill / dense",
        "decode / dense",
        "K/V of dense",
        "perplexity / dense",
    ]
    return format_table(header, table, markdown=True)


def plot(points: list[dict], docs: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    of_x = {
        "decode time / dense": lambda p: p["decode"]["median"],
        "K/V of dense": lambda p: p["kv"],
    }
    for axis, (label, x) in zip(axes, of_x.items(), strict=True):
        middle = sum(f(map(x, points), default=0) for f in (min, max)) / 2
        for number, units in enumerate(dict.fromkeys(p["units"] for p in points)):
            some = [p for p in points if p["units"] == units]
            axis.plot(
                [x(p) for p in some],
                [p["ratio"] - 1 for p in some],
                "osD^vPX*"[number % 8],
                label=units,
            )
            for p in some:
                left = x(p) > middle  # names stay within the axes
                axis.annotate(
                    p["name"].removeprefix(f"{units}-"),
                    (x(p), p["ratio"] - 1),
                    fontsize=7,
                    xytext=(-4 if left else 4, 3),
                    textcoords="offset points",
                    ha="right" if left else "left",
                )
        axis.set(xlabel=f"{label}, context {points[0]['context']}" if points else label)
        axis.set_yscale("symlog", linthresh=1e-3)  # a perplexity may be below that of dense
        axis.margins(x=0.06, y=0.08)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity / dense - 1")
    axes[0].legend(fontsize=8)
    fig.savefig(docs / "frontier.png", dpi=110)
    plt.close(fig)
