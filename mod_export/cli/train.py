"""`mod-export train`: the fields of TrainConfig as options."""

import os

import click

from mod_export.cli.options import base_option, output_option
from mod_export.cli.output import show_messages
from mod_export.cli.values import Finite, ModelName, RenamedOption, SaveForm, shares
from mod_export.training.config import (
    DTYPES,
    LOSS_ON,
    METHODS,
    PARAMETERS,
    PRECISIONS,
    TrainConfig,
    default_of,
    default_text_of,
    help_of,
)

SHARE = Finite(0, 1)
POSITIVE = Finite(0, min_open=True)
WEIGHT = Finite(0)
COUNT = click.IntRange(1)


def field(name: str, type=None, *spellings: str, **more):
    """Return the option of a field of TrainConfig, with its help text and default.

    spellings: of the option, by default the field's name. more: as click.option takes it.
    """
    default = default_of(name)
    if isinstance(default, bool):
        more["is_flag"] = True
    else:
        more |= {"type": type, "default": default}
        more["show_default"] = default_text_of(name) or default not in (None, "")
    spellings = spellings or (f"--{name.replace('_', '-')}",)
    return click.option(*spellings, name, help=help_of(name), **more)


@click.command("train")
@click.argument("directory", type=ModelName(), metavar="DIR")
@base_option
@output_option("OUT", "Directory to write.")
@click.option(
    "--data",
    "-d",
    multiple=True,
    required=True,
    type=click.Path(),
    metavar="PATH",
    help=help_of("data"),
)
@click.option(
    "--target-activation",
    "target",
    default="0.5",
    show_default=True,
    callback=shares,
    metavar="SHARE",
    help=help_of("target"),
)
@field("parameters", click.Choice(PARAMETERS), "--train")
@field("tokens", COUNT)
@field("length", click.IntRange(16))
@field("batch", COUNT)
@field("accumulate", COUNT)
@field("limit", COUNT)
@field("loss_on", click.Choice(LOSS_ON))
@field("recall", SHARE)
@field("teacher", ModelName(), metavar="MODEL")
@field("method", click.Choice(METHODS))
@field("per_layer")
@field("start", SHARE, "--start-activation", metavar="SHARE")
@field("anneal", SHARE)
@field("load", WEIGHT, "--load-weight")
@field("drift_penalty", WEIGHT, cls=RenamedOption, former="--steady")
@field("kl_weight", WEIGHT)
@field("hidden_weight", WEIGHT)
@field("lm_weight", WEIGHT)
@field("temperature", POSITIVE)
@field("router_lr", POSITIVE)
@field("lora_lr", POSITIVE)
@field("full_lr", POSITIVE)
@field("warmup", SHARE)
@field("clip", POSITIVE)
@field("lora_rank", COUNT)
@field("lora_alpha", POSITIVE)
@field("precision", click.Choice(PRECISIONS))
@field("device", metavar="cpu|cuda|cuda:N|mps")
@field("dtype", click.Choice(DTYPES))
@field("four_bit")
@field("recompute")
@field("held_out", COUNT)
@field("eval_every", COUNT)
@field("save_every", COUNT)
@field("seed", click.IntRange(0, 2**32 - 1), "-s", "--seed")
@click.option(
    "--save",
    "save_as",
    type=SaveForm(),
    metavar="adapter|full",
    show_default="adapter; full where the weights are no longer the original's",
    help="What is written: an adapter of routers and LoRA only, or a whole MoD directory.",
)
@click.option(
    "--local",
    "--layer-local",
    "local",
    is_flag=True,
    help="Teach kv routers layer by layer, each by what its own attention loses: one layer is in "
    "memory at a time. Each sequence is learnt from twice. torchrun, which takes --local for an "
    "option of its own, lets --layer-local pass.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in OUT.run.")
@click.option(
    "--force", is_flag=True, help="Replace an existing output, and the checkpoint of another run."
)
def command(directory, base, output, data, save_as, local, resume, force, **options):
    """Train routers and weights, distilling from the original.

    DIR is an adapter or a MoD directory that `mod-export convert` has written, or the name of a
    packaged adapter. The original model teaches, so that training needs nothing but text. The
    trained model keeps the quality of the original at the target activation. OUT.run holds the
    checkpoint, metrics.jsonl and plots. On several GPUs run `accelerate launch -m mod_export train
    ...`.
    """
    from mod_export.common import extras

    extras.require("accelerate")
    if options["parameters"] == "lora":
        extras.require("peft")
    if options["four_bit"]:
        extras.require("bitsandbytes")
    show_messages(clock=True)
    config = TrainConfig(data=data, **options)
    if local:
        from mod_export.training.local import train_local

        train_local(directory, output, config, save_as, resume, force, base)
        return
    if not extras.is_installed("matplotlib") and os.environ.get("RANK", "0") == "0":
        click.echo(f"note: there will be no plots; {extras.cure('matplotlib')}", err=True)

    from mod_export.training.run import train

    train(directory, output, config, save_as, resume, force, base)
