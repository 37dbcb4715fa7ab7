"""Passkeys found as a heat map over length and depth, accuracies as bars; dense beside MoD.

Example:

    draw(result, "plots/")                     # passkey.png, tasks.png: what the result has
"""

from pathlib import Path

from mod_export.common.plots import check_folder, save_figure

NAMES = {"dense": "dense", "mod": "MoD"}
COLOURS = {"dense": "#888888", "mod": "#0072B2"}
TITLE_INCHES = 0.085  # of a character of 10 points


def draw(result: dict, folder: str | Path, force: bool = False) -> list[Path]:
    """Write the pictures into the folder, which is made where it is missing; the files.

    Raises UserError where a file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    path = check_folder(folder, force)
    path.mkdir(exist_ok=True)
    title, written = Path(result["about"]["target"]).name, []
    for figure, rows in ((passkey, result["passkey"]), (tasks, result["tasks"])):
        if rows:
            target = path / f"{figure.__name__}.png"
            save_figure(figure(rows, title), target, force)
            written.append(target)
    return written


def passkey(rows: list[dict], title: str):
    """A panel for each model: share of the keys found, prompt lengths across, depths down."""
    import matplotlib.pyplot as plt

    names = [name for name in NAMES if rows[0][name] is not None]
    depths = list(rows[0]["dense_by_depth"])
    trials = rows[0]["trials"] // len(depths)
    title = f"{title}: passkeys found, {trials} trial{'s' * (trials > 1)} per cell"
    width = _width(title, 1.6 + len(names) * max(1.8, 0.8 * len(rows) + 0.5))
    size = (width, 1.6 + 0.42 * len(depths))
    fig, axes = plt.subplots(
        1, len(names), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for ax, name in zip(axes[0], names, strict=True):
        shares = [[row[f"{name}_by_depth"][depth] for row in rows] for depth in depths]
        image = ax.imshow(shares, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
        for i, line in enumerate(shares):
            for j, share in enumerate(line):
                ax.text(
                    j,
                    i,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share > 0.55 else "black",
                )
        ax.set_xticks(range(len(rows)), [str(row["length"]) for row in rows], fontsize=8)
        ax.set_title(NAMES[name] + ("" if name == "dense" else f", {_usage(rows)}"), fontsize=9)
        ax.set_xlabel("prompt, tokens", fontsize=8)
        ax.set_xticks([x + 0.5 for x in range(len(rows) - 1)], minor=True)
        ax.set_yticks([y + 0.5 for y in range(len(depths) - 1)], minor=True)
        ax.grid(which="minor", color="white", linewidth=1.5)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
    axes[0][0].set_yticks(range(len(depths)), depths, fontsize=8)
    axes[0][0].set_ylabel("depth of the key (0: beginning)", fontsize=8)
    bar = fig.colorbar(image, ax=axes[0].tolist(), shrink=0.9)
    bar.set_label("share found", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    fig.suptitle(title, fontsize=10, parse_math=False)
    return fig


def _width(title: str, least: float) -> float:
    """The width of a figure in inches, in which its title has room."""
    return max(least, TITLE_INCHES * len(title))


def _usage(rows: list[dict]) -> str:
    low, high = (f(row["kv_share"] for row in rows) for f in (min, max))
    return (
        f"KV {low:.2f} of dense"
        if f"{low:.2f}" == f"{high:.2f}"
        else f"KV {low:.2f} to {high:.2f} of dense"
    )


def tasks(rows: list[dict], title: str):
    """Bars of accuracy with standard errors: acc_norm where a task has it, else acc."""
    import matplotlib.pyplot as plt

    names = [name for name in NAMES if rows[0][name] is not None]
    size = (_width(title, 1.5 + 0.75 * len(rows)), 3.6)
    fig, ax = plt.subplots(figsize=size, layout="constrained")
    for i, name in enumerate(names):
        keys = ["acc" if row[name]["acc_norm"] is None else "acc_norm" for row in rows]
        at = [x + (i - (len(names) - 1) / 2) * 0.38 for x in range(len(rows))]
        heights = [row[name][key] for row, key in zip(rows, keys, strict=True)]
        errors = [row[name][f"{key}_stderr"] or 0.0 for row, key in zip(rows, keys, strict=True)]
        ax.bar(
            at,
            heights,
            width=0.38,
            yerr=errors,
            color=COLOURS[name],
            ecolor="#444444",
            label=NAMES[name],
            error_kw={"linewidth": 1},
        )
    ax.set_xticks(
        range(len(rows)), [row["task"] for row in rows], rotation=30, ha="right", fontsize=8
    )
    ax.set_ylim(0, 1)
    ax.set_ylabel("accuracy by byte, ± standard error", fontsize=8)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    fig.suptitle(title, fontsize=10, parse_math=False)
    return fig
