"""The command `mod-export inspect`."""

import click

from mod_export.cli.options import json_flag, mod_option
from mod_export.cli.values import model_argument
from mod_export.common.text import json_text


@click.command("inspect")
@model_argument()
@mod_option()
@json_flag
def command(file: str, mod: str | None, as_json: bool) -> None:
    """Show what a GGUF file routes or could route, and the KV it needs.

    The report of a MoD file has the schema, the routed units with their thresholds and activation,
    and the KV memory to expect. That of a dense file has the kinds of units which it can have, or
    why it can have none. FILE may be a file of routers too. The file is checked against the schema
    on the way. This command needs no patched llama.cpp.
    """
    from mod_export.inspection import inspect, render

    report = inspect(file, mod)
    click.echo(json_text(report) if as_json else render(report))
