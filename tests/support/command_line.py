"""Run `mod-export` for tests, in this process or in a process of its own.

    done = command_line.run("inspect", "mod.gguf", "--json")
    assert done.returncode == 0, done.stderr

`run` takes this process, and `spawn` starts another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def spawn(*args, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run `mod-export args` in a process of its own."""
    command = [sys.executable, "-m", "mod_export", *map(str, args)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def run(*args, cwd=None) -> subprocess.CompletedProcess:
    """Run `mod-export args` in this process, which is afterwards as it was.

    stdout and stderr also hold what libraries in C and child processes write.
    """
    from mod_export.cli import main

    given = [str(arg) for arg in args]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process_as_it_was())
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        with _streams_into(out, err):
            code = _exit_code(main, given)
        texts = [_text(file) for file in (out, err)]
    return subprocess.CompletedProcess(["mod-export", *given], code, *texts)


def _exit_code(main, args: list[str]) -> int:
    """Return the exit code with which the process would end."""
    try:
        main(args)
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _text(file) -> str:
    file.seek(0)
    return file.read().decode()


@contextlib.contextmanager
def _streams_into(out, err):
    """Send stdout and stderr of Python and of C to these files; stdin is at its end."""
    former = sys.stdin, sys.stdout, sys.stderr
    for stream in former[1:]:
        stream.flush()
    saved = [os.dup(fd) for fd in (1, 2)]
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    # never closed: a library may have kept them
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8", buffering=1)
    try:
        with open(os.devnull) as sys.stdin:
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = former
        for fd, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, fd)
            os.close(copy)


@contextlib.contextmanager
def _process_as_it_was():
    """Restore signals, environment, handlers of logs and torch's threads.

    Warnings go to stderr, and are those that Python shows in a command.
    """
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    loggers = [logging.getLogger(name) for name in ("", "mod_export")]
    logs = [(log, log.level, list(log.handlers), log.propagate) for log in loggers]
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
                warnings.simplefilter("ignore", hidden)
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.showwarning = _show
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ.update(environment)
        for log, level, handlers, propagate in logs:
            log.level, log.handlers[:], log.propagate = level, handlers, propagate
        if torch:
            torch.set_num_threads(threads)


def _show(message, category, filename, lineno, file=None, line=None):
    print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)
