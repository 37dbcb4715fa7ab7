"""`mod-export serve`."""

from pathlib import Path

import click

from mod_export.cli.model import model_options, open_model


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0: all of them.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0: any that is free.",
)
@click.option(
    "--api-key",
    envvar="MOD_EXPORT_API_KEY",
    show_envvar=True,
    help="Key that clients have to send; default: none.",
)
@click.option("--name", help="What answers call the model; default: the file's name.")
@model_options
def command(file, host, port, api_key, name, **model):
    """Serve the model in the GGUF FILE over HTTP, with OpenAI's API.

    Its clients' base URL is http://localhost:8000/v1: chats and completions, whole or streamed, one
    at a time. GET /mod tells the activation and the KV memory.
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
