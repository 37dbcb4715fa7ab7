"""What the command line prints besides results: the messages of the package, as lines."""

import contextlib
import logging
import time

import click


class MessageHandler(logging.Handler):
    """Print each message as a line on stderr, or on stdout.

    clock: put the seconds since the command began before each line, as in `[  12 s] loading mod`.
    A message of several lines, such as a table, has no such prefix.
    """

    def __init__(self, stdout: bool = False, clock: bool = False):
        super().__init__()
        self.stdout, self.clock = stdout, clock
        self.start = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self.clock and "\n" not in line:
            line = f"[{time.monotonic() - self.start:4.0f} s] {line}"
        with contextlib.suppress(OSError):  # nobody reads the stream any more
            click.echo(line, err=not self.stdout)


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
