"""What every public method of a llama_cpp.Llama of ours does first: it waits for its turn.

    class Safe(llama_cpp.Llama): ...
    guard_methods(Safe, llama_cpp.Llama)      # the inherited ones and its own

llama.cpp's context knows no threads, and a freed one ends the process. So one thread at a time is
inside an object, a closed object refuses, and an error of llama_cpp becomes one line.
"""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable, Generator
from types import FunctionType, GeneratorType
from typing import Any

from mod_export.errors import UserError

# Dunder methods that use the model.
GUARDED_DUNDERS = ("__call__", "__getstate__")
# Packages whose exceptions are about what the caller gave. A caller's own functions, such as logits
# processors, raise theirs elsewhere.
LIBRARIES = ("llama_cpp", "jinja2")


class InputError(UserError, ValueError):
    """Bad input to a method; a ValueError too, which llama_cpp.Llama mostly raises."""


class Guard:
    """The lock of an object, and whether the object is open.

    A thread may enter again while it is inside. Raises UserError where the object is closed.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.closed = False

    def __enter__(self) -> None:
        self.lock.acquire()
        if self.closed:
            self.lock.release()
            raise UserError("the model is closed", "open the file again")

    def __exit__(self, *_exc) -> None:
        self.lock.release()


def unguarded(method: Callable) -> Callable:
    """Mark a method that works on a closed object too, and beside other threads."""
    method.__dict__["unguarded"] = True
    return method


def guard_methods(cls: type, *bases: type) -> None:
    """Guard the public methods and properties of a class, and those of `bases` that it inherits.

    Instances have a Guard as `_guard`. An iterator that a method returns is guarded step by step:
    between two steps other threads have their turn, and a dropped iterator holds nothing.
    """
    members = {name: member for base in (*bases, cls) for name, member in vars(base).items()}
    for name, member in members.items():
        if name.startswith("_") and name not in GUARDED_DUNDERS:
            continue
        member = vars(cls).get(name, member)
        if isinstance(member, FunctionType) and not hasattr(member, "unguarded"):
            setattr(cls, name, _guarded(member))
        elif isinstance(member, property):
            read, write, delete = (
                accessor and _guarded(accessor)
                for accessor in (member.fget, member.fset, member.fdel)
            )
            setattr(cls, name, property(read, write, delete, member.__doc__))


def _guarded(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with self._guard:
            try:
                result = method(self, *args, **kwargs)
            except Exception as exc:
                _tell(method.__name__, exc)
                raise
        if isinstance(result, GeneratorType):
            return _steps(self._guard, method.__name__, result)
        return result

    return call


def _steps(guard: Guard, name: str, inner: Generator) -> Generator:
    """The steps of a generator, each of them inside the guard."""
    sent: Any = None
    try:
        while True:
            with guard:
                try:
                    item = inner.send(sent)
                except StopIteration as end:
                    return end.value
                except Exception as exc:
                    _tell(name, exc)
                    raise
            sent = yield item
    finally:
        with guard.lock:  # also where the object is closed
            inner.close()


def _tell(name: str, exc: Exception) -> None:
    """Raise InputError in place of an exception that one of LIBRARIES raised."""
    if isinstance(exc, UserError | ImportError):
        return
    *_, (frame, _line) = traceback.walk_tb(exc.__traceback__)
    module = str(frame.f_globals.get("__name__", ""))
    template = frame.f_code.co_filename == "<template>"
    if template or module.partition(".")[0] in LIBRARIES:
        why = str(exc) or f"{type(exc).__name__} in {frame.f_code.co_name}"
        raise InputError(f"{name}: {why}", "check the arguments") from exc
