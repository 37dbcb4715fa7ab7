"""The command `mod-export export`."""

from pathlib import Path

import click

from mod_export.cli.options import force_option
from mod_export.cli.values import ModelName
from mod_export.formats.ggml_types import EXPORT_FORMATS

QUANT_HELP = f"Type of the base weights: {', '.join(EXPORT_FORMATS)}."
QUANT_DEFAULT = "q8_0; with a GGUF file as --base, the types of that file"


@click.command("export")
@click.argument("directory", metavar="DIR", type=ModelName(path_type=Path))
@click.option(
    "--output",
    "-o",
    metavar="FILE.gguf",
    type=click.Path(),
    required=True,
    help="GGUF file to write. In FOLDER/, a name that ends with /, the file gets its name by the "
    "convention of GGUF files.",
)
@click.option(
    "--quant",
    type=click.Choice(list(EXPORT_FORMATS), case_sensitive=False),
    metavar="TYPE",
    show_default=QUANT_DEFAULT,
    help=QUANT_HELP,
)
@click.option(
    "--base",
    metavar="MODEL",
    type=ModelName(gguf=None, path_type=Path),
    help="Put the routers on the weights of this GGUF file, or those of an adapter on a directory, "
    "a name on the hub or `smollm2`.",
)
@click.option(
    "--dense",
    is_flag=True,
    help="Leave the routers out: write the model before its conversion. With --base, write that "
    "file in the type of --quant.",
)
@force_option
def command(
    directory: Path, output: str, quant: str | None, base: Path | None, dense: bool, force: bool
) -> None:
    """Write an adapter on its model, or a MoD directory, as a GGUF file.

    The patched llama.cpp runs the file. Routers are stored as f32, whatever the type of the base
    weights. DIR is an adapter, such as `mod-export convert` writes, or the name of a packaged one;
    --base is the model that it was made for. Onto a GGUF file the routers go as they are, in any
    quantisation. LoRA of an adapter is merged into the weights first. An adapter without --base
    gives a file of routers alone, for the option --mod of other commands: they open a GGUF of the
    model with it. A MoD directory holds its weights, and needs no --base.
    """
    from mod_export.common.text import short_bytes
    from mod_export.export import export

    written = export(directory, output, quant=quant, base=base, dense=dense, force=force)
    click.echo(f"wrote {written} ({short_bytes(written.stat().st_size)})")
