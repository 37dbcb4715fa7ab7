"""The command `mod-export synth`."""

from dataclasses import replace
from pathlib import Path

import click

from mod_export.cli.options import (
    force_option,
    layers_routed_option,
    output_option,
    sink_tokens_option,
    units_option,
)
from mod_export.cli.output import show_messages
from mod_export.cli.values import Finite, ModelName, RenamedOption
from mod_export.config import HEAD, KV_GRANULARITIES, KV_WINDOW

_NUMBER = click.IntRange(min=1)


@click.command("synth")
@click.argument("preset", type=ModelName(gguf=True))
@output_option("FILE", "GGUF file to write.")
@click.option(
    "--dense",
    type=click.Path(),
    metavar="FILE",
    help="GGUF file to write the same model without routers to.",
)
@click.option(
    "--quant",
    show_default="q4_0, or mxfp4 for gpt-oss-20b",
    help="Type of the weights; mxfp4 is one of experts, beside which all else is q8_0.",
)
@units_option
@click.option(
    "--target-activation",
    "activation",
    cls=RenamedOption,
    former="--activation",
    default="0.5",
    show_default=True,
    metavar="SHARE",
    help="Share of tokens that run a unit, of all kinds or of each: attn=0.3,kv=0.5.",
)
@layers_routed_option()
@sink_tokens_option(cls=RenamedOption, former="--sinks")
@click.option(
    "--kv-window",
    type=_NUMBER,
    default=KV_WINDOW,
    show_default=True,
    help="Number of recent tokens that kv units always see.",
)
@click.option(
    "--kv-granularity",
    type=click.Choice(KV_GRANULARITIES),
    default=HEAD,
    show_default=True,
    help="What a decision of kv units is about: each K/V head, or a layer with all its heads.",
)
@click.option(
    "-s",
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of all random numbers.",
)
@click.option(
    "--layers",
    type=_NUMBER,
    help="Number of layers; this option and those below replace a number of the preset.",
)
@click.option("--embd", type=_NUMBER, help="Size of the residual stream.")
@click.option("--heads", type=_NUMBER, help="Number of attention heads.")
@click.option("--heads-kv", type=_NUMBER, help="Number of heads of K and V.")
@click.option("--head-size", type=_NUMBER, help="Size of a head; without it embd / heads.")
@click.option("--ff", type=_NUMBER, help="Size of the inner layer of the FFN, or of each expert.")
@click.option(
    "--experts", type=click.IntRange(min=0), help="Number of experts; 0 for an FFN without."
)
@click.option(
    "--experts-used",
    "used",
    type=click.IntRange(min=0),
    help="Number of experts that each token goes through.",
)
@click.option("--vocab", type=_NUMBER, help="Number of tokens in the vocabulary.")
@click.option("--ctx", type=_NUMBER, help="Trained context, in tokens.")
@click.option(
    "--tied/--untied", default=None, help="Whether the embedding is the output matrix too."
)
@click.option("--rope-base", type=Finite(min=1), help="Base of the frequencies of RoPE.")
@force_option
def command(
    preset,
    output,
    dense,
    quant,
    units,
    activation,
    layers_routed,
    sink_tokens,
    kv_window,
    kv_granularity,
    seed,
    force,
    **shape,
):
    """Write a MoD GGUF of any shape with random weights, to measure speed.

    PRESET is the shape to start from: 135m (SmolLM2), 1b, 3b (Llama 3.2), 8b (Llama 3.1), 30b-a3b
    (Qwen3, a mixture of experts), qwen3.5-4b, qwen3.5-9b, qwen3.5-35b-a3b or gpt-oss-20b. Or it is
    a dense GGUF file, which keeps its weights and gets random routers. The activation is exact, or
    fitted to text on a file's own weights.

    docs/how-to/measure-with-synthetic-models.md has a table of the shapes.
    """
    from mod_export.errors import UserError
    from mod_export.synthetic.keys import header
    from mod_export.synthetic.onto_base import onto
    from mod_export.synthetic.routers import SynthesisOptions, routing_of
    from mod_export.synthetic.shape import preset_named
    from mod_export.synthetic.write import synth

    show_messages(clock=True)
    options = SynthesisOptions(
        units, activation, layers_routed, sink_tokens, kv_window, kv_granularity
    )
    if Path(preset).is_file():
        if dense or any(value is not None for value in shape.values()):
            raise UserError(
                f"{preset} has its shape, and is the dense file itself",
                "leave --dense and shapes out",
            )
        onto(preset, output, options, seed, force)
        click.echo(output)
        return
    shape = replace(
        preset_named(preset), **{k: v for k, v in shape.items() if v is not None}
    ).checked()
    config = routing_of(header(shape), options)
    synth(output, shape, quant or shape.quant, config, dense, seed, force)
    click.echo(output)
