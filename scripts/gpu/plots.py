"""Draw a call's results, here, from the JSON files that came back.

    PYTHONPATH=. .venv/bin/python scripts/gpu/plots.py OUT     # OUT/decode.png and so on

A line is a model: its time against tokens, or its speed of prefill against the ubatch. A dotted
line is what was expected of this card.
"""

import json
import sys
from pathlib import Path

import expect
from plans import PLANS, Lane

from mod_export.common import plots
from mod_export.common.plots import INK, save_figure

COLOURS = {
    "dense": plots.BLACK,
    "kv": plots.BLUE,
    "attn": plots.ORANGE,
    "block": plots.GREEN,
    "pruned": plots.GREY,
}
MARKERS = {"segments": "o", "graph": "D"}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    out = Path(sys.argv[1])
    for name in PLANS:
        path = out / f"{name}.json"
        if path.is_file() and (rows := json.loads(path.read_text())["rows"]):
            gpus = json.loads(path.read_text())["machine"]["gpus"]
            target = out / f"{name}.png"
            save_figure(figure(name, rows, gpus[0][0] if gpus else "a CPU"), target, force=True)
            print(target)


def figure(name: str, rows: list[dict], gpu: str):
    """The rows of a part in which units decide, and the dense ones."""
    import matplotlib.pyplot as plt

    x, y = ("ubatch", "prefill_tokens_per_s") if name == "prefill" else ("context", "ms")
    card = expect.card_named(gpu)
    fig, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    half = [row for row in rows if row["force"] == "none"]
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in half):
        lane, own = Lane(model, way), [r for r in half if (r["model"], r["way"]) == (model, way)]
        style = {"color": COLOURS[model], "marker": MARKERS[way]}
        axes.plot([r[x] for r in own], [r[y] for r in own], label=lane.name, **style)
        if card:
            at = [(r["force"], r["context"], r["ubatch"], card) for r in own]
            expected = [expect.predict(lane, PLANS[name], *a)[y] for a in at]
            axes.plot([r[x] for r in own], expected, color=COLOURS[model], linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row[x] for row in half}), sorted({row[x] for row in half}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens" if x == "context" else x)
    axes.set_ylabel("ms a step" if y == "ms" else "tokens/s")
    axes.set_title(f"{name}, units half active, {gpu}; dotted: expected", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return fig


if __name__ == "__main__":
    main()
