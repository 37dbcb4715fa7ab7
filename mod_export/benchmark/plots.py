"""Draw a benchmark's rows as pictures.

The pictures show latency, memory and ratios against context, and latency against activation.

Example:

    draw(result, "plots/")                     # PNG files; their names say what they show
"""

import statistics
from collections.abc import Callable
from pathlib import Path

from mod_export.benchmark.report import NAMES, ORDER
from mod_export.common import plots as colours
from mod_export.common.plots import INK, check_folder, save_figure

# markers and dashes differ too, so that lines differ without colour
STYLES = {
    "ceiling": (colours.BLACK, "o", "-"),
    "ceiling_split": (colours.GREY, "P", ":"),
    "dense_patched": (colours.SKY_BLUE, "s", "--"),
    "all_active": (colours.VERMILION, "^", "--"),
    "mod": (colours.BLUE, "D", "-"),
    "none_active": (colours.ORANGE, "v", "--"),
    "floor": (colours.GREEN, "X", "-"),
}
PHASES = ("prefill", "decode")
SETTING = ("batch", "ubatch", "flash_attn", "kv_type")
# A divergence below it is that of the dense model from itself, and has no place on a log scale.
MIN_KL_NATS = 1e-5


def draw(result: dict, folder: str | Path, force: bool = False) -> list[Path]:
    """Write what the rows can show; the files.

    Raises UserError where a file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    path = check_folder(folder, force)
    path.mkdir(exist_ok=True)
    name, written = Path(result["about"]["files"]["mod"]["file"]).name, []
    for figure, suffix, rows in _plan(result["rows"], "sweep" in result):
        title = f"{name}{_setting_title(rows[0], figure)}, threads: {result['about']['threads']}"
        target = path / f"{figure.__name__}{suffix}.png"
        save_figure(figure(rows, title), target, force)
        written.append(target)
    sweep = result.get("sweep") or []
    if any(row["kl"] is not None for row in sweep):
        save_figure(speed_quality(sweep, name), path / "speed_quality.png", force)
        written.append(path / "speed_quality.png")
    return written


def _plan(rows: list[dict], swept: bool) -> list[tuple[Callable, str, list[dict]]]:
    """(figure, what to add to its name, its rows) for each setting.

    A file's name tells its setting where there are several.
    """
    found = []
    # What the shift does not change is measured at the first shift.
    base = [row for row in rows if row["shift"] == rows[0]["shift"]]

    def add(figure: Callable, rows: list[dict], keys: tuple[str, ...], shows: Callable) -> None:
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault(tuple(row[k] for k in keys), []).append(row)
        for values, group in groups.items():
            differ = [
                f"-{k}-{v}"
                for k, v in zip(keys, values, strict=True)
                if len({r[k] for r in rows}) > 1
            ]
            if shows(group):
                found.append((figure, "".join(differ).replace("/", "-"), group))

    for figure in () if swept else (latency_context, memory_context, ratios_context):
        add(
            figure,
            base,
            SETTING,
            lambda group, figure=figure: figure is not ratios_context or group[0]["ratios"],
        )
    add(
        latency_batch,
        base,
        ("context", *SETTING[1:]),
        lambda group: len({row["batch"] for row in group}) > 1,
    )
    add(
        latency_activation,
        rows,
        ("context", *SETTING),
        lambda group: (
            len({row["shift"] for row in group}) > 1
            and all("mod/ceiling" in r["ratios"] for r in group)
        ),
    )
    return found


def latency_context(rows: list[dict], title: str):
    """Time per token of each variant, prefill and decode."""
    fig, axes = _panels(2, title)
    for ax, phase in zip(axes, PHASES, strict=True):
        mine = [row for row in rows if row["phase"] == phase]
        per_token = [row["context"] if phase == "prefill" else row["batch"] for row in mine]
        lines = {
            name: [
                row["ms"].get(name, float("nan")) / n
                for row, n in zip(mine, per_token, strict=True)
            ]
            for name in _present(mine)
        }
        _against(ax, mine, "context", lines)
        ax.set(title=f"{phase}: time per token", ylabel="ms per token")
    return _finish(fig, axes)


def latency_batch(rows: list[dict], title: str):
    """Decode of several sequences at once: time per step and per token."""
    mine = [row for row in rows if row["phase"] == "decode"]
    fig, axes = _panels(2, title)
    for ax, key, what in zip(
        axes, ("ms", "ms_per_token"), ("step (one token of each)", "token"), strict=True
    ):
        _against(
            ax,
            mine,
            "batch",
            {n: [r[key].get(n, float("nan")) for r in mine] for n in _present(mine)},
        )
        ax.set(title=f"decode: time per {what}", xlabel="sequences decoded at once", ylabel="ms")
    return _finish(fig, axes)


def memory_context(rows: list[dict], title: str):
    """K/V of the MoD file against dense, and the memory of each variant.

    That is GPU memory, and without a GPU the peak of resident memory.
    """
    mine = [row for row in rows if row["phase"] == "decode"]
    fig, axes = _panels(2, title)
    if "mod" in mine[0]["kv_bytes"]:
        kv = {
            key: [row["kv_bytes"]["mod"][key] / 1e6 for row in mine]
            for key in ("dense", "committed", "used")
        }
        looks = {
            "dense": (*STYLES["ceiling"], "a dense model's"),
            "used": (*STYLES["floor"], "MoD: cells in use"),
            "committed": (*STYLES["mod"], "MoD: memory committed"),
        }
        _against(axes[0], mine, "context", kv, looks)
        axes[0].legend(frameon=False, fontsize=8)
    on_gpu = any(row.get("vram_bytes") for row in mine)
    sizes = [row["vram_bytes" if on_gpu else "rss_peak_bytes"] for row in mine]
    _against(
        axes[1],
        mine,
        "context",
        {n: [size.get(n, float("nan")) / 1e6 for size in sizes] for n in _present(mine)},
    )
    axes[0].set(title="K/V", ylabel="MB")
    axes[1].set(
        title="GPU memory" if on_gpu else "peak resident memory (model file included)", ylabel="MB"
    )
    return _finish(fig, axes[1:])


def ratios_context(rows: list[dict], title: str):
    """Overheads and efficiency: medians of the turns' ratios with quartiles."""
    fig, axes = _panels(2, title)
    for ax, phase in zip(axes, PHASES, strict=True):
        mine = [row for row in rows if row["phase"] == phase]
        keys = [
            k
            for k in dict.fromkeys(k for row in mine for k in row["ratios"])
            if not k.startswith("mod/")
        ]
        series = {k: [row["ratios"].get(k) for row in mine] for k in keys}
        labels = {k: " / ".join(NAMES[n] for n in k.split("/")) for k in keys}
        series["efficiency"], labels["efficiency"] = (
            [row["efficiency"] for row in mine],
            "efficiency",
        )
        for i, (key, values) in enumerate(series.items()):
            colour, marker, _ = STYLES["mod" if key == "efficiency" else key.split("/")[0]]
            for x, value in enumerate(values):
                if value:
                    at, mid = x + 0.13 * (i - (len(series) - 1) / 2), value["median"]
                    ax.errorbar(
                        at,
                        mid,
                        [[mid - value["q1"]], [value["q3"] - mid]],
                        fmt=marker,
                        color=colour,
                        markersize=6,
                        capsize=3,
                        label=labels[key],
                    )
        ax.axhline(1, color=INK, linewidth=0.8)
        ax.set_xticks(range(len(mine)), [_tick(row) for row in mine])
        ax.set(title=f"{phase}: ratios of turns, median and quartiles", xlabel="context, tokens")
        ax.set_xlim(-0.6, len(mine) - 0.4)
    return _finish(fig, axes, from_zero=False)


