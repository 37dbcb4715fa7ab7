"""The command `mod-export chat`."""

import sys

import click

from mod_export.cli.options import (
    Finite,
    RenamedOption,
    model_options,
    open_model,
    temperature_option,
    top_p_option,
)
from mod_export.common.text import decode_text


@click.command()
@click.argument("file", type=click.Path())
@click.option("--prompt", help="Answer this prompt and leave; `-` reads the prompt from stdin.")
@click.option("--system", default="", help="System prompt of the conversation.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Length of the longest answer in tokens.",
)
@temperature_option(0.2, cls=RenamedOption, former="--temp")
@top_p_option(0.9)
@click.option(
    "--repeat-penalty",
    type=Finite(min=0, min_open=True),
    default=1.1,
    show_default=True,
    help="Penalty of tokens that occurred among the last 64 tokens; 1 is no penalty.",
)
@click.option(
    "--seed", type=click.IntRange(min=1), default=1, show_default=True, help="Seed of the sampling."
)
@model_options
def command(
    file, prompt, ctx, threads, gpu_layers, threshold_shift, system, max_tokens, **sampling
):
    """Talk to a model.

    FILE is a GGUF file. In the conversation /help lists the commands. With --prompt only the answer
    goes to stdout. Piped input is one prompt too, unless one of its lines is a command such as
    /stats: then each line is a turn of a conversation.
    """
    from dataclasses import replace

    from mod_export.serving import terminal
    from mod_export.serving.chat import CHAT_SAMPLING, Chat

    llm = open_model(file, ctx, threads, gpu_layers, threshold_shift)
    chosen = replace(CHAT_SAMPLING, **sampling)
    chat = Chat(llm, system, chosen, max_tokens, notice=lambda line: click.echo(line, err=True))
    if prompt is None and sys.stdin.isatty():
        click.echo(terminal.welcome(llm), err=True)
        return terminal.repl(chat)
    text = prompt if prompt not in (None, "-") else _stdin()
    if prompt is None and terminal.is_script(text):
        return 0 if terminal.run_lines(chat, text.splitlines()) else 2
    return 0 if terminal.answer_once(chat, text.strip()) else 130


def _stdin() -> str:
    return decode_text(sys.stdin.buffer.read())
