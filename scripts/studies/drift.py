"""What it costs, and brings, to keep calibrated kv routers from following the text.

    python -m scripts.studies.drift --text wiki=wiki.txt --text book=book.txt --out drift

The study measures each drift penalty with thresholds of the calibration text. The figures are KL
and perplexity at equal activation on the texts, and the activation by position in sequences of 4096
tokens. Rows go to OUT/rows.jsonl and are not measured again.
"""

from pathlib import Path

import click
import torch

from mod_export.calibration.calibrate import CalibrationPlan, drift, measure, solve
from mod_export.calibration.thresholds import set_thresholds
from mod_export.config import MoDConfig, UnitConfig
from mod_export.data import text as data_text
from mod_export.model import architectures, loading
from mod_export.model.mod_model import MoDModel
from mod_export.units import parse_layers
from scripts.studies import rows
from scripts.studies.judging import judge_point
from scripts.studies.training import activation_for

BOUNDS_TOKENS = (0, 512, 1024, 2048, 4096)


@click.command()
@click.option("--model", default="smollm2", show_default=True)
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="NAME=FILE", help="To judge by."
)
@click.option(
    "--kv-share", default=0.5, show_default=True, help="K/V of dense at the end of 2048 tokens."
)
@click.option("--window", default=256, show_default=True)
@click.option(
    "--layers-routed",
    "layers",
    default="1-29,2-29",
    show_default=True,
    help="Sets of layers to route, for a penalty of 0.",
)
@click.option("--penalties", default="0,1,3,10,30", show_default=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of fits and rows."
)
@torch.no_grad()
def main(model, texts, kv_share, window, layers, penalties, out):
    out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = loading.load(model)
    n_layer = len(architectures.decoder_layers(base))
    sequences = data_text.pack(tokenizer, data_text.default_texts()[0], 1024)
    sets = [parse_layers(part) for part in layers.split(",")]
    saved = out / f"fits-{window}.pt"
    if not saved.exists():
        every = sorted({layer for some in sets for layer in some})
        plan = CalibrationPlan({"kv": every}, kv_window=window)
        fits = measure(base, sequences, plan)
        torch.save((fits, drift(base, tokenizer, sequences, plan)), saved)
    (fits, drifts), path = torch.load(saved, weights_only=False), out / "rows.jsonl"
    done = {
        (row["layers"], row["drift_penalty"], row["kv_share"], row["window"])
        for row in rows.read(path)
    }

    for number, some in enumerate(sets):
        for penalty in [float(part) for part in penalties.split(",")][: None if number == 0 else 1]:
            name = f"{some[0]}-{some[-1]}"
            if (name, penalty, kv_share, window) in done:
                continue
            target = activation_for(kv_share, window, 2048, n_layer, n_layer - len(some))
            routed = {unit: fit for unit, fit in fits.items() if unit.layer in some}
            routers, _ = solve(routed, drift_penalty=penalty, drift=drifts)
            p = tuple(0.5 if layer in some else 0.0 for layer in range(n_layer))
            share = tuple(target if layer in some else 1.0 for layer in range(n_layer))
            config = MoDConfig(sink_tokens=4, kv_window=window, units={"kv": UnitConfig(p, share)})
            mod = MoDModel.from_base(base, tokenizer, config, routers)
            set_thresholds(mod, sequences[::3], {"kv": list(routers)}, {"kv": target})
            row = {
                "layers": name,
                "drift_penalty": penalty,
                "kv_share": kv_share,
                "window": window,
                "target": target,
            }
            row["activation"] = {
                text: positions(mod, file) for text, file in (pair.split("=", 1) for pair in texts)
            }
            row["equal"] = judge_point(mod, target, model, texts, 2048, 1)
            mod.detach()
            rows.append(path, row)


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
