"""Tables and a plot of scripts/studies/kv_types.py: KL over bytes of K and V."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from mod_export.common.plots import BLACK, BLUE, GREEN, ORANGE, SKY_BLUE, VERMILION, save_figure
from mod_export.common.tables import format_table

MIB = 2**20
COLOURS = (BLACK, BLUE, VERMILION, GREEN, ORANGE, SKY_BLUE)
MARKERS = "osD^vPX*"


def points(quality: Iterable[dict], times: Iterable[dict], files: Sequence[str]) -> list[dict]:
    """One point for each file, type and length: means over the texts, and times where measured.

    The first file is the dense one. Its f16 has a KL of 0, and is what bytes are a share of.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in quality:
        groups.setdefault((row["length"], row["file"], row["kv_type"]), []).append(row)
    speed = {(row["context"], row["file"], row["kv_type"]): row for row in times}
    order = {name: number for number, name in enumerate(files)}
    found = []
    for key, of_texts in groups.items():
        length, file, kind = key
        whole = groups.get((length, files[0], "f16"))
        if file not in order or not whole:
            continue
        point = {"length": length, "file": file, "kv_type": kind}
        point |= {name: _mean(row[name] for row in of_texts) for name in ("kv_bytes", "kl")}
        point["share"] = point["kv_bytes"] / _mean(row["kv_bytes"] for row in whole)
        point["perplexity"] = _mean(row["perplexity"] / row["perplexity_dense"] for row in of_texts)
        point["top1"] = _mean(row["top1_agreement"] for row in of_texts)
        found.append(point | {"speed": speed.get(key)})
    found.sort(key=lambda p: (p["length"], order[p["file"]], -p["kv_bytes"]))
    for point in found:
        point["dense_kl"] = kl_at_equal_bytes(point, found, files[0])
    return found


def kl_at_equal_bytes(point: dict, found: Sequence[dict], dense: str) -> float | None:
    """KL of the dense model at as many bytes, on the line through its types; both axes are logs.

    None for its own points, and beyond its smallest type or its largest that is not exact.
    """
    if point["file"] == dense:
        return None
    line = sorted(
        (math.log(p["kv_bytes"]), math.log(p["kl"]))
        for p in found
        if p["file"] == dense and p["length"] == point["length"] and p["kl"] > 0
    )
    at = math.log(point["kv_bytes"])
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        if x0 <= at <= x1 and x1 > x0:
            return math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return None


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def tables(found: Sequence[dict]) -> str:
    """A table of Markdown for each length."""
    head = ["file", "K/V", "MiB", "of dense f16", "perplexity", "KL", "same best token"]
    head += ["dense KL at these bytes", "prefill", "decode"]
    parts = []
    for length in dict.fromkeys(point["length"] for point in found):
        body = [_line(point) for point in found if point["length"] == length]
        parts.append(f"{length} tokens\n\n{format_table(head, body, markdown=True)}")
    return "\n\n".join(parts) or "no rows of quality yet"


def _line(point: dict) -> list:
    beside, speed = point["dense_kl"], point["speed"]
    return [
        *(point["file"], point["kv_type"], f"{point['kv_bytes'] / MIB:.2f}"),
        *(f"{point['share']:.3f}", f"{point['perplexity']:.4f}", f"{point['kl']:.4f}"),
        f"{point['top1']:.3f}",
        "-" if beside is None else f"{beside:.4f}",
        *(f"{speed[name]['median']:.2f}" if speed else "-" for name in ("prefill", "decode")),
    ]


def draw(found: Sequence[dict], target: Path) -> None:
    """A panel for each length: KL over bytes, a line for each file, a point for each type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lengths = list(dict.fromkeys(point["length"] for point in found))
    files = list(dict.fromkeys(point["file"] for point in found))
    kinds = list(dict.fromkeys(point["kv_type"] for point in found))
    size = (1 + 4.6 * len(lengths), 4.4)
    figure, axes = plt.subplots(1, len(lengths), figsize=size, layout="constrained", squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for number, file in enumerate(files):
            line = [p for p in found if (p["file"], p["length"]) == (file, length) and p["kl"] > 0]
            colour = COLOURS[number % len(COLOURS)]
            at, kl = [p["kv_bytes"] / MIB for p in line], [p["kl"] for p in line]
            axis.plot(at, kl, color=colour, linewidth=1, label=file.removesuffix(".gguf"))
            for x, y, p in zip(at, kl, line, strict=True):
                marker = MARKERS[kinds.index(p["kv_type"]) % len(MARKERS)]
                axis.plot(x, y, marker, color=colour, markersize=6)
        axis.set(xscale="log", yscale="log", title=f"{length} tokens", xlabel="K and V, MiB")
        for ticks in (axis.xaxis, axis.yaxis):  # 0.03, not 3 x 10^-2
            ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axis.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    for kind in kinds:  # the legend has the markers, in grey
        axes[0][0].plot([], [], MARKERS[kinds.index(kind) % len(MARKERS)], color="grey", label=kind)
    axes[0][0].set_ylabel("KL to the dense model in f16, nats")
    axes[0][0].legend(fontsize=8, frameon=False)
    save_figure(figure, target, force=True)