def latency_activation(rows: list[dict], title: str):
    """Time of the MoD file over dense, for shifts of its thresholds.

    It shows median and quartiles of the turns' ratios. A slow spell of the machine is a spike in
    milliseconds, but not in the ratios of two variants that took turns.
    """
    fig, axes = _panels(2, title)
    for ax, phase in zip(axes, PHASES, strict=True):
        mine = sorted((row for row in rows if row["phase"] == phase), key=lambda row: row["work"])
        floor = "floor" if any("floor" in row["ms"] for row in mine) else "none_active"
        least = [row["ms"][floor] / row["ms"]["ceiling"] for row in mine if floor in row["ms"]]
        ax.axhline(
            1, color=STYLES["ceiling"][0], linewidth=1.5, linestyle="--", label=NAMES["ceiling"]
        )
        if least:
            lowest = statistics.median(least)
            ax.axhline(
                lowest, color=STYLES[floor][0], linewidth=1.5, linestyle="--", label=NAMES[floor]
            )
            ax.plot(
                [0, 1],
                [lowest, 1],
                color="#999999",
                linewidth=1,
                linestyle=":",
                label="proportional to work",
            )
        found = [row["ratios"]["mod/ceiling"] for row in mine]
        low, middle, high = ([ratio[key] for ratio in found] for key in ("q1", "median", "q3"))
        spread = [
            [m - q for m, q in zip(middle, low, strict=True)],
            [q - m for m, q in zip(middle, high, strict=True)],
        ]
        ax.errorbar(
            [row["work"] for row in mine],
            middle,
            spread,
            color=STYLES["mod"][0],
            marker=STYLES["mod"][1],
            markersize=5,
            capsize=3,
            label=NAMES["mod"],
        )
        ax.set(
            title=f"{phase} at {mine[0]['context']} tokens",
            ylabel="time / dense",
            xlim=(-0.02, 1.02),
            xlabel="activation (share of the routed work)",
        )
    return _finish(fig, axes)


