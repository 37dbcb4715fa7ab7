"""The command `mod-export serve`."""

from pathlib import Path

import click

from mod_export.cli.options import ModelName, model_options, open_model


@click.command()
@click.argument("file", type=ModelName(gguf=True))
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
@click.option("--name", show_default="the name of the file", help="Name of the model in answers.")
@model_options
def command(file, host, port, api_key, name, **model):
    """Serve a model over HTTP, with OpenAI's API.

    FILE is a GGUF file. The base URL of clients is http://localhost:8000/v1. The server answers
    chats and completions, whole or streamed, one at a time. GET /mod tells the activation and the
    KV memory.
    """
    from mod_export.serving.server import listen, serve

    with listen(host, port) as sock:
        llm, name = open_model(file, **model), name or Path(file).stem
        llm.require_vocab()
        where = f"[{host}]" if ":" in host else host
        address = f"http://{where}:{sock.getsockname()[1]}/v1"
        click.echo(f"{name} at {address}; Ctrl-C ends it", err=True)
        if "tokenizer.chat_template" not in llm.metadata:
            click.echo("the model has no chat template: only /v1/completions", err=True)
        serve(llm, name, sock, api_key)
