"""Failed assertions of llama.cpp as exceptions, while a file is opened.

llama.cpp checks much of a file with assertions, and a failed one ends the process. ggml calls back
before that. A call that is guarded runs on a thread of its own. Where an assertion fails there, the
callback never returns, so that thread waits for ever with what it holds, and the caller gets an
exception. Nothing jumps out of C++.

    model = guarded(lambda: load(path))          # raises AssertionFailure

A signal (a division by zero, a wild pointer) and a C++ exception that nobody catches still end the
process. formats/model_checks.py refuses the files that lead there.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mod_export.runtime import bindings  # noqa: F401  first: it says what to do without llama_cpp

from llama_cpp import llama_cpp  # isort: skip

T = TypeVar("T")
STREAM_NUMBERS = (1, 2)


class AssertionFailure(Exception):
    """An assertion of llama.cpp failed. The message is the condition and its place."""


class _GuardedCall:
    """A call on a thread of its own, and how the call ended."""

    def __init__(self, call: Callable[[], Any]):
        self.ended = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call

    def run(self) -> None:
        _guarded[threading.get_ident()] = self
        try:
            self.result = self._call()
        except BaseException as exc:  # the caller's thread raises it again
            self.error = exc
        del _guarded[threading.get_ident()]
        self.ended.set()


_guarded: dict[int, _GuardedCall] = {}  # thread -> the call that it runs
# llama_cpp points stdout and stderr of the process elsewhere meanwhile: one call at a time.
_one_call = threading.Lock()


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _on_abort(message: bytes | None) -> None:
    """Take ggml's last words; ggml ends the process when this returns (ggml_abort in ggml.c)."""
    where, _, what = (message or b"").decode("utf-8", "replace").strip().partition(": ")
    text = f"{what} ({Path(where).name})"
    call = _guarded.get(threading.get_ident())
    if call is None:
        print(f"error: llama.cpp stops: {text}", file=sys.stderr, flush=True)
        return
    call.error = AssertionFailure(text)
    call.ended.set()
    threading.Event().wait()


@contextmanager
def _kept_streams() -> Iterator[None]:
    """Give stdout and stderr back after a failed assertion.

    llama_cpp hides both while it loads a file, and the waiting thread never ends that.
    """
    streams = sys.stdout, sys.stderr
    copies = [os.dup(number) for number in STREAM_NUMBERS]
    try:
        yield
    except AssertionFailure:
        sys.stdout, sys.stderr = streams
        for number, copy in zip(STREAM_NUMBERS, copies, strict=True):
            os.dup2(copy, number)
        raise
    finally:
        for copy in copies:
            os.close(copy)


def guarded(call: Callable[[], T]) -> T:
    """Run `call` and return what it returns.

    Raises AssertionFailure where an assertion of llama.cpp fails, and what `call` raises.
    """
    llama_cpp._lib.ggml_set_abort_callback(_on_abort)
    running = _GuardedCall(call)
    interrupt = None
    with _one_call, _kept_streams():
        # Ctrl-C cannot interrupt this start half-way, as it can that of a threading.Thread.
        _thread.start_new_thread(running.run, ())
        while not running.ended.is_set():
            try:
                running.ended.wait()
            except KeyboardInterrupt as exc:  # it is raised when C++ has returned
                interrupt = exc
        if running.error:
            raise running.error
    if interrupt:
        raise interrupt
    return running.result
