"""Limits of the control group that this process is in: what a container may use of its machine.

The limits of all groups up to the root of the hierarchy hold. Source: cgroups(7), and
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of Linux. Elsewhere there are no limits.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

CGROUP_FILE = Path("/proc/self/cgroup")
MOUNTS_FILE = Path("/proc/self/mountinfo")


def cpu_quota() -> float | None:
    """Return how many processors' time the group may use, None where it may use all of it."""
    quotas = [_quota(folder) for folder in _folders("cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit() -> int | None:
    """Return the bytes of memory that the group may use, None where there is no limit."""
    return min((limit for limit, _ in _memory()), default=None)


def memory_left() -> int | None:
    """Return the bytes that the group can take before it meets a limit, None without a limit.

    Pages of files that nothing used of late count as free: the kernel drops them first.
    """
    return min((max(0, limit - used) for limit, used in _memory()), default=None)


def _quota(folder: Path) -> float | None:
    if text := _read(folder / "cpu.max"):  # version 2: quota and period in microseconds
        quota, _, period = text.partition(" ")
    else:
        quota = _read(folder / "cpu.cfs_quota_us")
        period = _read(folder / "cpu.cfs_period_us")
    limited = quota.isdigit() and period.isdigit() and int(period) > 0
    return int(quota) / int(period) if limited else None


def _memory() -> Iterator[tuple[int, int]]:
    """Limit and use of each group that has a limit, in bytes."""
    for folder in _folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not (limit.isdigit() and used.isdigit()):
            continue
        statistics = dict(
            line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line
        )
        cached = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
        yield int(limit), int(used) - (int(cached) if cached.isdigit() else 0)


def _folders(controller: str) -> Iterator[Path]:
    """The folders of this process's groups: version 2, and version 1 of a controller."""
    for line in _read(CGROUP_FILE).splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            mounts = _mounts("cgroup2")
        elif controller in controllers.split(","):
            mounts = _mounts("cgroup", controller)
        else:
            continue
        for root, mount in mounts:
            # A container may see its own group as the root of the mount.
            inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
            yield mount
            for part in [inside, *inside.parents]:
                if part != Path() and (mount / part).is_dir():
                    yield mount / part


def _mounts(kind: str, option: str = "") -> Iterator[tuple[str, Path]]:
    """Root in the hierarchy, and place, of the mounts of a file system."""
    for line in _read(MOUNTS_FILE).splitlines():
        here, _, there = line.partition(" - ")
        fields, (filesystem, _, options) = here.split(), (there.split() + [""] * 3)[:3]
        if len(fields) > 4 and filesystem == kind and (not option or option in options.split(",")):
            yield fields[3], Path(fields[4])


def _read(path: Path) -> str:
    """The text of a file; empty where the file is absent or cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
