"""The command `mod-export fit`."""

import click

from mod_export.cli.options import (
    cache_type_options,
    dense_option,
    json_flag,
    mod_option,
    text_option,
    threads_option,
)
from mod_export.cli.values import Finite, model_argument


@click.command()
@model_argument()
@click.option(
    "--memory",
    required=True,
    help="Memory that a run may take: 8G, 512M or a number of bytes; 1G is 1024M.",
)
@mod_option()
@dense_option("Dense GGUF to compare with.", show_default="FILE with all units active")
@cache_type_options()
@click.option("--kv-type", hidden=True, help="Type of both; the former spelling.")
@click.option(
    "-ub",
    "--ubatch",
    type=click.IntRange(1, 4096),
    default=512,
    show_default=True,
    help="Number of tokens in a graph.",
)
@click.option(
    "--margin",
    type=Finite(min=-1),
    default=0.1,
    show_default=True,
    help="Activation above that on the calibration text, as a share of it.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Run the models and compare; the exit code is 1 where one takes too much memory.",
)
@click.option(
    "--check-context",
    type=click.IntRange(min=256),
    default=8192,
    show_default=True,
    help="Longest context of --check in tokens.",
)
@text_option("Text for --check.", "the packaged text, repeated")
@threads_option
@json_flag
def command(
    file,
    memory,
    mod,
    dense,
    check,
    check_context,
    text,
    types,
    kv_type,
    threads,
    as_json,
    **options,
):
    """Tell the largest context that fits into memory.

    FILE is a MoD GGUF file, which is compared with the dense model.
    """
    from mod_export.benchmark import memory as m
    from mod_export.common.system import usable_cpus
    from mod_export.common.text import json_text
    from mod_export.data.text import default_texts, read_texts

    size = m.parse_size(memory)
    if types or kv_type:
        options["kv_type"] = str(types or kv_type)
    words = read_texts([text]) if text else "\n\n".join(default_texts())
    plan = m.fit(
        file,
        size,
        m.MemoryOptions(threads=threads or usable_cpus(), **options),
        dense,
        mod,
    )
    if not as_json:
        click.echo(m.report(plan))
    rows = m.check(plan, words, check_context) if check else None
    if as_json:
        click.echo(json_text(m.to_json(plan, rows), 1))
    elif rows:
        click.echo("\n" + m.check_report(rows))
    return 0 if all(row["ok"] for row in rows or []) else 1
