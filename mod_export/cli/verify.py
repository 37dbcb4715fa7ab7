"""The command `mod-export verify`."""

import click

from mod_export.cli.device_options import device_option, reference_dtype_option
from mod_export.cli.options import (
    base_option,
    cache_type_options,
    dense_option,
    json_flag,
    length_option,
    mod_option,
    text_option,
    threads_option,
)
from mod_export.cli.values import ModelName, model_argument


@click.command()
@model_argument()
@click.option(
    "--reference",
    required=True,
    type=ModelName(),
    help="The adapter or MoD directory that FILE was exported from.",
)
@mod_option()
@base_option
@dense_option(
    "The GGUF file that the model came from. Compare both with it too, with all units active.",
    metavar="ORIGINAL.gguf",
)
@text_option("Text to run.")
@click.option(
    "--tokens",
    type=click.IntRange(min=16),
    default=1024,
    show_default=True,
    help="Number of tokens in all.",
)
@length_option(default=512)
@cache_type_options(" of FILE", "f16; f32 for a file in f32")
@threads_option
@device_option
@reference_dtype_option
@json_flag
def command(
    file,
    reference,
    mod,
    base,
    dense,
    text,
    tokens,
    length,
    types,
    threads,
    device,
    dtype,
    as_json,
):
    """Compare a GGUF in the runtime with its torch model.

    The exit code is 1 where the GGUF FILE and the torch model differ too much. With --dense it is 1
    too where one of them is not the original model when all units are active. A model that was
    trained differs from its original.
    """
    from mod_export.common.text import json_text
    from mod_export.data.text import read_texts
    from mod_export.evaluation import parity

    result = parity.verify(
        file,
        reference,
        read_texts([text]) if text else None,
        tokens,
        length,
        threads,
        dense,
        types,
        device,
        dtype,
        mod,
        base,
    )
    click.echo(json_text(result, 1, float) if as_json else parity.report(result))
    return 0 if result["passed"] else 1
