"""`mod-export`: a group of commands, each in its own module, imported only when it runs.

A command module defines `command`, which parses options and calls a plain function. Errors of the
user come as one line on stderr and exit code 2; Ctrl-C is 130; MOD_EXPORT_DEBUG=1 shows tracebacks.
"""

import importlib
import os
import re
import signal
import sys

import click

from mod_export import __version__
from mod_export.cli.output import hide_messages, show_messages
from mod_export.errors import UserError

# name -> (where the command is, its line in the help): help imports none of them
COMMANDS = {
    "build": ("mod_export.cli.build:command", "Build and install the patched llama.cpp."),
    "convert": (
        "mod_export.cli.convert:command",
        "Make a Mixture-of-Depths model from an ordinary one.",
    ),
    "train": (
        "mod_export.cli.train:command",
        "Train routers and weights, distilling from the original.",
    ),
    "export": ("mod_export.cli.export:command", "Write a MoD directory as a GGUF file."),
    "inspect": (
        "mod_export.cli.inspect:command",
        "Show what a MoD GGUF routes, and the KV it needs.",
    ),
    "fit": ("mod_export.cli.fit:command", "Tell the largest context that fits into memory."),
    "verify": (
        "mod_export.cli.verify:command",
        "Compare a GGUF in the runtime with its torch model.",
    ),
    "chat": ("mod_export.cli.chat:command", "Talk to a model."),
    "serve": ("mod_export.cli.serve:command", "Serve a model over HTTP, with OpenAI's API."),
    "trace": ("mod_export.cli.trace:command", "Draw which tokens run which units."),
    "bench": (
        "mod_export.cli.bench:command",
        "Measure speed and KV memory against the dense model.",
    ),
    "eval": (
        "mod_export.cli.eval:command",
        "Measure quality against the dense model: KL, tasks, passkeys.",
    ),
    "generate-data": ("mod_export.cli.generate_data:command", "Let a model write training text."),
    "synth": (
        "mod_export.cli.synth:command",
        "Write a MoD GGUF of any shape with random weights, to measure speed.",
    ),
}

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory"
)  # torch's words, GPU and CPU


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mod-export")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Mixture-of-Depths for existing models: convert, export to GGUF, run on a patched llama.cpp."""
    show_messages()
    ctx.call_on_close(hide_messages)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; always ends with SystemExit."""
    # a terminated command removes its temporary files, as an interrupted one does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(_run(args))


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
        return _fail(
            f"the Python module {exc.name} is missing",
            cure="install mod-export with its dependencies",
        )
    except (MemoryError, RuntimeError) as exc:
        if not isinstance(exc, MemoryError) and not OUT_OF_MEMORY.search(str(exc)):
            raise
        return _fail(
            "out of memory",
            cure="use shorter sequences or fewer at a time (train: --batch, --recompute)",
        )
    except OSError as exc:
        return _fail(f"{exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}")


def _fail(message: str, code: int = 2, cure: str = "") -> int:
    if os.environ.get("MOD_EXPORT_DEBUG") and sys.exc_info()[0]:
        import traceback

        traceback.print_exc()
    text = " ".join(message.split()).rstrip(".")
    click.echo(f"error: {text}{'; ' + cure if cure else ''}", err=True)
    return code
