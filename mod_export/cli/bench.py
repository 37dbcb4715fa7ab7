"""`mod-export bench`."""

import click


def _contexts(_ctx, _param, value: str) -> list[int]:
    try:
        numbers = [int(x) for x in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 16:
        raise click.BadParameter(f"{value!r} is no list of numbers from 16 up, such as 512,2048")
    return numbers


@click.command()
@click.argument("file", type=click.Path())
@click.option("--dense", required=True, type=click.Path(), help="The dense GGUF of the same model and quantisation.")
@click.option("--contexts", default="512,2048,8192", show_default=True, callback=_contexts,
              help="Prompt lengths in tokens, with commas.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each variant.")
@click.option("--decode", type=click.IntRange(min=4), default=32, show_default=True,
              help="Tokens decoded after each prompt.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option("--ubatch", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens per graph.")
@click.option("--text", type=click.Path(), help="Text of the prompt; default: the packaged one, repeated.")
@click.option("--floor", type=click.Path(), help="A dense GGUF without the routed layers (block units only).")
@click.option("--json", "json_file", type=click.Path(), help="Write the rows here too; `-` is stdout.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--force", is_flag=True, help="Replace an existing --json file.")
def command(file, dense, contexts, repeats, decode, threads, ubatch, text, floor, json_file, markdown, force):
    """Measure speed and KV memory of the MoD FILE against the dense one, and at both ends."""
    import json
    import sys

    from mod_export import bench, data
    from mod_export.files import atomic_file

    def say(line: str) -> None:
        click.echo(line, err=True)

    def run() -> list[dict]:
        words = data.read_texts([text]) if text else None
        rows = bench.bench(file, dense, contexts, repeats, decode, threads, ubatch, words, floor, say=say)
        click.echo(bench.report(rows, markdown), err=json_file == "-")
        return rows

    if json_file in (None, "-"):
        rows = run()
        if json_file:
            json.dump(rows, sys.stdout, indent=1)
            click.echo()
        return
    with atomic_file(json_file, force) as tmp:  # asked for first: a long run must not end in a name that is taken
        tmp.write_text(json.dumps(run(), indent=1) + "\n")
