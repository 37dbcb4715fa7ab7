"""`mod-export generate-data`: options for generate_data.py."""

import click

from mod_export.cli.model import gpu_layers_option
from mod_export.cli.numbers import Finite


@click.command("generate-data")
@click.argument("file", type=click.Path(), metavar="MODEL")
@click.option("-o", "--out", required=True, type=click.Path(), help="Output, .jsonl or .jsonl.gz.")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(),
    metavar="PATH",
    help="Conversations (JSONL), whose first question is answered, and texts, whose documents' beginnings "
    "are continued; files or directories, may be repeated. Without: the model makes all up.",
)
@click.option(
    "--count", type=click.IntRange(min=1), help="Texts to write.  [default: one for each prompt]"
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Longest answer, continuation or made-up question.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How much of a document is its beginning.",
)
@click.option(
    "--ctx",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens of a prompt and what follows; longer prompts are left out.",
)
@click.option(
    "--temperature",
    type=Finite(min=0),
    default=0.8,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option(
    "--top-p", type=Finite(min=0, max=1), default=0.95, show_default=True, help="Nucleus sampling."
)
@click.option(
    "--min-p",
    type=Finite(min=0, max=1),
    default=0.0,
    show_default=True,
    help="Leave out tokens less likely than this share of the likeliest.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sampling."
)
@click.option(
    "--parallel",
    type=click.IntRange(min=1, max=256),
    default=8,
    show_default=True,
    help="Texts written at a time.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@gpu_layers_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
def command(file, out, prompts, force, temperature, top_p, min_p, seed, **options):
    """Let the original MODEL (GGUF) write training text for its MoD conversion; a MoD file runs
    with all units active.

    A stopped run leaves OUT.partial; the same command goes on from there.
    """
    from mod_export import generate_data
    from mod_export.runtime.sampling import Sampling

    options = generate_data.GenerationOptions(
        **options, sampling=Sampling(temperature, top_p, min_p=min_p, seed=seed)
    )
    llm = generate_data.open_model(file, options)
    generate_data.generate(llm, out, options, prompts, force)
