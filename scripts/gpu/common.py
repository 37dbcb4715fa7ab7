"""What the parts of scripts/gpu/call share: folders, the time that is left, results, their end.

call.py sets the environment: GPU_WORK, where the package is unpacked; GPU_OUT, the folder of the
results; GPU_SECONDS, the time of this part; MOD_REHEARSE=1 in a rehearsal, which runs a CPU build
with the smallest sizes.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mod_export.cli.output import show_messages
from mod_export.common.files import atomic_file
from mod_export.errors import UserError

REHEARSE = os.environ.get("MOD_REHEARSE") == "1"
WORK, OUT = Path(os.environ.get("GPU_WORK", ".")), Path(os.environ.get("GPU_OUT", "."))
LIB, MODELS = WORK / "lib", WORK / "models"
GPU_LAYERS = 0 if REHEARSE else -1
THREADS = 1 if REHEARSE else None  # a rehearsal may have to share its cores
STARTED = time.monotonic()
OPS = "MOD_SCORE,MOD_ROUTE,MOD_GATHER,MOD_SCATTER,MOD_MASK"


def seconds_left() -> float:
    """Seconds until the time of this part is up."""
    return STARTED + float(os.environ["GPU_SECONDS"]) - time.monotonic()


def save(name: str, data: dict) -> None:
    """Write OUT/name whole, with the machine for which the figures hold."""
    with atomic_file(OUT / name, force=True) as tmp:
        tmp.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")


def machine() -> dict:
    """The machine and the package for which the figures hold."""
    about = WORK / "prebuilt.json"
    return {
        "package": json.loads(about.read_text())["key"] if about.is_file() else None,
        "date": time.strftime("%Y-%m-%d"),
        "gpus": nvidia_smi("name,driver_version,memory.total"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "rehearsal": REHEARSE,
    }


def nvidia_smi(fields: str) -> list[list[str]]:
    """These fields of each GPU that the driver sees; empty without a driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def environment(way: str) -> dict[str, str]:
    """The environment of a process that decodes by `way`: segments, or graph for one graph."""
    env = {name: value for name, value in os.environ.items() if name != "LLAMA_MOD_DECODE"}
    return env | ({"LLAMA_MOD_DECODE": "graph"} if way == "graph" else {})


def require_gpu() -> None:
    """Raise UserError where the library sees no GPU.

    Without a GPU the CPU would be compared with itself, and the comparison would pass.
    """
    from mod_export.runtime.devices import gpus

    if not gpus():
        raise UserError(
            "the library sees no GPU",
            "check nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version",
        )


def part(main: Callable[[], bool]) -> None:
    """Run main() and end the process.

    The exit code is 0 where main() says that all is well, 1 where not, and 2 for an error that the
    user can cure. A signal to end becomes an exception, so that worker processes end too.
    """
    show_messages(stdout=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
    try:
        if not REHEARSE:
            require_gpu()
        sys.exit(0 if main() else 1)
    except UserError as exc:
        sys.exit(print(f"error: {exc}", file=sys.stderr) or 2)
