"""This machine and this process: processors and memory."""

import contextlib
import os
import platform
import re
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def usable_cpus() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the model name of the processor."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> str:
    """Return the machine type and the instruction sets of the processor.

    `-march=native` sees the same: a cache in a shared home directory must not offer the
    instructions of another processor.
    """
    found = None
    with contextlib.suppress(OSError):
        found = re.search(
            r"^(flags|Features)\s*:(.*)$", CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE
        )
    return platform.machine() + (" ".join(sorted(found[2].split())) if found else "")


def total_memory() -> int:
    """Return the memory of the machine in bytes."""
    import psutil

    return psutil.virtual_memory().total


def free_memory() -> int:
    """Return the memory that nothing uses, not even the page cache, in bytes."""
    import psutil

    return psutil.virtual_memory().free


def available_memory() -> int:
    """Return the bytes that can be taken without swapping, less a tenth."""
    import psutil

    return psutil.virtual_memory().available * 9 // 10


def resident(name: str) -> int:
    """Return a memory figure of this process in bytes, by its name in /proc/self/status.

    VmRSS: resident memory now; VmHWM: the largest so far. Both count the mapped model file.
    """
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let VmHWM begin anew, from what is resident now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
