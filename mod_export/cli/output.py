"""What commands print: the messages of the package as lines, tables, JSON and plots."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from mod_export.cli.options import force_option
from mod_export.errors import UserError
from mod_export.formats.hub import by_name


class MessageHandler(logging.Handler):
    """Print each message as a line on stderr, or on stdout.

    clock: put the seconds since the command began before each line, as in `[  12 s] loading mod`.
    A message of several lines, such as a table, has no such prefix.
    """

    def __init__(self, stdout: bool = False, clock: bool = False):
        super().__init__()
        # Kept now: libraries that are too loud get another stderr for a while.
        self.stream, self.clock = sys.stdout if stdout else sys.stderr, clock
        self.start = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of a record."""
        line = by_name(self.format(record))
        if self.clock and "\n" not in line:
            line = f"[{time.monotonic() - self.start:4.0f} s] {line}"
        # Nobody may read the stream any more, or it is closed.
        with contextlib.suppress(OSError, ValueError), _beside_bars():
            click.echo(line, file=self.stream)


def _beside_bars() -> contextlib.AbstractContextManager:
    """Wipe bars of progress from the terminal meanwhile, so that a line stands alone."""
    if "tqdm" not in sys.modules:
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm.external_write_mode(file=sys.stderr)


def run_script(main: Callable[[], object]) -> None:
    """Do what a script does, and end with the exit codes of the commands.

    A UserError is one line on stderr and code 2; Ctrl-C is code 130.
    """
    try:
        main()
    except UserError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def show_messages(stdout: bool = False, clock: bool = False) -> None:
    """Print the package's messages from now on, in this form only. See MessageHandler."""
    hide_messages()
    package = logging.getLogger("mod_export")
    package.addHandler(MessageHandler(stdout, clock))
    package.setLevel(logging.INFO)


def hide_messages() -> None:
    """Print no messages any more."""
    package = logging.getLogger("mod_export")
    for handler in list(package.handlers):
        if isinstance(handler, MessageHandler):
            package.removeHandler(handler)
    package.setLevel(logging.NOTSET)


def result_options(plots: str):
    """Return a decorator that adds --plots, --json, --markdown and --force.

    plots: the help text of --plots.
    """
    options = (
        click.option("--plots", type=click.Path(), metavar="DIR", help=plots),
        click.option(
            "--json",
            "json_file",
            type=click.Path(),
            metavar="FILE",
            help="Write all figures to this JSON file; `-` is stdout.",
        ),
        click.option("--markdown", is_flag=True, help="Print the tables as Markdown."),
        force_option,
    )

    def add(command):
        for option in reversed(options):
            command = option(command)
        return command

    return add


def write_result(measure: Callable[[], dict], json_file: str | None, force: bool) -> dict:
    """Measure, and write the result as JSON to a file, to stdout for `-`, or nowhere for None.

    Raises UserError before anything is measured where the file cannot be written.
    """
    from mod_export.common.files import atomic_file
    from mod_export.common.text import result_as_json

    if json_file in (None, "-"):
        result = measure()
        if json_file:
            click.echo(result_as_json(result))
        return result
    with atomic_file(json_file, force) as tmp:
        result = measure()
        tmp.write_text(result_as_json(result) + "\n")
    return result


def name_plots(paths: Iterable[Path]) -> None:
    """Print the paths of plots that were drawn."""
    for path in paths:
        click.echo(f"drew {path}", err=True)
