"""What windows, decisions of heads and the penalty on drift cost, and bring: calibrated kv routers.

    python -m scripts.studies.drift --text wiki=wiki.txt --text book=book.txt --out drift
    python -m scripts.studies.drift --text wiki=wiki.txt --text book=book.txt --out drift \\
        --kv-granularity head --kv-window auto --kv-share 0.25 --penalties 3 --count 4

The study calibrates for a share of the dense K/V at the end of 2048 tokens. The figures are KL and
perplexity at this share on the texts, and the activation by position in sequences of 4096 tokens
with thresholds of the calibration text. Rows go to OUT/rows.jsonl and are not measured again.
"""

from pathlib import Path

import click
import torch

from mod_export.calibration.measuring import CalibrationPlan, measure_layers
from mod_export.calibration.routers import Solution, solve
from mod_export.calibration.thresholds import set_thresholds
from mod_export.cli.convert import Window
from mod_export.config import KV_GRANULARITIES, KV_GRANULARITY, MoDConfig, UnitConfig
from mod_export.data import text as data_text
from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel
from mod_export.units import parse_layers
from scripts.studies import rows
from scripts.studies.judging import judge_point

BOUNDS_TOKENS = (0, 512, 1024, 2048, 4096)
LENGTH = 2048  # tokens, of a sequence that is calibrated on and judged
KEY = ("layers", "drift_penalty", "kv_share", "window", "kv_granularity", "count")


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="NAME=FILE", help="To judge by."
)
@click.option(
    "--calibration-text",
    multiple=True,
    type=click.Path(exists=True),
    help="To calibrate on.  [default: the packaged text]",
)
@click.option(
    "--kv-share", default=0.5, show_default=True, help="K/V of dense at the end of 2048 tokens."
)
@click.option("--kv-window", "window", type=Window(), default=256, show_default=True)
@click.option(
    "--kv-granularity",
    type=click.Choice(KV_GRANULARITIES),
    default=KV_GRANULARITY,
    show_default=True,
)
@click.option(
    "--layers-routed",
    "layers",
    default="1-29,2-29",
    show_default=True,
    help="Sets of layers to route, for the first penalty.",
)
@click.option("--penalties", default="0,1,3,10,30", show_default=True)
@click.option("--count", default=1, show_default=True, help="Sequences of each text.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of fits and rows."
)
@torch.no_grad()
def main(model, texts, calibration_text, layers, penalties, out, **given):
    out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = loading.load(model)
    text = data_text.read_texts(calibration_text) if calibration_text else None
    text = text or data_text.default_texts()[0]
    sequences = data_text.pack(tokenizer, text, LENGTH)
    sets = [parse_layers(part) for part in layers.split(",")]
    every = sorted({layer for some in sets for layer in some})
    fits, drifts = measured(base, sequences, every, out, **given)
    path = out / "rows.jsonl"
    done = [[row[name] for name in KEY] for row in rows.read(path)]
    for number, some in enumerate(sets):
        for penalty in [float(part) for part in penalties.split(",")][: None if number == 0 else 1]:
            row = {"layers": f"{some[0]}-{some[-1]}", "drift_penalty": penalty, **given}
            if [row[name] for name in KEY] in done:
                continue
            routed = [fit for fit in fits if fit.place.layer in some]
            target, solution = for_share(base, routed, drifts, penalty, given["kv_share"])
            config = config_of(base, solution, target)
            mod = MoDModel.from_base(base, tokenizer, config, solution.routers)
            set_thresholds(mod, sequences[::3], {"kv": list(solution.routers)}, {"kv": target})
            row |= {"target": target, "windows": sorted(solution.windows.values())}
            row["activation"] = {
                name: positions(mod, file) for name, file in (pair.split("=", 1) for pair in texts)
            }
            share, count = given["kv_share"], given["count"]
            row["equal"] = judge_point(mod, None, model, texts, LENGTH, count, kv_share=share)
            mod.detach()
            rows.append(path, row)


def measured(base, sequences, layers, out: Path, window, kv_granularity, **_) -> tuple:
    """Return the fits of all layers and the drift of their inputs, measured once for a folder."""
    saved = out / f"fits-{kv_granularity}-{window}.pt"
    if not saved.exists():
        own = None if window == "auto" else window
        plan = CalibrationPlan({"kv": layers}, kv_window=own, kv_granularity=kv_granularity)
        every = list(measure_layers(base, sequences, plan))
        drifts = {one.fit.place: one.means.drift() for one in every}
        torch.save(([one.fit for one in every], drifts), saved)
    return torch.load(saved, weights_only=False)


def for_share(base, fits, drifts, penalty: float, kv_share: float) -> tuple[float, Solution]:
    """Return the activation, and the routers, with which this share of the K/V is remembered."""
    n_layer = len(architectures.decoder_layers(base))
    low, high = 0.0, 1.0
    for _ in range(10):
        target = (low + high) / 2
        solution = solve(fits, {"kv": target}, LENGTH, drifts, penalty)
        remembered = sum(solution.remembered.values()) / len(fits[0].units)
        share = (n_layer - len(fits) + remembered) / n_layer
        low, high = (target, high) if share < kv_share else (low, target)
    return target, solution


def config_of(base, solution: Solution, target: float) -> MoDConfig:
    """Return the configuration of these routers, before there are thresholds."""
    n_layer = len(architectures.decoder_layers(base))
    heads = 1 + max(unit.head or 0 for unit in solution.routers)
    widest = max(solution.windows.values())
    empty = UnitConfig((0.0,) * n_layer * heads, (1.0,) * n_layer * heads, heads)
    of_units = dict.fromkeys(solution.routers, 0.5), dict.fromkeys(solution.routers, target)
    every = [unit for layer in range(n_layer) for unit in empty.units(layer, "kv")]
    units = empty.with_values(*of_units)
    if len(set(solution.windows.values())) > 1:
        own = tuple(solution.windows.get(unit, widest) for unit in every)
        units = UnitConfig(units.threshold, units.activation, heads, own)
    return MoDConfig(kv_window=widest, units={"kv": units})


def positions(mod, file: str) -> list[float]:
    """Return the share of active tokens between BOUNDS_TOKENS, in the first sequence of a file."""
    (ids,) = data_text.pack(mod.tokenizer, data_text.read_texts([file]), BOUNDS_TOKENS[-1], 1)
    _, trace = mod(ids[None], trace=True, logits_to_keep=1)
    active = trace.active[0].float().mean(-1)
    return [
        round(active[start:stop].mean().item(), 4)
        for start, stop in zip(BOUNDS_TOKENS, BOUNDS_TOKENS[1:], strict=False)
    ]


if __name__ == "__main__":
    main()
