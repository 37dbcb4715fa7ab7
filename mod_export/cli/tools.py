"""The command `mod-export tools`."""

import click

from mod_export.errors import UserError


@click.command("tools")
@click.option("--cuda", is_flag=True, help="Those that were built for NVIDIA GPUs.")
@click.option("--stock", is_flag=True, help="Those that were built without the patches.")
def command(cuda: bool, stock: bool) -> None:
    """Print the folder of llama.cpp's tools, patched: llama-server, llama-bench and others.

    `mod-export build --tools` builds them. They read MoD files and dense ones.
    """
    from mod_export.llamacpp import build as llama_build

    folder = llama_build.tools_dir(cuda, stock)
    if folder is None:
        flags = f"--tools{' --stock' if stock else ''}{' --cuda' if cuda else ''}"
        what = (
            "the stock tools are not built"
            if stock
            else "the tools are not built for these patches"
        )
        raise UserError(what, f"run `mod-export build {flags}`")
    click.echo(folder)