def speed_quality(rows: list[dict], name: str):
    """Divergence from the dense model beside the time of a decoded token.

    Each point is marked with its activation.
    """
    contexts = sorted({row["context"] for row in rows})
    fig, axes = _panels(2, f"{name}: speed and quality over shifts of the thresholds")
    for i, context in enumerate(contexts):
        mine = sorted(
            (row for row in rows if row["context"] == context and row["kl"] > MIN_KL_NATS),
            key=lambda row: row["activation_held_out"],
        )
        colour, marker = list(STYLES.values())[[4, 3, 6, 0, 2, 5][i % 6]][:2]
        for ax, x in zip(axes, ("activation_held_out", "ms_decode_mod"), strict=True):
            ax.plot(
                [r[x] for r in mine],
                [r["kl"] for r in mine],
                color=colour,
                marker=marker,
                markersize=5,
                label=f"decode at {context} tokens",
            )
        for row in mine:
            axes[1].annotate(
                f"{row['activation_held_out']:.2f}",
                (row["ms_decode_mod"], row["kl"]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                color=INK,
            )
        dense = statistics.median(
            [row["ms_decode_ceiling"] for row in rows if row["context"] == context]
        )
        axes[1].axvline(
            dense,
            color=colour,
            linewidth=1.2,
            linestyle="--",
            label=f"dense, stock, at {context} tokens",
        )
    for ax in axes:
        ax.set_yscale("log")
        ax.set_ylabel("mean KL to dense, nats per token")
        ax.margins(x=0.08)
    axes[0].set(xlabel="activation", title="quality over activation")
    axes[1].set(xlabel="ms per decoded step", title="quality over speed (numbers: activation)")
    return _finish(fig, axes[1:], from_zero=False)


def _panels(n: int, title: str):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, n, figsize=(5.2 * n, 4.4), layout="constrained")
    fig.suptitle(title, fontsize=10, parse_math=False)
    return fig, axes


def _against(
    ax, rows: list[dict], key: str, lines: dict[str, list], looks: dict | None = None
) -> None:
    """A line for each name; bars where there is one value only to draw against."""
    looks = looks or {n: (*STYLES[n], NAMES[n]) for n in lines}
    ax.set_xlabel("context, tokens" if key == "context" else key)
    for i, (name, values) in enumerate(lines.items()):
        colour, marker, dashes, label = looks[name]
        if len(rows) == 1:
            ax.bar(i, values[0], color=colour, label=label, width=0.7)
            ax.annotate(f"{values[0]:.3g}", (i, values[0]), ha="center", va="bottom", fontsize=8)
        else:
            ax.plot(
                [row[key] for row in rows],
                values,
                color=colour,
                marker=marker,
                linestyle=dashes,
                markersize=5,
                label=label,
            )
    if len(rows) == 1:
        ax.set_xticks([])
        ax.set_xlabel(f"{key} {_tick(rows[0]) if key == 'context' else rows[0][key]}")
        return
    ax.set_xscale("log", base=2)
    ax.set_xticks(
        [row[key] for row in rows], [_tick(row) if key == "context" else row[key] for row in rows]
    )
    ax.minorticks_off()
    beyond = [row["context"] for row in rows if row["beyond_training"]]
    if beyond and key == "context":
        ax.axvspan(min(beyond) / 1.2, max(beyond) * 1.2, color="#000000", alpha=0.06, linewidth=0)


def _finish(fig, axes, from_zero: bool = True):
    for ax in fig.axes:
        ax.title.set_fontsize(9.5)
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        if from_zero:
            ax.set_ylim(bottom=0)
    handles = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if len(handles) > 1 or axes[0].get_legend() is None:
        fig.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=min(4, len(handles)),
            frameon=False,
            fontsize=8,
        )
    return fig


def _present(rows: list[dict]) -> list[str]:
    return [name for name in ORDER if any(name in row["ms"] for row in rows)]


def _tick(row: dict) -> str:
    """A context; with a star where it is beyond training."""
    return f"{row['context']}*" if row["beyond_training"] else f"{row['context']}"


def _setting_title(row: dict, figure: Callable) -> str:
    parts = [f"K/V {row['kv_type']}", f"ubatch {row['ubatch']}"] + ["no flash attention"] * (
        not row["flash_attn"]
    )
    parts += [f"{row['batch']} sequences"] * (row["batch"] > 1 and figure is not latency_batch)
    parts += [f"shift {row['shift']:g}"] * (row["shift"] != 0 and figure is not latency_activation)
    return ": " + ", ".join(parts)
