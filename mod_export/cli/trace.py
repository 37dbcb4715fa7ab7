"""`mod-export trace`."""

import click


@click.command()
@click.argument("file", type=click.Path())
@click.option("--prompt", help="The text.")
@click.option("--prompt-file", type=click.Path(), help="A file with the text; `-` reads stdin.")
@click.option(
    "-o", "--output", required=True, type=click.Path(), help="The picture: .png, .pdf or .svg."
)
@click.option(
    "--generate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens to generate after the text and to draw too.",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Context in tokens; 0: what the model was trained for.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option(
    "--threshold-shift",
    type=float,
    default=0.0,
    show_default=True,
    help="Shift of all thresholds in logit space: above 0 fewer tokens are active.",
)
@click.option("--force", is_flag=True, help="Replace an existing picture.")
def command(file, prompt, prompt_file, output, generate, ctx, threads, threshold_shift, force):
    """Draw which tokens run which units of the GGUF FILE."""
    from mod_export.errors import UserError

    if (prompt is None) == (prompt_file is None):
        raise UserError(
            "the text is missing or given twice", "give either --prompt or --prompt-file"
        )
    if prompt is None:
        with click.open_file(prompt_file, "rb") as f:
            prompt = f.read().decode("utf-8", "replace")

    from mod_export import trace
    from mod_export.runtime.llama import MoDLlama

    trace.check_output(output, force)
    llm = MoDLlama(file, n_ctx=ctx, threads=threads, threshold_shift=threshold_shift)
    decisions = trace.read_decisions(llm, prompt, generate)
    trace.draw(decisions, output, force)
    click.echo(
        f"{output}: {len(decisions.texts)} tokens, {len(decisions.units)} units, "
        f"activation {decisions.active.mean():.3f}"
    )
