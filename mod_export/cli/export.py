"""The command `mod-export export`."""

from pathlib import Path

import click

from mod_export.cli.options import force_option
from mod_export.cli.values import ModelName
from mod_export.formats.ggml_types import EXPORT_FORMATS

QUANT_HELP = f"Type of the base weights: {', '.join(EXPORT_FORMATS)}."
QUANT_DEFAULT = "q8_0; with --base, the types of that file"


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
    metavar="FILE.gguf",
    type=ModelName(gguf=True, path_type=Path),
    help="Put the routers on the weights of this GGUF file.",
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
    """Write a MoD directory as a GGUF file.

    The patched llama.cpp runs the file. Routers are stored as f32, whatever the type of the base
    weights. With --base, the weights come from an existing GGUF of the same model instead of from
    DIR. DIR may then be an adapter too, if the adapter holds routers only: a directory, or the name
    of a packaged adapter. An adapter without --base gives a file of routers alone, for the option
    --mod of other commands: they open a GGUF of the model with it.
    """
    from mod_export.common.text import megabytes
    from mod_export.export import export

    written = export(directory, output, quant=quant, base=base, dense=dense, force=force)
    click.echo(f"wrote {written} ({megabytes(written.stat().st_size, 1)})")
