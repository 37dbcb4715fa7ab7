"""`mod-export`: a group of commands, each in a module of its own.

A command module defines `command`, which parses options and calls a plain function. At its top it
imports only what is light: the help of the group imports all of them. The first line of the
docstring of a command is its line in that help. Errors of the user come as one line on stderr and
exit code 2; Ctrl-C is 130; MOD_EXPORT_DEBUG=1 shows tracebacks.
"""

import contextlib
import errno
import importlib
import os
import re
import signal
import sys

import click

from mod_export import __version__
from mod_export.cli.output import hide_messages, show_messages
from mod_export.cli.values import as_utf8
from mod_export.common import extras
from mod_export.common.system import bound_spinning, use_large_pages
from mod_export.errors import UserError
from mod_export.formats.hub import by_name

# The help has this order. `generate-data` is in mod_export/cli/generate_data.py, and so on.
COMMANDS = (
    "build",
    "tools",
    "convert",
    "train",
    "export",
    "inspect",
    "fit",
    "verify",
    "chat",
    "serve",
    "trace",
    "bench",
    "eval",
    "lm-eval",
    "generate-data",
    "synth",
)

# These compute with torch.
TORCH_COMMANDS = {"convert", "train", "verify", "eval", "lm-eval"}

OS_CURES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "check the permissions",
}
# torch's words, on a GPU and on a CPU
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called, and for the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command, or None where no command has the name."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"mod_export.cli.{name.replace('-', '_')}")
        return as_utf8(module.command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names of the commands with the first line of their docstrings."""
        lines = [(name, self.get_command(ctx, name).help.splitlines()[0]) for name in COMMANDS]
        with formatter.section("Commands"):
            formatter.write_dl(lines)


def show_version(ctx: click.Context, _param, wanted: bool) -> None:
    """Print the versions of the package and of llama.cpp, and what is installed."""
    if not wanted or ctx.resilient_parsing:
        return
    from mod_export.llamacpp import build, source

    click.echo(f"mod-export {__version__}")
    try:
        pin = source.read_pin()
        click.echo(f"llama.cpp {pin.commit[:9]} of llama-cpp-python {pin.version}")
    except UserError as exc:
        click.echo(f"llama.cpp: {exc}")
    installed = build.installed_build()
    click.echo(
        f"patched library: installed, {installed}"
        if installed
        else "patched library: not installed; run `mod-export build`"
    )
    ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the versions of mod-export and llama.cpp, and whether the patched library is "
    "installed.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Convert models to Mixture-of-Depths, export them to GGUF, run them on a patched llama.cpp.

    Where a command reads a model, its name on the Hugging Face hub may stand for the file or
    directory: Qwen/Qwen3-0.6B, or org/name-GGUF:Q4_K_M for a GGUF file.
    """
    show_messages()
    ctx.call_on_close(hide_messages)
    if ctx.invoked_subcommand in TORCH_COMMANDS:
        bound_spinning()
        use_large_pages()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; always ends with SystemExit."""
    open_streams()
    # a terminated command removes its temporary files, as an interrupted one does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(_run(args))


def open_streams() -> None:
    """Give the process the streams that it was started without, and let stdout take any text.

    The next file that is opened would be stdout where that is closed, and get what is printed.
    What a terminal's encoding does not have is printed as Python escapes it, such as \\xe9.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's stream
            stream.reconfigure(errors="backslashreplace")


def _run(args: list[str] | None) -> int:
    try:
        return cli.main(args, prog_name="mod-export", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _fail("interrupted", 130)
    except click.ClickException as exc:
        ctx = getattr(exc, "ctx", None)
        return _fail(exc.format_message(), cure=f"see '{ctx.command_path} --help'" if ctx else "")
    except UserError as exc:
        return _fail(str(exc))
    except ModuleNotFoundError as exc:
        name = exc.name or "that was asked for"
        return _fail(f"the Python module {name} is missing", cure=extras.cure(name))
    except (MemoryError, RuntimeError) as exc:
        if not isinstance(exc, MemoryError) and not OUT_OF_MEMORY.search(str(exc)):
            raise
        return _fail(
            "out of memory",
            cure="use less at a time: a smaller --length or --ctx (train: --batch, --recompute)",
        )
    except UnicodeEncodeError as exc:
        where = ascii(exc.object[max(0, exc.start - 40) : exc.end + 20])
        return _fail(f"bytes that are no UTF-8 in {where}", cure="rename the file or directory")
    except OSError as exc:
        where = f": {exc.filename}" if exc.filename else ""
        return _fail(f"{exc.strerror or exc}{where}", cure=OS_CURES.get(exc.errno, ""))


def _fail(message: str, code: int = 2, cure: str = "") -> int:
    if os.environ.get("MOD_EXPORT_DEBUG") and sys.exc_info()[0]:
        import traceback

        traceback.print_exc()
    text = " ".join(by_name(message).split()).rstrip(".")
    click.echo(f"error: {text}{'; ' + cure if cure else ''}", err=True)
    return code
