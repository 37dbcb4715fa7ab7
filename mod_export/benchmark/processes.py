"""The processes of a benchmark: which file and library each variant runs, and which variants fit
into memory at once.

with Team(plan) as team:
    team.ask("ceiling", do="prefill", seq=0, start=0, n=512)
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from mod_export.benchmark.process_helpers import available_memory as of_host
from mod_export.errors import UserError
from mod_export.formats.ggml_types import bytes_per_value
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import bytes_per_token

logger = logging.getLogger(__name__)

FORCE = {"all_active": "active", "none_active": "inactive"}
STOCK = ("ceiling", "ceiling_split", "floor")  # variants on the stock library
# what is compared with what has to run side by side; from few large groups to many small ones
GROUPINGS = (
    (("ceiling", "ceiling_split", "floor", "dense_patched", "mod", "all_active", "none_active"),),
    (
        ("ceiling", "floor", "mod", "none_active"),
        ("ceiling", "ceiling_split", "dense_patched", "all_active"),
    ),
    (
        ("ceiling", "floor", "mod"),
        ("floor", "none_active"),
        ("ceiling", "dense_patched", "all_active"),
        ("ceiling", "ceiling_split"),
    ),
)
# ggml's CPU backend copies weights of these types into a layout of its own, which processes do not
# share
REPACKED = {2, 10, 12, 13, 14, 20, 39}  # q4_0, q2_k, q4_k, q5_k, q6_k, iq4_nl, mxfp4
PROCESS = 300 << 20  # bytes of Python, libraries and compute buffers, about
GPU_PROCESS = 1 << 30  # bytes of kernels and compute buffers on a GPU, a guess


class Worker:
    """A process that answers one question at a time; see bench_worker."""

    def __init__(
        self,
        name: str,
        setup: dict,
        lib: Path | None = None,
        module: str = "mod_export.benchmark.worker",
    ):
        self.name = name
        env = os.environ | (
            {"LLAMA_CPP_LIB_PATH": str(lib), "LD_LIBRARY_PATH": library_path(lib)} if lib else {}
        )
        # a session of its own: Ctrl-C reaches us alone, and we end the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=env,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.about = self.ask(**setup)
        except BaseException:
            self.close()
            raise

    def ask(self, **question) -> dict:
        """The process's answer. Raises UserError with what went wrong there."""
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(
                f"the process of {self.name} ended with code {self.process.wait()}",
                "is there enough memory? try fewer --variants or a smaller context",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}", answer["cure"])
        return answer

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a question that was never read
            self.process.stdin.close()
        self.process.stdout.close()


def library_path(lib: Path) -> str:
    """LD_LIBRARY_PATH with `lib` first, so that the user's own does not mix the libraries of two
    builds.

    The user's stays behind it: a GPU's driver may be found through it alone.
    """
    return os.pathsep.join(filter(None, [str(lib), os.environ.get("LD_LIBRARY_PATH")]))


class Team:
    """The processes of some variants, all at the same settings."""

    def __init__(self, setups: dict[str, tuple[dict, Path | None]]):
        self.workers: dict[str, Worker] = {}
        try:
            for name, (setup, lib) in setups.items():
                self.workers[name] = Worker(name, setup, lib)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        return list(self.workers)

    def ask(self, name: str, **question) -> dict:
        return self.workers[name].ask(**question)

    def ask_all(self, names: Iterable[str], **question) -> dict[str, dict]:
        return {name: self.workers[name].ask(**question) for name in names}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def groups(variants: list[str], bytes_of: dict[str, int], available: int) -> list[list[str]]:
    """Variants that run side by side: all, or fewer at a time where memory is short (bytes_of: each
    one's need).

    Where not even the smallest groups fit, it says so and tries.
    """
    for grouping in GROUPINGS:
        found = [[v for v in group if v in variants] for group in grouping]
        found = [
            g for i, g in enumerate(found) if not any(set(g) <= set(other) for other in found[:i])
        ]
        need = max(sum(bytes_of[v] for v in group) for group in found)
        if need <= available:
            break
    if len(found) > 1:
        logger.warning(
            f"note: all variants at once need about {sum(bytes_of[v] for v in variants) / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are free: they run in groups, "
            + "; ".join(", ".join(g) for g in found)
        )
    if need > available:
        logger.warning(
            f"note: about {need / 1e9:.1f} GB are needed, {available / 1e9:.1f} GB are free: this may end or swap"
        )
    return found


def process_bytes(file: GGUFFile, cells: int, bytes_per_cell: float, on_gpu: bool = False) -> int:
    """Memory that a process takes for itself, about; on a GPU, of the GPU's.

    The mapped file is shared, repacked weights are not, and neither is anything on a GPU.
    """
    own = sum(t.nbytes for t in file.tensors.values() if on_gpu or t.type in REPACKED)
    return int(own + cells * bytes_per_cell + (GPU_PROCESS if on_gpu else PROCESS))


def bytes_per_cell(file: GGUFFile, type_k: int, type_v: int) -> float:
    """K and V of one token in all layers of a dense model; their ggml types."""
    k, v = bytes_per_value(type_k), bytes_per_value(type_v)
    return sum(
        bytes_per_token(file, layer, k, v) for layer in range(file.model_number("block_count"))
    )


def available_memory(on_gpu: bool = False) -> int:
    """Bytes that can be taken without swapping, of all GPUs together, a tenth left over."""
    if on_gpu:
        from mod_export.runtime.devices import gpus

        return sum(gpu.free for gpu in gpus()) * 9 // 10
    return of_host()
