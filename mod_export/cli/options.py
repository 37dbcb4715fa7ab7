"""Each option that several commands have, once.

Example:

    @click.command()
    @output_option("FILE", "GGUF file to write.")
    @threads_option
    def command(output, threads): ...
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mod_export.cli.values import Finite, ModelName, RenamedOption, ThreadCount
from mod_export.common.text import decode_text
from mod_export.config import SINK_TOKENS
from mod_export.errors import UserError
from mod_export.formats.ggml_types import KV_TYPES
from mod_export.runtime.sampling import ANY_SEED, LARGEST_SEED, RANGES, Sampling

if TYPE_CHECKING:
    from mod_export.formats.kv_types import KVTypes

SAMPLING_HELP = {
    "temperature": "Temperature of the sampling; 0 takes the likeliest token always.",
    "top_p": "Nucleus sampling: draw from the likeliest tokens that have this share together.",
    "top_k": "Draw from this many likeliest tokens; 0 is all.",
    "min_p": "Leave out tokens that are less likely than this share of the likeliest one.",
    "repeat_penalty": "Penalty of tokens that occurred among the last 64 tokens; 1 is no penalty.",
}
CACHE_TYPE_HELP = {
    "k": f"Type of K in the cache{{of}}: {', '.join(KV_TYPES)}.",
    "v": "Type of V in the cache{of}, one of these too.",
}
SHIFT_HELP = "Shift of all thresholds in logit space: above 0 fewer tokens are active."

THREADS_HELP = "Number of CPU threads; -1 is all."
threads_option = click.option(
    "-t",
    "--threads",
    type=ThreadCount(),
    metavar="INTEGER",
    show_default="all that this process may use",
    help=THREADS_HELP,
)
adaptive_threads_option = click.option(
    "-t",
    "--threads",
    type=ThreadCount(),
    metavar="INTEGER",
    show_default="all that this process may use, fewer while other processes need them",
    help=THREADS_HELP,
)
gpu_layers_option = click.option(
    "-ngl",
    "--gpu-layers",
    type=click.IntRange(min=-1),
    default=0,
    show_default=True,
    help="Number of layers of a GGUF on the GPU; -1 puts all there. This needs a CUDA build.",
)
served_layers_option = click.option(
    "-ngl",
    "--gpu-layers",
    type=click.IntRange(min=-1),
    show_default="0; with --rpc all",
    help="Number of layers on the GPU, or on the servers of --rpc; -1 puts all there. A GPU needs "
    "a CUDA build.",
)
rpc_option = click.option(
    "--rpc",
    metavar="HOST:PORT,...",
    help="Servers that hold layers and their K/V, also on other machines: ggml-rpc-server, which "
    "`mod-export build --tools` builds.",
)
ctx_option = click.option(
    "-c",
    "--ctx",
    "--ctx-size",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Context in tokens; 0 takes the context that the model was trained for.",
)
threshold_shift_option = click.option(
    "--threshold-shift",
    type=Finite(),
    default=0.0,
    show_default=True,
    metavar="FLOAT",
    help=SHIFT_HELP,
)
units_option = click.option(
    "--units",
    default="kv",
    show_default=True,
    metavar="KINDS",
    help="What a token may skip: kv (being remembered), attn, block, ffn; combined with +.",
)
base_option = click.option(
    "--base",
    metavar="MODEL",
    type=ModelName(gguf=None, path_type=Path),
    show_default="the model that the adapter names",
    help="Of an adapter: put it on this model, a directory or a GGUF file.",
)
force_option = click.option("--force", is_flag=True, help="Replace existing outputs.")
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def dense_option(text: str, gguf: bool = True, **more):
    """Return the option of the dense model to compare with."""
    more = {"metavar": "FILE" if gguf else "MODEL"} | more
    return click.option("--dense", type=ModelName(gguf=gguf), help=text, **more)


def text_option(text: str, default: str | None = "the packaged text"):
    """Return the option of the text that a command runs; default: what is taken without it."""
    more = {"show_default": default} if default else {"multiple": True}
    name = ("text",) if default else ("texts",)
    return click.option("--text", *name, type=click.Path(), metavar="FILE", help=text, **more)


def length_option(text: str = "", **more):
    """Return the option of the length of sequences; text: what else the help says."""
    more = {"type": click.IntRange(min=16), "show_default": True} | more
    return click.option("--length", help=f"Number of tokens in a sequence{text}.", **more)


def output_option(metavar: str, text: str, **more):
    """Return the option of the output, which every command needs that writes one."""
    return click.option(
        "--output", "-o", required=True, type=click.Path(), metavar=metavar, help=text, **more
    )


def layers_routed_option(**more):
    """Return the option of the layers to route."""
    return click.option(
        "--layers-routed",
        default="auto",
        show_default=True,
        metavar="LAYERS",
        help="Layers to route, counted from 0: 2-, 3-28 or 2,4,8-11; auto routes kv from layer 1 "
        "on, other kinds from layer 2 on, where a layer can have the kind.",
        **more,
    )


def sink_tokens_option(**more):
    """Return the option of the first tokens that are always active."""
    return click.option(
        "--sink-tokens",
        type=click.IntRange(min=0),
        default=SINK_TOKENS,
        show_default=True,
        help="Number of first tokens of a sequence that are always active.",
        **more,
    )


def seed_option(default: int = ANY_SEED):
    """Return the option of the seed of sampling."""
    return click.option(
        "-s",
        "--seed",
        type=click.IntRange(ANY_SEED, LARGEST_SEED),
        default=default,
        show_default=True,
        help="Seed of the sampling; -1 is another one each time.",
    )


def sampling_options(command):
    """Add the options of sampling, less the seed. A command gets None for one that is not given."""
    for name, text in reversed(SAMPLING_HELP.items()):
        least, most = RANGES[name]
        more = {"cls": RenamedOption, "former": "--temp"} if name == "temperature" else {}
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=click.IntRange(least, most) if name == "top_k" else Finite(least, most),
            show_default=f"what the file recommends, else {getattr(Sampling(), name)}",
            help=text,
            **more,
        )(command)
    return command


def prompt_options(command):
    """Add --prompt and --prompt-file, which read_prompt reads."""
    options = (
        click.option("-p", "--prompt", help="The prompt; `-` reads it from stdin."),
        click.option("-f", "--prompt-file", type=click.Path(), help="File with the prompt."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    """Return the prompt of prompt_options, None where none is given.

    Raises UserError where it is given twice, and OSError where the file cannot be read.
    """
    if prompt is not None and prompt_file is not None:
        raise UserError("the prompt is given twice", "give either --prompt or --prompt-file")
    if prompt_file is None and prompt != "-":
        return prompt
    with click.open_file(prompt_file or "-", "rb") as file:
        return decode_text(file.read())


def cache_type_options(of: str = "", default: str = "f16"):
    """Return a decorator that adds --cache-type-k and --cache-type-v.

    The command gets them as one argument `types`, a KVTypes, or None where neither is given.
    of: whose cache it is, where that is not plain. default: what holds without the options.
    """

    def add(function):
        @functools.wraps(function)
        def with_types(*args, cache_type_k, cache_type_v, **more):
            from mod_export.formats.kv_types import KVTypes

            return function(*args, types=KVTypes.given(cache_type_k, cache_type_v), **more)

        command = with_types
        for side in "vk":
            command = click.option(
                f"-ct{side}",
                f"--cache-type-{side}",
                type=click.Choice(KV_TYPES),
                metavar="TYPE",
                show_default=default,
                help=CACHE_TYPE_HELP[side].format(of=of),
            )(command)
        return command

    return add


def mod_option(text: str = "FILE"):
    """Return the option of routers beside a model's file; text: what the help calls that file."""
    return click.option(
        "--mod",
        metavar="ROUTERS",
        envvar="LLAMA_MOD_ADAPTER",
        show_envvar=True,
        help=f"Routers to put beside {text}, which has none: a file that `export ADAPTER` writes, "
        "or an adapter.",
    )


def model_options(command):
    """Add the options that open_model takes: those of commands that hold a model open."""
    options = (
        *(mod_option(), ctx_option, cache_type_options(), adaptive_threads_option),
        *(served_layers_option, rpc_option, threshold_shift_option),
    )
    for option in reversed(options):
        command = option(command)
    return command


def open_model(
    file: str,
    ctx: int,
    threads: int | None,
    gpu_layers: int | None,
    rpc: str | None,
    threshold_shift: float,
    types: "KVTypes | None" = None,
    mod: str | None = None,
):
    """Return the MoDLlama of the options.

    Raises UserError, also for layers on a GPU that the library does not see.
    """
    from mod_export.runtime import devices
    from mod_export.runtime.llama import MoDLlama

    gpu_layers = devices.chosen_layers(gpu_layers, rpc)
    # a batch is the longest wait after Ctrl-C
    return MoDLlama(
        file,
        n_ctx=ctx,
        threads=threads,
        n_batch=256,
        n_gpu_layers=gpu_layers,
        rpc=rpc,
        threshold_shift=threshold_shift,
        mod=mod,
        **(types.options() if types else {}),
    )
