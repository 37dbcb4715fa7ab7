"""The command `mod-export trace`."""

import click

from mod_export.cli.options import (
    cache_type_options,
    ctx_option,
    force_option,
    mod_option,
    output_option,
    prompt_options,
    read_prompt,
    threads_option,
    threshold_shift_option,
)
from mod_export.cli.values import model_argument


@click.command()
@model_argument()
@prompt_options
@click.option(
    "--chat",
    is_flag=True,
    help="Put the text as a user's question, through the model's chat template.",
)
@output_option("FILE", "Picture to write: .png, .pdf or .svg.")
@click.option(
    "-n",
    "--generate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of tokens to generate after the text, which are drawn too.",
)
@mod_option()
@ctx_option
@cache_type_options()
@threads_option
@threshold_shift_option
@force_option
def command(
    file,
    prompt,
    chat,
    prompt_file,
    output,
    generate,
    mod,
    ctx,
    types,
    threads,
    threshold_shift,
    force,
):
    """Draw which tokens run which units.

    FILE is a MoD GGUF file. The picture has a column for each token and a row for each unit.
    """
    from mod_export.common import extras
    from mod_export.errors import UserError

    extras.require("matplotlib")

    text = read_prompt(prompt, prompt_file)
    if text is None:
        raise UserError("the prompt is missing", "give either --prompt or --prompt-file")

    from mod_export import trace
    from mod_export.runtime.llama import MoDLlama

    trace.check_output(output, force)
    options = types.options() if types else {}
    options |= {"mod": mod, "threads": threads, "threshold_shift": threshold_shift}
    llm = MoDLlama(file, n_ctx=ctx, **options)
    decisions = trace.read_decisions(llm, text, generate, chat)
    trace.draw(decisions, output, force)
    click.echo(
        f"{output}: {len(decisions.texts)} tokens, {len(decisions.units)} units, "
        f"activation {decisions.active.mean():.3f}"
    )
