"""This machine and this process: processors and memory."""

import contextlib
import os
import platform
import re
import sys
from pathlib import Path

from mod_export.common import cgroup

CPU_INFO = Path("/proc/cpuinfo")


def usable_cpus() -> int:
    """Return the number of processors that this process may keep busy, at least 1.

    A container with a quota of 1.5 processors gets 1: a second thread would make both wait for the
    next period, each time the quota is used up.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cpus or 1, int(cgroup.cpu_quota() or cpus or 1)))


def bound_spinning() -> None:
    """Let OpenMP's threads sleep soon where they wait for each other, and keep to a quota.

    Call it before torch is imported: OpenMP reads its variables once. GNU's OpenMP spins for 300000
    rounds, so that a thread that has lost its processor to another process makes all others spin.
    After 1000 rounds the quiet machine is as fast (docs/results/speed-cpu.md). What the user has
    set stays. Source: libgomp's manual, GOMP_SPINCOUNT.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"
    if cgroup.cpu_quota():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))


def use_large_pages() -> None:
    """Let torch ask for pages of 2 MB for large tensors on the CPU, where the system has them.

    Call it before torch is imported. torch gives the memory of a tensor back after use, and pages
    of 4 kB then cost a quarter of the time of a training step. What the user has set stays.
    Source: c10/core/impl/alloc_cpu.cpp of torch, THP_MEM_ALLOC_ENABLE.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def busy_cpus(seconds: float = 0.5) -> float:
    """Return how many processors were at work on average while this function waited."""
    import psutil

    return sum(psutil.cpu_percent(interval=seconds, percpu=True)) / 100


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
    """Return the memory of the machine in bytes, or what its container may use of it."""
    import psutil

    return min(psutil.virtual_memory().total, cgroup.memory_limit() or sys.maxsize)


def free_memory() -> int:
    """Return the memory that nothing uses, not even the page cache, in bytes."""
    import psutil

    return _within_limit(psutil.virtual_memory().free)


def available_memory() -> int:
    """Return the bytes that can be taken without swapping, less a tenth."""
    import psutil

    return _within_limit(psutil.virtual_memory().available) * 9 // 10


def _within_limit(size: int) -> int:
    """Return `size` in bytes, or what is left of the container's memory where that is less."""
    left = cgroup.memory_left()
    return size if left is None else min(size, left)


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
