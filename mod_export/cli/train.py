"""`mod-export train`: options for train.py."""

import click

from mod_export.cli.numbers import Finite
from mod_export.cli.output import show_messages
from mod_export.cli.shares import shares
from mod_export.training.config import DTYPES, METHODS, PARAMETERS, TrainConfig

SHARE = Finite(0, 1)
POSITIVE = Finite(0, min_open=True)
WEIGHT = Finite(0)
COUNT = click.IntRange(1)
D = TrainConfig(())


@click.command("train")
@click.argument("directory", type=click.Path(), metavar="DIR")
@click.option(
    "--output", "-o", required=True, type=click.Path(), metavar="OUT", help="Directory to write."
)
@click.option(
    "--data",
    "-d",
    multiple=True,
    required=True,
    type=click.Path(),
    metavar="PATH",
    help="Text, .gz, JSONL of messages or text, or a directory of these; may be repeated.",
)
@click.option(
    "--target-activation",
    "target",
    default="0.5",
    show_default=True,
    callback=shares,
    metavar="SHARE",
    help="Share of (token, unit) pairs that are to run; of each kind: kv=0.5,attn=0.8.",
)
@click.option(
    "--train",
    "parameters",
    type=click.Choice(PARAMETERS),
    default=D.parameters,
    show_default=True,
    help="What is trained: routers only, LoRA too, or all weights but the embeddings.",
)
@click.option(
    "--tokens", type=COUNT, default=D.tokens, show_default=True, help="Tokens of the whole run."
)
@click.option(
    "--length",
    type=click.IntRange(16),
    default=D.length,
    show_default=True,
    help="Tokens of a sequence.",
)
@click.option(
    "--batch",
    type=COUNT,
    default=D.batch,
    show_default=True,
    help="Sequences of a forward, per device.",
)
@click.option(
    "--accumulate", type=COUNT, default=D.accumulate, show_default=True, help="Forwards of a step."
)
@click.option(
    "--limit", type=COUNT, help="Read at most this many tokens, of all files in proportion."
)
@click.option(
    "--loss-on",
    type=click.Choice(["all", "answers"]),
    default=D.loss_on,
    show_default=True,
    help="Tokens that count: all, or only the assistant's answers in conversations.",
)
@click.option(
    "--recall",
    type=SHARE,
    default=D.recall,
    show_default=True,
    help="Share of sequences that are a conversation about their text, which asks for passages of it.",
)
@click.option(
    "--teacher",
    default="",
    metavar="MODEL",
    help="Model to distil from. [default: DIR with all units active]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default=D.method,
    show_default=True,
    help="How units are chosen: by threshold, or as baselines by top-k of each sequence (which cannot be "
    "exported) or the same ones for all tokens.",
)
@click.option(
    "--per-layer",
    is_flag=True,
    help="Each unit meets the target, instead of all of a kind together.",
)
@click.option(
    "--start-activation",
    "start",
    type=SHARE,
    metavar="SHARE",
    help="At the first step. [default: the target for kv, 0.95 with other kinds]",
)
@click.option(
    "--anneal",
    type=SHARE,
    default=D.anneal,
    show_default=True,
    help="Share of the steps from start to target activation.",
)
@click.option(
    "--load-weight",
    "load",
    type=WEIGHT,
    help="A fixed price of activation, in nats. [default: measured]",
)
@click.option(
    "--steady",
    type=WEIGHT,
    default=D.steady,
    show_default=True,
    help="How much routers are kept from following the kind of text and its length.",
)
@click.option(
    "--kl-weight",
    type=WEIGHT,
    default=D.kl_weight,
    show_default=True,
    help="Of KL to the teacher's logits.",
)
@click.option(
    "--hidden-weight",
    type=WEIGHT,
    default=D.hidden_weight,
    show_default=True,
    help="Of the distance to the teacher's hidden states.",
)
@click.option(
    "--lm-weight",
    type=WEIGHT,
    default=D.lm_weight,
    show_default=True,
    help="Of the language-model loss.",
)
@click.option(
    "--temperature",
    type=POSITIVE,
    default=D.temperature,
    show_default=True,
    help="Of the relaxed decisions about keys.",
)
@click.option(
    "--router-lr",
    type=POSITIVE,
    default=D.router_lr,
    show_default=True,
    help="Learning rate of routers.",
)
@click.option(
    "--lora-lr",
    type=POSITIVE,
    help="Learning rate of LoRA. [default: 0.001 at a width of 576, falls with its root]",
)
@click.option(
    "--full-lr", type=POSITIVE, help="Learning rate of all weights. [default: a tenth of LoRA's]"
)
@click.option(
    "--warmup",
    type=SHARE,
    default=D.warmup,
    show_default=True,
    help="Share of the steps; then cosine decay.",
)
@click.option(
    "--clip", type=POSITIVE, default=D.clip, show_default=True, help="Largest norm of the gradient."
)
@click.option(
    "--lora-rank", type=COUNT, default=D.lora_rank, show_default=True, help="Rank of LoRA."
)
@click.option(
    "--lora-alpha",
    type=POSITIVE,
    default=D.lora_alpha,
    show_default=True,
    help="LoRA counts alpha / rank times.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "no", "bf16", "fp16"]),
    default=D.precision,
    show_default=True,
    help="Autocast; auto: bf16 on GPUs that have it, else no; fp16 is for GPUs.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=D.dtype,
    show_default=True,
    help="Of the weights that are not trained: bfloat16 takes half the memory.",
)
@click.option(
    "--recompute", is_flag=True, help="Compute layers again in the backward pass: less memory."
)
@click.option(
    "--held-out",
    type=COUNT,
    default=D.held_out,
    show_default=True,
    help="Sequences to evaluate on.",
)
@click.option(
    "--eval-every",
    type=COUNT,
    default=D.eval_every,
    show_default=True,
    help="Steps between evaluations on held-out text.",
)
@click.option(
    "--save-every",
    type=COUNT,
    default=D.save_every,
    show_default=True,
    help="Steps between checkpoints.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=D.seed,
    show_default=True,
    help="Of the order of the data and of noise.",
)
@click.option(
    "--save",
    "save_as",
    type=click.Choice(["merged", "adapter"]),
    default="merged",
    show_default=True,
    help="A whole MoD directory, or routers and LoRA only.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in OUT.run.")
@click.option(
    "--force", is_flag=True, help="Replace an existing output, and the checkpoint of another run."
)
def command(directory, output, data, save_as, resume, force, **options):
    """Train the routers of the MoD model in DIR (and its weights), so that it keeps the quality of
    the original.

    DIR comes from `mod-export convert`. The original model teaches: nothing but text is needed.
    OUT.run holds the
    checkpoint, metrics.jsonl and plots. On several GPUs: `accelerate launch -m mod_export train
    ...`.
    """
    from mod_export.training.run import train

    show_messages(clock=True)
    train(directory, output, TrainConfig(data=data, **options), save_as, resume, force)
