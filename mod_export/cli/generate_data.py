"""The command `mod-export generate-data`."""

import click

from mod_export.cli.options import (
    force_option,
    gpu_layers_option,
    output_option,
    sampling_options,
    seed_option,
    threads_option,
)
from mod_export.cli.values import RenamedOption, model_argument


@click.command("generate-data")
@model_argument(metavar="MODEL")
@output_option("OUT", "File to write: .jsonl or .jsonl.gz.", cls=RenamedOption, former="--out")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(),
    metavar="PATH",
    help="Files or directories of conversations (JSONL) and texts; may be repeated. The first "
    "question of a conversation is answered, the beginning of a document is continued. Without "
    "prompts the model makes up all texts.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    show_default="one for each prompt",
    help="Number of texts to write.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Length of the longest answer, continuation or made-up question in tokens.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Number of tokens of a document that are its beginning.",
)
@click.option(
    "-c",
    "--ctx",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Number of tokens of a prompt and what follows it; longer prompts are left out.",
)
@sampling_options
@seed_option(default=0)
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(min=1, max=256),
    default=8,
    show_default=True,
    help="Number of texts written at a time.",
)
@threads_option
@gpu_layers_option
@force_option
def command(file, output, prompts, force, **options):
    """Let a model write training text.

    MODEL is the GGUF file of the original, whose MoD conversion the text is for. A MoD file runs
    with all units active. A stopped run leaves OUT.partial, and the same command goes on from
    there.
    """
    from dataclasses import replace

    from mod_export import generate_data
    from mod_export.runtime.sampling import Sampling

    chosen = {name: options.pop(name) for name in generate_data.DECIDING_SAMPLING}
    options = generate_data.GenerationOptions(**options)
    llm = generate_data.open_model(file, options)
    options = replace(options, sampling=Sampling.of(llm, **chosen))
    generate_data.generate(llm, output, options, prompts, force)
