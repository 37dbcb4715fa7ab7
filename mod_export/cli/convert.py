"""The command `mod-export convert`."""

import click

from mod_export.cli.options import (
    RenamedOption,
    force_option,
    layers_routed_option,
    output_option,
    shares,
    sink_tokens_option,
    units_option,
)
from mod_export.cli.output import show_messages
from mod_export.errors import UserError


@click.command("convert")
@click.argument("model", type=click.Path())
@output_option("DIR", "Directory to write.")
@units_option
@click.option(
    "--target-activation",
    default="0.5",
    show_default=True,
    callback=shares,
    metavar="SHARE",
    help="Share of (token, unit) pairs that run, of all kinds or of each: kv=0.5,attn=0.8.",
)
@click.option(
    "--kv-window",
    type=click.IntRange(min=1),
    show_default="256, at most 1/8 of the context",
    help="Number of recent tokens that kv units always see.",
)
@layers_routed_option(cls=RenamedOption, former="--layers")
@click.option(
    "--calibration-text",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    show_default="the packaged text",
    help="UTF-8 text to calibrate on; may be repeated.",
)
@sink_tokens_option()
@click.option(
    "--revision",
    metavar="REVISION",
    show_default="main",
    help="Branch, tag or commit of a MODEL of the Hugging Face hub.",
)
@click.option(
    "--adapter",
    type=click.Path(),
    metavar="ADAPTER",
    help="Take routers, and LoRA, from this adapter instead of calibrating: a directory, or the "
    "name of a packaged adapter or of one on the hub.",
)
@force_option
@click.pass_context
def command(ctx, model, output, adapter, revision, force, **options):
    """Make a Mixture-of-Depths model from an ordinary one.

    MODEL is the name of a model on the Hugging Face hub, such as Qwen/Qwen3-0.6B, a directory, a
    GGUF file, or `smollm2`. The architectures of GGUF files are listed in
    docs/how-to/convert-a-model.md. Nothing is trained: routers and thresholds are
    calibrated on text, in minutes on a CPU. docs/results/calibration.md says how well that works.
    With --adapter the routers come from an adapter that was trained for MODEL.
    """
    from mod_export.convert import convert, convert_adapter

    show_messages(clock=True)
    if adapter is None:
        target, layers = options.pop("target_activation"), options.pop("layers_routed")
        options |= {"target": target, "layers": layers, "revision": revision}
        convert(model, output, force=force, **options)
    else:
        refuse_given(ctx, options)
        convert_adapter(model, output, adapter, force, revision)
    click.echo(output)


def refuse_given(ctx, options):
    """Raise UserError for an option of calibration: an adapter holds its own."""
    spellings = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name in options:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = spellings[name]
            raise UserError(
                f"{option} does not go with --adapter, which has its own", f"leave out {option}"
            )
