"""What the options of several commands share: kinds of values, and each common option once.

Example:

    @click.command()
    @output_option("FILE", "GGUF file to write.")
    @threads_option
    def command(output, threads): ...
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mod_export.common.text import check_name, decode_argument, decode_text
from mod_export.config import SINK_TOKENS
from mod_export.errors import UserError
from mod_export.formats import hub
from mod_export.formats.ggml_types import KV_TYPES
from mod_export.runtime.sampling import ANY_SEED, LARGEST_SEED, RANGES, Sampling
from mod_export.units import parse_shares

if TYPE_CHECKING:
    from mod_export.formats.kv_types import KVTypes


class Finite(click.FloatRange):
    """A number in a range; click's own type lets NaN and infinity pass."""

    def convert(self, value, param, ctx):
        """Return the number. Fails with a usage error for anything else."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        # A range that has no limits needs no description.
        return "" if self.min is self.max is None else super()._describe_range()


class Text(click.types.StringParamType):
    """Text whose bytes may be no UTF-8: it is read as stdin is."""

    def convert(self, value, param, ctx):
        """Return the text."""
        return decode_argument(super().convert(value, param, ctx))


class FileName(click.Path):
    """The name of a file or directory, in UTF-8."""

    def convert(self, value, param, ctx):
        """Return the name. Raises UserError for a name that is no UTF-8."""
        check_name(value)
        return super().convert(value, param, ctx)


class ModelName(FileName):
    """A file or directory, or the name of a model on the Hugging Face hub, which is fetched.

    gguf: a GGUF file is wanted. The value is the path.
    """

    def __init__(self, gguf: bool = False, path_type: type | None = None):
        super().__init__(path_type=path_type)
        self.gguf = gguf

    def convert(self, value, param, ctx):
        """Return the path. Raises UserError where the hub does not give the model."""
        if not (ctx and ctx.resilient_parsing) and hub.is_name(value):
            value = str(hub.locate(value, gguf=self.gguf))
        return super().convert(value, param, ctx)


def as_utf8(command: click.Command) -> click.Command:
    """Let all texts and file names of a command be Text and FileName, and return the command."""
    for parameter in command.params:
        if type(parameter.type) is click.Path:
            parameter.type = FileName(path_type=parameter.type.type)
        elif parameter.type is click.STRING:
            parameter.type = Text()
    return command


class RenamedOption(click.Option):
    """An option that is accepted under its former spelling too, which the help does not show."""

    def __init__(self, *args, former: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.former = former

    def add_to_parser(self, parser, ctx):
        """Add both spellings."""
        super().add_to_parser(parser, ctx)
        parser.add_option(self, [self.former], dest=self.name, nargs=self.nargs)


def shares(_ctx, _param, value: str) -> float | dict[str, float]:
    """Read `0.5` or `kv=0.5,attn=0.8`. Raises BadParameter for anything else."""
    try:
        found = parse_shares(value)
    except UserError as exc:
        raise click.BadParameter(str(exc)) from None
    numbers = found.values() if isinstance(found, dict) else [found]
    if not all(map(math.isfinite, numbers)):
        raise click.BadParameter(f"{value!r} has a number that is not finite")
    return found


def comma_list(
    kind: Callable, low: float | None = None, high: float | None = None, example: str = ""
) -> Callable:
    """Return a callback that reads values with commas between them, each once.

    kind: makes a value of its text. low, high: limits of numbers. NaN and infinity are refused.
    """

    def read(_ctx, _param, value: str | None):
        if value is None:
            return None
        try:
            values = tuple(kind(part.strip()) for part in value.split(","))
        except ValueError:
            values = ()
        if not values or not all(_allowed(item, low, high) for item in values):
            raise click.BadParameter(f"{value!r} is no list{_limits(low, high)}, such as {example}")
        return tuple(dict.fromkeys(values))

    return read


def _allowed(value, low: float | None, high: float | None) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def _limits(low: float | None, high: float | None) -> str:
    if low is None:
        return ""
    return f" of numbers from {low} " + ("up" if high is None else f"to {high}")


def on_or_off(text: str) -> bool:
    """Read `on` or `off`. Raises ValueError for anything else."""
    if text not in ("on", "off"):
        raise ValueError(text)
    return text == "on"


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

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="all that this process may use",
    help="Number of CPU threads.",
)
adaptive_threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    show_default="all that this process may use, fewer while other processes need them",
    help="Number of CPU threads.",
)
gpu_layers_option = click.option(
    "--gpu-layers",
    type=click.IntRange(min=-1),
    default=0,
    show_default=True,
    help="Number of layers of a GGUF on the GPU; -1 puts all there. This needs a CUDA build.",
)
ctx_option = click.option(
    "--ctx",
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
force_option = click.option("--force", is_flag=True, help="Replace existing outputs.")
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


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
        click.option("--prompt", help="The prompt; `-` reads it from stdin."),
        click.option("--prompt-file", type=click.Path(), help="File with the prompt."),
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


def model_options(command):
    """Add the options that open_model takes: those of commands that hold a model open."""
    options = (
        *(ctx_option, cache_type_options(), adaptive_threads_option, gpu_layers_option),
        threshold_shift_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def open_model(
    file: str,
    ctx: int,
    threads: int | None,
    gpu_layers: int,
    threshold_shift: float,
    types: "KVTypes | None" = None,
):
    """Return the MoDLlama of the options.

    Raises UserError, also for layers on a GPU that the library does not see.
    """
    from mod_export.runtime import devices
    from mod_export.runtime.llama import MoDLlama

    devices.check(gpu_layers)
    # a batch is the longest wait after Ctrl-C
    return MoDLlama(
        file,
        n_ctx=ctx,
        threads=threads,
        n_batch=256,
        n_gpu_layers=gpu_layers,
        threshold_shift=threshold_shift,
        **(types.options() if types else {}),
    )
