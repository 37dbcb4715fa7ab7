"""A Python process at the other end of a terminal (pty), as a person uses it.

with terminal("-m", "mod_export", "chat", model) as t:
    t.expect("> ")
    t.send("Hello\n")
"""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from contextlib import contextmanager, suppress

from tests.support.command_line import ROOT

WAIT_SECONDS = 120  # for what a machine, however busy, will show


class Terminal:
    """The other end of a pty."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, *map(str, arguments)]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.update({"TERM": "xterm", "PYTHONPATH": str(ROOT)} | environment)
            os.execv(sys.executable, command)
        self.text, self.environment = "", environment
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def expect(self, pattern: str, timeout: float = WAIT_SECONDS) -> str:
        """Read until the pattern comes; return what was read, and forget it."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            self._read(0.2)
        read, self.text = self.text[: match.end()], self.text[match.end() :]
        return read

    def _read(self, timeout: float) -> None:
        if select.select([self.fd], [], [], timeout)[0]:
            self.text += self._utf8.decode(os.read(self.fd, 4096))

    def send(self, text: str) -> None:
        self.send_bytes(text.encode())

    def send_bytes(self, data: bytes) -> None:
        while data:  # A terminal takes some thousand bytes at a time.
            data = data[os.write(self.fd, data[:1024]) :]
            self._read(0.01)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press_until(self, key: str, pattern: str) -> None:
        """Press a key until the pattern comes, as a person would.

        A Ctrl-C between the prompt's last character and Python's wait for a line is heard at the
        next key only: a gap of microseconds that a busy machine makes long.
        """
        for _ in range(20):
            self.send(key)
            with suppress(AssertionError):
                self.expect(pattern, timeout=2)
                return
        raise AssertionError(f"no {pattern!r} in {self.text!r}")

    def close(self) -> int:
        """The exit code."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 4096)
                except OSError:  # the other end has closed
                    break
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal(*arguments, **environment):
    """Start Python with these arguments in a Terminal, which ends with the block."""
    t = Terminal(*arguments, **environment)
    try:
        yield t
    finally:
        try:
            os.kill(t.pid, signal.SIGKILL)
            os.waitpid(t.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(t.fd)
