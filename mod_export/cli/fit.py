"""`mod-export fit`."""

import click

from mod_export.cli.numbers import Finite


@click.command()
@click.argument("file", type=click.Path())
@click.option(
    "--memory", required=True, help="What a run may take: 8G, 512M or bytes; 1G is 1024M."
)
@click.option(
    "--dense",
    type=click.Path(),
    help="The dense GGUF to compare with; default: FILE with all units active.",
)
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of K and V.",
)
@click.option(
    "--ubatch",
    type=click.IntRange(1, 4096),
    default=512,
    show_default=True,
    help="Tokens per graph.",
)
@click.option(
    "--margin",
    type=Finite(min=-1),
    default=0.1,
    show_default=True,
    help="More activation than on the calibration text, as a share of it.",
)
@click.option(
    "--check", is_flag=True, help="Run it and compare; exit code 1 where it takes too much."
)
@click.option(
    "--check-context",
    type=click.IntRange(min=256),
    default=8192,
    show_default=True,
    help="Longest context to run.",
)
@click.option(
    "--text", type=click.Path(), help="Text for --check; default: the packaged one, repeated."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads of --check; default: all cores."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file, memory, dense, check, check_context, text, threads, as_json, **options):
    """Tell the largest context of the GGUF FILE that fits into memory: dense against MoD."""
    import json

    from mod_export.benchmark import memory as m
    from mod_export.common.system import usable_cpus
    from mod_export.data.text import default_texts, read_texts

    size = m.parse_size(memory)
    words = read_texts([text]) if text else "\n\n".join(default_texts())
    plan = m.fit(
        file,
        size,
        m.MemoryOptions(threads=threads or usable_cpus(), **options),
        dense,
    )
    if not as_json:
        click.echo(m.report(plan))
    rows = m.check(plan, words, check_context) if check else None
    if as_json:
        click.echo(json.dumps(m.to_json(plan, rows), indent=1))
    elif rows:
        click.echo("\n" + m.check_report(rows))
    return 0 if all(row["ok"] for row in rows or []) else 1
