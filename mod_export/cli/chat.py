"""`mod-export chat`."""

import sys

import click

from mod_export.cli.model import model_options, open_model
from mod_export.cli.numbers import Finite


@click.command()
@click.argument("file", type=click.Path())
@click.option("--prompt", help="Answer this once and leave; `-` reads it from stdin.")
@click.option("--system", default="", help="System prompt.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Longest answer.",
)
@click.option(
    "--temp",
    type=Finite(min=0),
    default=0.2,
    show_default=True,
    help="Temperature; 0: always the likeliest token.",
)
@click.option(
    "--top-p", type=Finite(min=0, max=1), default=0.9, show_default=True, help="Nucleus sampling."
)
@click.option(
    "--repeat-penalty",
    type=Finite(min=0, min_open=True),
    default=1.1,
    show_default=True,
    help="Penalty of tokens that occurred among the last 64; 1: none.",
)
@click.option(
    "--seed", type=click.IntRange(min=1), default=1, show_default=True, help="Seed of the sampling."
)
@model_options
def command(file, prompt, ctx, threads, gpu_layers, threshold_shift, system, **sampling):
    """Talk to the model in the GGUF FILE; /help lists the commands.

    With --prompt the answer goes to stdout and nothing else. Piped input is one prompt too, unless
    one of its lines is a command such as /stats: then it is a conversation, one turn a line.
    """

    from mod_export.serving import chat as c

    llm = open_model(file, ctx, threads, gpu_layers, threshold_shift)
    talk = c.Chat(llm, system, c.Sampling(**sampling), say=lambda line: click.echo(line, err=True))
    if prompt is None and sys.stdin.isatty():
        click.echo(c.welcome(llm), err=True)
        return c.repl(talk)
    text = prompt if prompt not in (None, "-") else _stdin()
    if prompt is None and c.is_script(text):
        return 0 if c.run_lines(talk, text.splitlines()) else 2
    return 0 if c.answer_once(talk, text.strip()) else 130


def _stdin() -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace")
