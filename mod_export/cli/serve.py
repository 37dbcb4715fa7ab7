"""`mod-export serve`."""

from pathlib import Path

import click

from mod_export.cli.model import model_options, open_model


@click.command()
@click.argument("file", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--api-key", envvar="MOD_EXPORT_API_KEY", show_envvar=True,
              help="Key that clients have to send; default: none.")
@click.option("--name", help="What /v1/models calls it; default: the file's name.")
@model_options
def command(file, host, port, api_key, name, **model):
    """Serve the model in the GGUF FILE over HTTP, with OpenAI's API.

    Any client of that API works: its base URL is http://localhost:8000/v1.
    Requests wait for one another; GET /extras/mod tells the activation and the
    KV memory.
    """
    from mod_export import serve

    llm = open_model(file, **model)
    serve.run(llm, name or Path(file).stem, host, port, api_key, say=lambda line: click.echo(line, err=True))
