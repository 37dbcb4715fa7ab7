"""Train and judge many ways to make a MoD model: the figures of docs/results/training.md.

    T="--data train/ --text wiki=wiki.txt --text book=book.txt --out study"
    python -m scripts.studies.training list
    python -m scripts.studies.training run $T 'kv-*'          # points by name, with wildcards
    python -m scripts.studies.training time --out study '*-lora'   # decode time, by the runtime
    python -m scripts.studies.training report --out study     # tables and plots from the rows
    python -m scripts.studies.training judge trained --target 0.5 --text wiki=wiki.txt
    python -m scripts.studies.training lengths trained --text wiki=wiki.txt

`judge` takes any MoD model. With --out the model is a row of the study, and can be timed. `lengths`
measures the activation from 512 to 8192 tokens.

Each point starts from the calibrated conversion of its kind (made once), is trained by
mod_export.training.run, and judged by mod_export.evaluation.run with hard decisions on sequences of
--length tokens. A finished row goes to rows.jsonl at once; rows that are there are not computed
again, and an interrupted training goes on from its checkpoint.
"""

from __future__ import annotations

import fnmatch
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

from mod_export.adapter import open_model
from mod_export.cli.output import run_script, show_messages
from mod_export.cli.values import shares
from mod_export.common.tables import format_table
from mod_export.config import KV_WINDOW, UnitConfig
from mod_export.convert import convert
from mod_export.model import loading
from mod_export.model.mod_model import MoDModel
from mod_export.training.config import TrainConfig
from mod_export.training.run import train
from mod_export.units import KV, UNIT_KINDS, shares_by_kind
from scripts.studies import frontier
from scripts.studies.judging import judge_point
from scripts.studies.lengths import activation_by_length, lengths_table
from scripts.studies.points import POINTS
from scripts.studies.report import training_table
from scripts.studies.rows import append, read

ROWS, TIMES = "rows.jsonl", "times.jsonl"
SINK_TOKENS = 4


def activation_for(
    kv_share: float, window: int, length: int, n_layer: int, whole: int = UNIT_KINDS[KV].first_layer
) -> float:
    """Return the activation of kv units that gives a share of the dense K/V.

    A sequence of `length` tokens then holds `kv_share` of the dense K/V at its end.

    whole: layers without a router.
    """
    of_units = (kv_share * n_layer - whole) / (n_layer - whole)
    recent = (window - 1) / length
    return min(1.0, max(0.005, (of_units - recent) / (1 - recent)))


def make_point(
    name: str,
    point: dict,
    out: Path,
    model: str,
    data: tuple,
    tokens: int,
    length: int,
    precision: str,
    batch: int,
    train_length: int,
    **_,
):
    """Return the MoDModel of a point, and what is known of how it was made."""
    if "kv_share" in point:
        n_layer = 30 if model == "smollm2" else loading.load(model)[0].config.num_hidden_layers
        target = activation_for(point["kv_share"], point["window"], length, n_layer)
    else:
        target = point["target"]
    shares = shares_by_kind(target, point["units"].split("+")).values()
    start = out / "-".join(
        [point["units"], *(f"{share:.4f}" for share in shares)]
    )  # a window has a target of its own
    if not start.exists():
        convert(
            model,
            start,
            units=point["units"],
            target=target,
            kv_window=point.get("window", KV_WINDOW),
            sink_tokens=SINK_TOKENS,
            save="full",
        )
    if point["way"] == "window":
        return as_window(MoDModel.load(start), target, length), {"target": target}
    if point["train"] is None:
        return MoDModel.load(start), {"target": target}
    made = out / name
    config = TrainConfig(
        data=tuple(data),
        target=target,
        tokens=tokens,
        length=train_length,
        batch=batch,
        precision=precision,
        limit=4 * tokens,
        **point["train"],
    )
    resume = Path(f"{made}.run/checkpoint.pt").exists()
    figures = train(str(start), str(made), config, "full", resume, force=True)
    return MoDModel.load(made), {"target": target, "held_out": figures}


def as_window(model: MoDModel, target: float, length: int) -> MoDModel:
    """Return a model with sinks and a recent window that hold as many K/V as routers.

    The K/V are equal at the end of `length` tokens, to those of routers of this activation.
    """
    units = model.config.units["kv"]
    never = tuple(0.999 if p else 0.0 for p in units.threshold)
    least = model.config.kv_window
    window = round(target * (length - least)) + least - SINK_TOKENS
    kv = UnitConfig(never, never, units.heads)
    config = replace(model.config, kv_window=window, units={"kv": kv})
    routers = {
        unit: (torch.zeros_like(w), torch.full_like(b, -20))
        for unit, (w, b) in model.router_tensors().items()
    }
    return MoDModel.from_base(model.base, model.tokenizer, config, routers)


@click.group()
def study():
    """Compare ways to train a Mixture-of-Depths model."""
    show_messages(stdout=True)


@study.command("list")
def list_points():
    """Name every point."""
    for name, point in POINTS.items():
        click.echo(f"{name:32} {point}")


