"""What the parts of scripts/gpu/check.sh share: folders, results as JSON files, the machine.

check.sh sets GPU_WORK and GPU_RESULTS. In a rehearsal check.sh sets MOD_REHEARSE=1, and the parts
run on a CPU build with the smallest sizes.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mod_export.cli.output import show_messages
from mod_export.common.files import atomic_file
from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build

REHEARSE = os.environ.get("MOD_REHEARSE") == "1"
WORK, RESULTS = Path(os.environ["GPU_WORK"]), Path(os.environ["GPU_RESULTS"])
GPU_LAYERS = 0 if REHEARSE else -1
THREADS = 1 if REHEARSE else None  # a rehearsal may have to share its cores
OPS = "MOD_SCORE,MOD_ROUTE,MOD_GATHER,MOD_SCATTER,MOD_MASK"


def patched_lib() -> Path:
    lib = llama_build.patched_lib(cuda=not REHEARSE)
    if lib is None:
        raise UserError("the library is not built", "run the part `build` first")
    return lib


def read(name: str) -> dict:
    """Return the result so far, which is empty where it is of another build."""
    path = RESULTS / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("machine", {}).get("build") == machine()["build"] else {}


def save(name: str, data: dict) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_file(RESULTS / name, force=True) as tmp:
        tmp.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n")


def machine() -> dict:
    """Return the machine and the build for which the figures hold."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    lib = llama_build.patched_lib(cuda=not REHEARSE)
    return {
        "build": lib and lib.name,
        "date": time.strftime("%Y-%m-%d"),
        "gpus": _said(query),
        "nvcc": _said(["nvcc", "--version"])[-2:],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "rehearsal": REHEARSE,
    }


def _said(command: list[str]) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        return []


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


def part(main: Callable[[], bool], needs_gpu: bool = True) -> None:
    """Run main() and end the process.

    The exit code is 0 where main() says that all is well, 1 where not, and 2 for an error that the
    user can cure.
    """
    show_messages(stdout=True)
    try:
        if needs_gpu and not REHEARSE:
            require_gpu()
        sys.exit(0 if main() else 1)
    except UserError as exc:
        sys.exit(print(f"error: {exc}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(124)  # time is up; check.sh says it
