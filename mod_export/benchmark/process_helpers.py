"""Memory figures of this process and of the machine."""

import contextlib


def resident(name: str) -> int:
    """A memory figure of this process in bytes. VmHWM: largest resident memory, the mapped model
    file included.
    """
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(f"{name}:"))


def available_memory() -> int:
    """Bytes that can be taken without swapping, a tenth left over."""
    with open("/proc/meminfo") as f:
        return (
            next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
            * 1024
            * 9
            // 10
        )


def forget_peak() -> None:
    """Lets VmHWM begin anew, from what is resident now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
