"""Report a training run: lines for people, metrics.jsonl, TensorBoard, plots.

TensorBoard gets the figures where it is installed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from mod_export.common.files import atomic_file
from mod_export.common.plots import save_figure
from mod_export.common.progress import Progress
from mod_export.common.text import clock
from mod_export.errors import UserError
from mod_export.units import Unit

logger = logging.getLogger(__name__)


class Log:
    """The log of a run, which appends to run/metrics.jsonl.

    A resumed run drops the rows that came after the checkpoint's step.
    """

    def __init__(self, run: Path, steps: int, first: int, kinds: list[str]):
        self.path, self.steps, self.kinds = run / "metrics.jsonl", steps, kinds
        kept = [row for row in read(self.path) if row["step"] <= first] if first else []
        with atomic_file(self.path, force=True) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.progress, self.board = Progress(), _tensorboard(run, first)
        self.start, self.first, self.tokens = time.monotonic(), first, 0

    def step(self, row: dict, tokens: int) -> None:
        """Report a step.

        row: the figures of the step, numbers and lists of numbers. tokens: the number of tokens
        that the step took.
        """
        self.tokens += tokens
        seconds = time.monotonic() - self.start
        row |= {"seconds": round(seconds, 3), "tokens_per_second": round(self.tokens / seconds, 1)}
        self._write(row)
        left = seconds / (row["step"] - self.first) * (self.steps - row["step"])
        named = zip(self.kinds, row["activation"], row["target"], strict=True)
        if len(self.kinds) > 4:  # Each layer has its target.
            named = [("units", fmean(row["activation"]), fmean(row["target"]))]
        shares = ", ".join(f"{kind} {a:.3f} of {t:.3f}" for kind, a, t in named)
        self.progress.show(
            f"step {row['step']} of {self.steps}: loss {row['loss']:.4f}, KL {row['kl']:.4f}, "
            f"active {shares}, {row['tokens_per_second']:.0f} tokens/s, {clock(left)} left"
        )

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what runs in this context out of the tokens per second and of the time left.

        The context is for work that is no step, once in a run.
        """
        self.progress.clear()
        began = time.monotonic()
        yield
        self.start += time.monotonic() - began

    def held_out(self, row: dict) -> None:
        """Report the figures of held-out text, which come from hard decisions."""
        self._write(row)
        self.progress.clear()
        shares = ", ".join(
            f"{kind} {share:.3f}" for kind, share in row["held_out"]["activation"].items()
        )
        figures = row["held_out"]
        logger.info(
            f"step {row['step']}, held-out text: KL {figures['kl']:.4f}, "
            f"perplexity {figures['perplexity']:.2f} (dense {figures['perplexity_dense']:.2f}), "
            f"active {shares}"
        )

    def _write(self, row: dict) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as exc:
            raise UserError(f"cannot write {self.path}: {exc.strerror}", "make room") from exc
        if self.board is not None:
            for name, value in _flat(row):
                self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.progress.clear()
        if self.board is not None:
            self.board.close()


def read(path: Path) -> list[dict]:
    """Return the rows of a metrics file, without a last line that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot(run: Path, units: list[Unit]) -> None:
    """Draw the figures of a run directory's metrics; without a step there is nothing to draw.

    run/loss.png: KL and activation over the steps. run/units.png: activation of each unit over the
    steps.
    """
    import matplotlib

    matplotlib.use("Agg")

    rows = read(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    held = [row for row in rows if "held_out" in row]
    if not steps:
        return
    save_figure(_loss_figure(steps, held, units), run / "loss.png", force=True, dpi=120)
    save_figure(_unit_figure(steps, units), run / "units.png", force=True, dpi=120)


def _loss_figure(steps: list[dict], held: list[dict], units: list[Unit]):
    """Return the figure of the loss, above, and of the activation, below."""
    import matplotlib.pyplot as plt

    fig, (top, low) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    _draw_loss(top, steps, held)
    _draw_activation(low, steps, units)
    for axis in (top, low):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            # Above the axes, where it hides no point.
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8)
    return fig


def _draw_loss(axis, steps: list[dict], held: list[dict]) -> None:
    axis.plot(
        [row["step"] for row in steps],
        _smooth([row["loss"] for row in steps]),
        label="training loss, relaxed decisions (running mean)",
    )
    axis.plot(
        [row["step"] for row in held],
        [row["held_out"]["kl"] for row in held],
        "o-",
        label="KL on held-out text, hard decisions",
    )
    axis.set(yscale="log", ylabel="nats per token")


def _draw_activation(axis, steps: list[dict], units: list[Unit]) -> None:
    """Draw the activation of up to four groups, each with its target."""
    x = [row["step"] for row in steps]
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    n_groups = len(steps[0]["activation"])
    each_unit_has_a_target = n_groups != len(kinds)
    names = [_name(unit) for unit in units] if each_unit_has_a_target else kinds
    for i, name in enumerate(names if n_groups < 5 else ()):
        activation = _smooth([row["activation"][i] for row in steps])
        axis.plot(x, activation, label=f"{name} (running mean)")
        label = "target" if name == names[-1] else None
        axis.plot(x, [row["target"][i] for row in steps], "k--", linewidth=0.8, label=label)
    axis.set(xlabel="step", ylabel="activation", ylim=(0, 1.02))


def _name(unit: Unit) -> str:
    """`2 kv`, or `2.1 kv` of head 1."""
    head = "" if unit.head is None else f".{unit.head}"
    return f"{unit.layer}{head} {unit.kind}"


def _unit_figure(steps: list[dict], units: list[Unit]):
    """Return the image of the activation of each unit over the steps."""
    import matplotlib.pyplot as plt
    import numpy as np

    fig, axis = plt.subplots(figsize=(8, 1.5 + 0.14 * len(units)), layout="constrained")
    columns = zip(*(row["units"] for row in steps), strict=True)
    shares = np.array([_smooth(column) for column in columns])
    first, last = steps[0]["step"], steps[-1]["step"]
    image = axis.imshow(
        shares,
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1,
        extent=(first - 0.5, last + 0.5, len(units) - 0.5, -0.5),
    )
    every = max(1, len(units) // 30)
    axis.set_yticks(
        range(0, len(units), every),
        [_name(unit) for unit in units[::every]],
        fontsize=7,
    )
    axis.set(xlabel="step", ylabel="layer, kind")
    fig.colorbar(image, label="activation (running mean)")
    return fig


def _smooth(values, share: float = 0.9) -> list[float]:
    """Return the running mean, which is unbiased at the beginning."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + 1 - share
        out.append(total / weight)
    return out


def _tensorboard(run: Path, first: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(run / "tensorboard", purge_step=first + 1 if first else None)


def _flat(row: dict, prefix: str = ""):
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/{i}", v) for i, v in enumerate(value))
        elif name != "step":
            yield f"{prefix}{name}", value
