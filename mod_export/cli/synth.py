"""`mod-export synth`: options for synth.py."""

from dataclasses import replace
from pathlib import Path

import click

from mod_export.cli.numbers import Finite
from mod_export.cli.output import show_messages
from mod_export.config import KV_WINDOW

_NUMBER = click.IntRange(min=1)


@click.command("synth")
@click.argument("preset")
@click.option(
    "--output", "-o", required=True, type=click.Path(), metavar="FILE", help="GGUF file to write."
)
@click.option(
    "--dense", type=click.Path(), metavar="FILE", help="Write the same model without routers here."
)
@click.option("--quant", default="q4_0", show_default=True, help="Type of the weights.")
@click.option(
    "--units",
    default="kv",
    show_default=True,
    metavar="KINDS",
    help="What a token may skip: kv (being remembered), attn, block, ffn; combined with +.",
)
@click.option(
    "--activation",
    default="0.5",
    show_default=True,
    metavar="A",
    help="Share of tokens that run a unit; for each kind: attn=0.3,kv=0.5.",
)
@click.option(
    "--layers-routed",
    default="auto",
    show_default=True,
    metavar="LAYERS",
    help="Layers to route: 2-, 3-28, 2,4,8-11; auto: kv from 1 on, others from 2 on.",
)
@click.option(
    "--sinks",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="First tokens of a sequence, which are always active.",
)
@click.option(
    "--kv-window",
    type=_NUMBER,
    default=KV_WINDOW,
    show_default=True,
    help="Recent tokens that kv units always see.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of all random numbers.",
)
@click.option(
    "--layers",
    type=_NUMBER,
    help="Number of layers; this and the next ones instead of the preset's.",
)
@click.option("--embd", type=_NUMBER, help="Size of the residual stream.")
@click.option("--heads", type=_NUMBER, help="Attention heads.")
@click.option("--heads-kv", type=_NUMBER, help="Heads of K and V.")
@click.option("--ff", type=_NUMBER, help="Size of the FFN's inner layer.")
@click.option("--vocab", type=_NUMBER, help="Number of tokens.")
@click.option("--ctx", type=_NUMBER, help="Trained context, in tokens.")
@click.option(
    "--tied/--untied", default=None, help="Whether the embedding is the output matrix too."
)
@click.option("--rope-base", type=Finite(min=1), help="Base of RoPE's frequencies.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
def command(
    preset,
    output,
    dense,
    quant,
    units,
    activation,
    layers_routed,
    sinks,
    kv_window,
    seed,
    force,
    **shape,
):
    """Write a MoD GGUF with random weights and exact activation, to measure speed.

    PRESET is the shape to start from: 135m (SmolLM2), 1b, 3b (Llama 3.2) or 8b (Llama 3.1). Or it
    is a dense GGUF file, which keeps its weights and gets random routers, fitted to the activation
    on text. docs/how-to/measure-with-synthetic-models.md.
    """
    from mod_export.errors import UserError
    from mod_export.synthetic.onto_base import onto
    from mod_export.synthetic.routers import routing
    from mod_export.synthetic.shape import preset_named
    from mod_export.synthetic.write import synth

    show_messages(clock=True)
    if Path(preset).is_file():
        if dense or any(value is not None for value in shape.values()):
            raise UserError(
                f"{preset} has its shape, and is the dense file itself",
                "leave --dense and shapes out",
            )
        onto(preset, output, units, activation, layers_routed, sinks, kv_window, seed, force)
        click.echo(output)
        return
    shape = replace(
        preset_named(preset), **{k: v for k, v in shape.items() if v is not None}
    ).checked()
    config = routing(shape.layers, units, activation, layers_routed, sinks, kv_window)
    synth(output, shape, quant, config, dense, seed, force)
    click.echo(output)
