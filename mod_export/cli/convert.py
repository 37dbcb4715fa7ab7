"""`mod-export convert`: options for convert.py."""

import click

from mod_export.cli.output import show_messages
from mod_export.cli.shares import shares
from mod_export.errors import UserError


@click.command("convert")
@click.argument("model")
@click.option(
    "--output", "-o", required=True, type=click.Path(), metavar="DIR", help="Directory to write."
)
@click.option(
    "--units",
    default="kv",
    show_default=True,
    metavar="KINDS",
    help="What a token may skip: kv (being remembered), attn, block, ffn; combined with +.",
)
@click.option(
    "--target-activation",
    default="0.5",
    show_default=True,
    callback=shares,
    metavar="SHARE",
    help="Share of (token, unit) pairs that are to run; of each kind: kv=0.5,attn=0.8.",
)
@click.option(
    "--kv-window",
    type=click.IntRange(min=1),
    help="Recent tokens that kv units always see.  [default: 256, at most 1/8 of the context]",
)
@click.option(
    "--layers",
    default="auto",
    show_default=True,
    help="Layers to route, from 0 on: 3-28 or 2,4,8-11; auto: kv from 1 on, others from 2 on.",
)
@click.option(
    "--calibration-text",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="UTF-8 text to calibrate on, may be repeated; default: the text that comes with the package.",
)
@click.option(
    "--sink-tokens",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="First tokens of a sequence, which are always active.",
)
@click.option(
    "--adapter",
    metavar="ADAPTER",
    help="Take routers, and LoRA, from an adapter instead: a directory, or the name of a packaged one.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.pass_context
def command(ctx, model, output, adapter, force, **options):
    """Make a Mixture-of-Depths model from MODEL, without training.

    MODEL is a Hugging Face directory, a GGUF file that transformers can load, or `smollm2`. Routers
    and thresholds are calibrated on text, in minutes on a CPU; docs/results/calibration.md says how well
    that works. With --adapter they come from an adapter that was trained for MODEL.
    """
    from mod_export.convert import convert, convert_adapter

    show_messages(clock=True)
    if adapter is None:
        convert(model, output, target=options.pop("target_activation"), force=force, **options)
    else:
        refuse_given(ctx, options)
        convert_adapter(model, output, adapter, force)
    click.echo(output)


def refuse_given(ctx, options):
    """What the adapter holds cannot be chosen anew."""
    for name in options:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} does not go with --adapter, which has its own", f"leave out {option}"
            )
