"""Kinds of values that options and arguments of commands take.

Example:

    @click.command()
    @model_argument()
    @click.option("--shift", type=Finite())
    def command(file, shift): ...
"""

import math
from collections.abc import Callable

import click
from click.core import ParameterSource

from mod_export.common.text import check_name, decode_argument
from mod_export.errors import UserError
from mod_export.formats import hub
from mod_export.units import parse_shares


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

    gguf: a GGUF file is wanted; None takes a file or a directory. The value is the path.
    """

    def __init__(self, gguf: bool | None = False, path_type: type | None = None):
        super().__init__(path_type=path_type)
        self.gguf = gguf

    def convert(self, value, param, ctx):
        """Return the path. Raises UserError where the hub does not give the model."""
        if not (ctx and ctx.resilient_parsing) and hub.is_name(value):
            value = str(hub.locate(value, gguf=self.gguf))
        return super().convert(value, param, ctx)


class SaveForm(click.Choice):
    """What is written: `adapter` or `full`, which `train` called `merged`."""

    def __init__(self):
        super().__init__(["adapter", "full"])

    def convert(self, value, param, ctx):
        """Return the form. Fails for anything else."""
        return super().convert("full" if value == "merged" else value, param, ctx)


class ThreadCount(click.IntRange):
    """A number of threads; -1 is llama.cpp's word for all, which are None here."""

    def __init__(self):
        super().__init__(min=-1)

    def convert(self, value, param, ctx):
        """Return the number, or None for -1. Fails for 0."""
        number = super().convert(value, param, ctx)
        if number == 0:
            self.fail("0 threads do nothing; -1 is all.", param, ctx)
        return None if number == -1 else number


class ModelArgument(click.Argument):
    """A model that -m or -hf may name too, as in llama.cpp."""

    FILE = click.Option(["-m", "--model"])
    REPOSITORY = click.Option(["-hf", "-hfr", "--hf-repo"])

    def add_to_parser(self, parser, ctx):
        """Add the options, which the help does not show, and the argument itself."""
        for option in (self.FILE, self.REPOSITORY):
            parser.add_option(option, option.opts, dest=option.opts[-1], nargs=1)
        super().add_to_parser(parser, ctx)

    def consume_value(self, ctx, opts):
        """Return the model and where it comes from. Fails where it is given twice."""
        names = [option.opts[-1] for option in (self.FILE, self.REPOSITORY)]
        named = [opts[name] for name in names if name in opts]
        value, source = super().consume_value(ctx, opts)
        given = [] if self.value_is_missing(value) else [value]
        if len(named) + len(given) > 1:
            raise click.UsageError("The model is given twice.", ctx)
        if names[1] in opts and not hub.is_name(named[0]):
            raise click.UsageError(f"{named[0]!r} is no name on the Hugging Face hub.", ctx)
        return (named[0], ParameterSource.COMMANDLINE) if named else (value, source)


def model_argument(name: str = "file", gguf: bool = True, **more):
    """Return the argument of a command's model; gguf: a GGUF file is wanted."""
    return click.argument(name, cls=ModelArgument, type=ModelName(gguf=gguf), **more)


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
