"""`mod-export inspect`: options for inspection."""

import json

import click


@click.command("inspect")
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(file: str, as_json: bool) -> None:
    """Show schema, routed units, thresholds and activation of a GGUF, and the KV memory to expect.

    Checks the file against the schema on the way; needs no patched llama.cpp.
    """
    from mod_export.inspection import inspect, render

    report = inspect(file)
    click.echo(json.dumps(report) if as_json else render(report))
