"""The command `mod-export chat`."""

import sys

import click

from mod_export.cli.options import (
    model_options,
    open_model,
    prompt_options,
    read_prompt,
    sampling_options,
    seed_option,
)
from mod_export.cli.values import model_argument
from mod_export.common.text import decode_text


@click.command()
@model_argument()
@prompt_options
@click.option(
    "-sys", "--system", "--system-prompt", default="", help="System prompt of the conversation."
)
@click.option(
    "-n",
    "--max-tokens",
    "--predict",
    type=click.IntRange(min=-1),
    default=-1,
    show_default=True,
    help="Length of the longest answer in tokens; -1 is until it ends or the context is full.",
)
@click.option(
    "--raw",
    is_flag=True,
    help="Continue the text as it is, without a chat template, for models not tuned for chat.",
)
@sampling_options
@seed_option()
@model_options
def command(
    file,
    prompt,
    prompt_file,
    ctx,
    types,
    threads,
    gpu_layers,
    rpc,
    threshold_shift,
    mod,
    system,
    max_tokens,
    raw,
    **sampling,
):
    """Talk to a model.

    FILE is a GGUF file, or the name of one on the Hugging Face hub, such as org/name-GGUF:Q4_K_M.
    In the conversation /help lists the commands. With a prompt only the answer goes to stdout.
    Piped input is one prompt too, unless one of its lines is a command such as /stats: then each
    line is a turn of a conversation.
    """
    from mod_export.runtime.sampling import Sampling
    from mod_export.serving import terminal
    from mod_export.serving.chat import Chat

    text = read_prompt(prompt, prompt_file)
    llm = open_model(file, ctx, threads, gpu_layers, rpc, threshold_shift, types, mod)
    chosen = Sampling.of(llm, **sampling)
    chat = Chat(llm, system, chosen, max_tokens, lambda line: click.echo(line, err=True), raw=raw)
    if text is None and sys.stdin.isatty():
        click.echo(terminal.welcome(llm), err=True)
        return terminal.repl(chat)
    if text is None:
        text = decode_text(sys.stdin.buffer.read())
        if terminal.is_script(text):
            return 0 if terminal.run_lines(chat, text.splitlines()) else 2
    return 0 if terminal.answer_once(chat, text.rstrip("\n") if raw else text.strip()) else 130