@study.command()
@click.argument("patterns", nargs=-1, required=True)
@click.option("--model", default="smollm2", show_default=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the results."
)
@click.option("--data", multiple=True, required=True, help="To train on.")
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="NAME=FILE", help="To judge by."
)
@click.option("--tokens", default=100_000, show_default=True, help="Of each training.")
@click.option("--length", default=2048, show_default=True, help="Tokens in a sequence to judge by.")
@click.option("--count", default=2, show_default=True, help="Sequences of each text.")
@click.option("--precision", default="auto", show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option(
    "--train-length", default=512, show_default=True, help="Tokens in a sequence to train on."
)
def run(patterns, out, **given):
    """Train and judge the points whose names match."""
    names = matching(patterns)
    out.mkdir(exist_ok=True)
    rows = out / ROWS
    key = {k: given[k] for k in ("tokens", "length", "count", "train_length")}
    done = read(rows)
    for name in names:
        if any(row["name"] == name and row["settings"] == key for row in done):
            click.echo(f"{name}: done already")
            continue
        begin = time.monotonic()
        model, record = make_point(name, POINTS[name], out, **given)
        texts = judge_point(model, None, **given)
        row = {"name": name, "settings": key, **POINTS[name], **record, "texts": texts}
        if POINTS[name]["way"] not in ("window", "static", "topk"):  # these meet it by construction
            row["equal"] = judge_point(model, record["target"], **given)
        row["seconds"] = round(time.monotonic() - begin)
        append(rows, row)


@study.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--target",
    callback=lambda *given: given[-1] and shares(*given),
    metavar="SHARE",
    help="Activation that thresholds are shifted to; of each kind: kv=0.1,attn=0.8.  "
    "[default: they stay]",
)
@click.option(
    "--kv-share",
    type=float,
    metavar="SHARE",
    help="Share of the dense K/V that thresholds of kv units are shifted to.  [default: they stay]",
)
@click.option("--model", default="smollm2", show_default=True, help="The original.")
@click.option(
    "--text", "texts", multiple=True, required=True, metavar="NAME=FILE", help="To judge by."
)
@click.option("--length", default=2048, show_default=True, help="Tokens in a sequence.")
@click.option("--count", default=1, show_default=True, help="Sequences of each text.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of results that it becomes a row of."
)
def judge(directory, target, kv_share, out, **given):
    """Judge the MoD model in DIRECTORY as `run` judges its points."""
    made, path = open_model(directory), Path(directory).resolve()
    row = {
        "name": path.name,
        "settings": {k: given[k] for k in ("length", "count")},
        "way": "trained",
        "units": "+".join(made.config.units),
        "directory": str(path),
    }
    if out is not None and any(other["name"] == path.name for other in read(out / ROWS)):
        raise click.UsageError(f"{out / ROWS} has a row {path.name} already")
    begin = time.monotonic()
    shifted = target is not None or kv_share is not None
    found = own = None if shifted and out is None else judge_point(made, None, **given)
    if shifted:
        row |= {"target": target, "kv_share": kv_share}
        found = row["equal"] = judge_point(made, target, kv_share=kv_share, **given)
    if out is not None:
        out.mkdir(exist_ok=True)
        append(out / ROWS, {**row, "texts": own, "seconds": round(time.monotonic() - begin)})
    rows = [
        [
            name,
            f"{text['kl']:.4f}",
            f"{text['perplexity'] / text['perplexity_dense']:.4f}",
            f"{text['activation']:.3f}",
            f"{text['kv_share']:.3f}",
        ]
        for name, text in found.items()
    ]
    mean = sum(text["kl"] for text in found.values()) / len(found)
    rows.append(["mean", f"{mean:.4f}", "", "", ""])
    click.echo(
        format_table(
            ["text", "KL", "perplexity / dense", "activation", "K/V of dense"], rows, markdown=True
        )
    )


@study.command("lengths")
@click.argument("model", type=click.Path(exists=True))
@click.option("--text", "texts", multiple=True, required=True, metavar="NAME=FILE", help="To read.")
@click.option(
    "--length",
    "lengths",
    multiple=True,
    type=click.IntRange(min=1),
    default=(512, 1024, 2048, 4096, 8192),
    show_default=True,
    help="Tokens; may be repeated.",
)
@click.option(
    "--count",
    default=7,
    show_default=True,
    type=click.IntRange(min=1),
    help="Sequences of each text.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of the runtime.  [default: all cores]")
def lengths_command(model, texts, lengths, count, threads):
    """Show which share of tokens MODEL takes as what it reads grows longer.

    MODEL is a MoD directory or GGUF file.
    """
    files = dict(pair.split("=", 1) for pair in texts)
    click.echo(lengths_table(activation_by_length(model, files, lengths, count, threads), lengths))


@study.command("time")
@click.argument("patterns", nargs=-1, required=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the results."
)
@click.option(
    "--context", default=4096, show_default=True, help="Tokens before those that are timed."
)
@click.option("--rounds", default=6, show_default=True)
def time_points(patterns, out, context, rounds):
    """Time the trained points whose names match, and models judged with --out.

    The runtime does the timing.
    """
    done = {row["name"] for row in read(out / TIMES)}
    judged = {row["name"]: Path(row["directory"]) for row in read(out / ROWS) if "directory" in row}
    made = {name: out / name for name in POINTS} | judged
    for name in matching(patterns, made):
        if name in done or not made[name].is_dir():
            continue
        row = {"name": name, **frontier.time_point(made[name], out, context, rounds)}
        append(out / TIMES, row)


@study.command()
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option(
    "--docs", type=click.Path(path_type=Path), help="Folder for the plots; default: --out."
)
@click.option(
    "--measured",
    default="",
    metavar="WORD",
    help="Of the times those alone whose machine or day it names.",
)
def report(out, docs, measured):
    """Print the tables and draw the plots."""
    rows = read(out / ROWS)
    times = [row for row in read(out / TIMES) if measured in row.get("measured", "")]
    if compared := [row for row in rows if all("kl" in text for text in row["texts"].values())]:
        click.echo(training_table(compared, docs or out))
    if times:
        click.echo("\n" + frontier.report(rows, times, docs or out))


def matching(patterns: tuple[str, ...], known=POINTS) -> list[str]:
    names = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise click.BadParameter(f"no point matches {' '.join(patterns)}")
    return names


if __name__ == "__main__":
    run_script(study)
