"""The command `mod-export serve`."""

from pathlib import Path

import click

from mod_export.cli.options import model_options
from mod_export.cli.output import show_messages
from mod_export.cli.passed_on import PassingCommand, passed_on
from mod_export.cli.values import model_argument


@click.command(cls=PassingCommand)
@model_argument()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is all addresses of this machine.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="MOD_EXPORT_API_KEY",
    show_envvar=True,
    show_default="no key",
    help="Key that clients have to send.",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    show_default="localhost and addresses of this machine alone",
    help="Name by which a proxy or a browser reaches a server that listens on this machine alone; "
    "may be repeated, * is any name.",
)
@click.option(
    "-a",
    "--name",
    "--alias",
    show_default="the name of the file",
    help="Name of the model in answers.",
)
@model_options
def command(file, name, **options):
    """Serve a model over HTTP, with OpenAI's API and a page to chat.

    FILE is a GGUF file. The command becomes the patched llama-server, which it builds the first
    time. What follows -- are llama-server's own options, such as: mod-export serve model.gguf --
    -np 8 --metrics. The page is at http://localhost:8000, the base URL of clients is
    http://localhost:8000/v1. GET /props tells the units of the model, GET /slots the activation and
    the KV memory.
    """
    from mod_export.serving import llama_server

    show_messages()
    start = llama_server.ServerStart(file=str(file), name=name or Path(file).stem, **options)
    llama_server.check(start)
    tools = llama_server.tools_folder()
    where = f"[{start.host}]" if ":" in start.host else start.host
    port = f"port {start.port}" if start.port else "a free port"
    click.echo(f"{start.name} at {where}, {port}; Ctrl-C ends it", err=True)
    llama_server.execute(start, tools, passed_on())
