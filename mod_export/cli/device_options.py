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


def _dtype(default: str, more: str = ""):
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=default,
        show_default=True,
        help="Type to compute in. auto: that of the weights where the device is fast in it, else "
        f"float32.{more}",
    )


dtype_option = _dtype("auto")
reference_dtype_option = _dtype("float32", " What may differ is wider in 16 bits.")
