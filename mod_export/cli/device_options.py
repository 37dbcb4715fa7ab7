"""Where torch computes and in which type: options of the commands that run a model in torch."""

import click

DTYPES = ("auto", "float32", "bfloat16", "float16")

device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda|cuda:N|mps",
    help="Where torch computes.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Type to compute in. auto: that of the weights where the device is fast in it, else "
    "float32.",
)
