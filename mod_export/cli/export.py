"""`mod-export export`: options for export."""

from pathlib import Path

import click

from mod_export.formats.ggml_types import EXPORT_FORMATS

QUANT_HELP = f"Type of the base weights: {', '.join(EXPORT_FORMATS)}. Default: q8_0; with --base, as they are there."


@click.command("export")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="FILE.gguf", type=click.Path(path_type=Path), required=True)
@click.option(
    "--quant",
    type=click.Choice(list(EXPORT_FORMATS), case_sensitive=False),
    metavar="TYPE",
    help=QUANT_HELP,
)
@click.option(
    "--base",
    metavar="FILE.gguf",
    type=click.Path(path_type=Path),
    help="Put the routers on this file.",
)
@click.option(
    "--dense",
    is_flag=True,
    help="Leave the routers out: the model before conversion. With --base that file, as --quant.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
def command(
    directory: Path, output: Path, quant: str | None, base: Path | None, dense: bool, force: bool
) -> None:
    """Write the MoD model in DIR as a GGUF file for the patched llama.cpp.

    Routers are stored as f32 whatever the type of the base weights. With --base, the weights come
    from an existing GGUF of the same model instead of from DIR. DIR may then also be an adapter, if
    it
    holds routers only: a directory, or the name of a packaged one.
    """
    from mod_export.export import export

    export(directory, output, quant=quant, base=base, dense=dense, force=force)
    click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
