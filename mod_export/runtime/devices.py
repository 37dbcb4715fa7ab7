"""The GPUs that the loaded llama.cpp computes on, and their free memory.

    gpus()                       # [Gpu(name="NVIDIA ...", free=..., total=...)], or []
    meter = GpuMemoryMeter()
    answer = meter.during(f)
    meter.used

The driver counts the free memory (cudaMemGetInfo). A stock library works too.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from mod_export.errors import UserError
from mod_export.runtime import bindings  # first: it says what to do where llama_cpp is missing

GGML_BACKEND_DEVICE_TYPE_GPU = 1  # ggml-backend.h

# libggml comes with libllama, so its symbols are found through it
_lib = bindings._llama._lib
_device_p, _size_p = ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)
for _name, _argtypes, _restype in (
    ("count", [], ctypes.c_size_t),
    ("get", [ctypes.c_size_t], _device_p),
    ("type", [_device_p], ctypes.c_int),
    ("description", [_device_p], ctypes.c_char_p),
    ("memory", [_device_p, _size_p, _size_p], None),
):
    _function = getattr(_lib, f"ggml_backend_dev_{_name}")
    _function.argtypes, _function.restype = _argtypes, _restype


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory in bytes."""

    name: str
    free: int
    total: int


def gpus() -> list[Gpu]:
    """All GPUs.

    Asking for their memory makes this process take some of it for the driver.
    """
    found = []
    for i in range(_lib.ggml_backend_dev_count()):
        device = _lib.ggml_backend_dev_get(i)
        if _lib.ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            _lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(
                Gpu(_lib.ggml_backend_dev_description(device).decode(), free.value, total.value)
            )
    return found


def check(layers: int) -> None:
    """Raise UserError where layers are to lie on a GPU (not 0) and llama.cpp sees no GPU."""
    if layers and not gpus():
        raise UserError(
            "this llama.cpp sees no GPU", "run `mod-export build --cuda`, or leave out --gpu-layers"
        )


def chosen_layers(layers: int | None, rpc: str | None) -> int:
    """Return how many layers lie on GPUs and on the RPC servers: all of them without a choice.

    Without servers no layer does. Raises UserError as `check` does.
    """
    if rpc:
        return -1 if layers is None else layers
    check(layers or 0)
    return layers or 0


def free_memory() -> int:
    """Free bytes of all GPUs together."""
    return sum(gpu.free for gpu in gpus())


class GpuMemoryMeter:
    """Adds up the bytes of GPU memory that calls take, if no other process takes any meanwhile."""

    def __init__(self) -> None:
        self.used = 0
        free_memory()  # The memory that the driver takes for a process is no part of the figure.

    def during(self, function: Callable, *args, **kwargs):
        """The result of function(*args, **kwargs)."""
        before = free_memory()
        result = function(*args, **kwargs)
        self.used += before - free_memory()
        return result
