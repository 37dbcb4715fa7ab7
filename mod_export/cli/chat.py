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
def command(
    file, prompt, ctx, threads, gpu_layers, threshold_shift, system, max_tokens, temp, **sampling
):
    """Talk to the model in the GGUF FILE; /help lists the commands.

    With --prompt the answer goes to stdout and nothing else. Piped input is one prompt too, unless
    one of its lines is a command such as /stats: then it is a conversation, one turn a line.
    """
    from dataclasses import replace

    from mod_export.serving import terminal
    from mod_export.serving.chat import CHAT_SAMPLING, Chat

    llm = open_model(file, ctx, threads, gpu_layers, threshold_shift)
    chosen = replace(CHAT_SAMPLING, temperature=temp, **sampling)
    chat = Chat(llm, system, chosen, max_tokens, notice=lambda line: click.echo(line, err=True))
    if prompt is None and sys.stdin.isatty():
        click.echo(terminal.welcome(llm), err=True)
        return terminal.repl(chat)
    text = prompt if prompt not in (None, "-") else _stdin()
    if prompt is None and terminal.is_script(text):
        return 0 if terminal.run_lines(chat, text.splitlines()) else 2
    return 0 if terminal.answer_once(chat, text.strip()) else 130


def _stdin() -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace")
