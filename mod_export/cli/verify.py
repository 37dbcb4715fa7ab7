"""`mod-export verify`."""

import click


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "--reference",
    required=True,
    type=click.Path(),
    help="The MoD directory that FILE was exported from.",
)
@click.option("--text", type=click.Path(), help="Text to run; default: the packaged one.")
@click.option(
    "--tokens", type=click.IntRange(min=16), default=1024, show_default=True, help="Tokens in all."
)
@click.option(
    "--length",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="Tokens per sequence.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(file, reference, text, tokens, length, threads, as_json):
    """Compare the GGUF FILE in the runtime with its torch model; exit code 1 where they differ too
    much.
    """
    import json

    from mod_export.data.text import read_texts
    from mod_export.evaluation import parity

    result = parity.verify(
        file, reference, read_texts([text]) if text else None, tokens, length, threads
    )
    click.echo(json.dumps(result, indent=1, default=float) if as_json else parity.report(result))
    return 0 if result["passed"] else 1
