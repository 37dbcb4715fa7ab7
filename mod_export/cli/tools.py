"""The command `mod-export tools`."""

import click

from mod_export.errors import UserError


@click.command("tools")
@click.option("--cuda", is_flag=True, help="Those that were built for NVIDIA GPUs.")
def command(cuda: bool) -> None:
    """Print the folder of llama.cpp's tools, patched: llama-server, llama-bench and others.

    `mod-export build --tools` builds them. They read MoD files and dense ones.
    """
    from mod_export.llamacpp import build as llama_build

    folder = llama_build.tools_dir(cuda)
    if folder is None:
        raise UserError(
            "the tools are not built for these patches",
            f"run `mod-export build --tools{' --cuda' if cuda else ''}`",
        )
    click.echo(folder)
