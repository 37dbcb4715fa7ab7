"""What a CUDA build needs of this machine: nvcc, cuBLAS, the driver's library, and the
architectures to compile for.

    toolkit = find()                                # Toolkit; UserError without nvcc
    toolkit.flags(toolkit.architectures("86,89"))   # cmake options; UserError names what else is missing

cuBLAS may lie in the toolkit or in NVIDIA's Python package, where cmake does not look. Nothing is
compiled here.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mod_export.errors import UserError

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")  # for which scripts/cuda/check.py compiles
DRIVER_DIRS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
)
DRIVER_DIRS += ("/usr/local/nvidia/lib64", "/usr/lib")


@dataclass(frozen=True)
class Toolkit:
    """nvcc, the directory of its toolkit, and its version: (13, 0) for CUDA 13.0."""

    nvcc: Path
    root: Path
    version: tuple[int, int]

    def cublas_include(self) -> Path | None:
        """The directory of cublas_v2.h: in the toolkit, else in a package."""
        places = [*self.root.glob("targets/*/include"), self.root / "include"]
        places += [package / "include" for package in self._packages()]
        return next((place for place in places if (place / "cublas_v2.h").is_file()), None)

    def library(self, name: str) -> Path | None:
        """libNAME.so of the toolkit, else libNAME.so.MAJOR of a package."""
        places = [*self._lib_dirs(), *(package / "lib" for package in self._packages())]
        files = (
            place / f"lib{name}.so{suffix}"
            for place in places
            for suffix in ("", f".{self.version[0]}")
        )
        return next((file for file in files if file.is_file()), None)

    def driver(self) -> Path | None:
        """libcuda.so, or libcuda.so.1 where the driver brings no more; else the toolkit's stub, to
        link against.
        """
        places = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), *DRIVER_DIRS]
        places += [str(place / "stubs") for place in self._lib_dirs()]
        files = (
            Path(place, name)
            for place in places
            if place
            for name in ("libcuda.so", "libcuda.so.1")
        )
        return next((file for file in files if file.is_file()), None)

    def architectures(self, wanted: str | None = None) -> list[str]:
        """Those of `wanted` ("75,86"), else ("native", None) of this machine's GPUs, in ascending
        order.

        UserError where there is no GPU, or nvcc lacks an architecture.
        """
        archs = wanted.replace(" ", "").split(",") if wanted and wanted != "native" else _gpus()
        if not archs:
            cure = (
                f"say for which to build: --cuda-arch {','.join(ARCHITECTURES)}, or some of these"
            )
            raise UserError("no GPU is found here (nvidia-smi)", cure)
        said = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = re.findall(r"compute_(\d+)", said)
        for arch in archs:
            if arch not in known:
                version = ".".join(map(str, self.version))
                raise UserError(
                    f"nvcc {version} has no architecture {arch!r}", f"it has {', '.join(known)}"
                )
        return sorted(set(archs), key=int)

    def flags(self, archs: list[str]) -> dict[str, str]:
        """The cmake options of a build for `archs`; UserError names everything that is missing."""
        include, driver = self.cublas_include(), self.driver()
        cublas, cublas_lt = self.library("cublas"), self.library("cublasLt")
        missing, cures = [], []
        if not include or not cublas or not cublas_lt:
            package = (
                "nvidia-cublas" if self.version[0] > 12 else f"nvidia-cublas-cu{self.version[0]}"
            )
            missing.append("cuBLAS (cublas_v2.h, libcublas, libcublasLt)")
            cures.append(f"install the toolkit's, or `pip install {package}`")
        if not driver:
            missing.append("the driver's library (libcuda.so)")
            cures.append("install the NVIDIA driver, or the toolkit's stubs")
        if missing:
            raise UserError(f"missing: {', '.join(missing)}", ", ".join(cures))
        flags = {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": ";".join(archs)}
        flags |= {"CMAKE_CUDA_COMPILER": str(self.nvcc), "CUDAToolkit_ROOT": str(self.root)}
        flags |= {"CMAKE_CUDA_FLAGS": f"-I{include}", "CUDA_cuda_driver_LIBRARY": str(driver)}
        flags |= {"CUDA_cublas_LIBRARY": str(cublas), "CUDA_cublasLt_LIBRARY": str(cublas_lt)}
        # at run time the libraries are where they were found; the driver's is the system's own
        libs = dict.fromkeys(str(path.parent) for path in (cublas, self.library("cudart")) if path)
        return flags | {"CMAKE_INSTALL_RPATH": ";".join(["$ORIGIN", *libs])}

    def _lib_dirs(self) -> list[Path]:
        return [*sorted(self.root.glob("targets/*/lib")), self.root / "lib64", self.root / "lib"]

    def _packages(self) -> Iterator[Path]:
        """Directories of NVIDIA's Python packages for this CUDA: nvidia/cu13, for CUDA 12
        nvidia/cublas.
        """
        for folder in filter(None, sys.path):
            for path in (
                Path(folder, "nvidia", f"cu{self.version[0]}"),
                Path(folder, "nvidia/cublas"),
            ):
                if (path / f"lib/libcublas.so.{self.version[0]}").is_file():
                    yield path


def find() -> Toolkit:
    """$CUDACXX, else nvcc on the PATH, of $CUDA_PATH or $CUDA_HOME, or in the usual place."""
    roots = [
        root
        for root in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda")
        if root
    ]
    path = os.pathsep.join(
        [os.environ.get("PATH", ""), *(str(Path(root, "bin")) for root in roots)]
    )
    choice = os.environ.get("CUDACXX") or "nvcc"
    nvcc = shutil.which(choice, path=path)
    if nvcc is None:
        raise UserError(
            f"missing: {choice}", "install the CUDA toolkit, or set CUDACXX to the path of nvcc"
        )
    return Toolkit(Path(nvcc), _root(nvcc), _version(nvcc))


def _root(nvcc: str) -> Path:
    """The toolkit's directory as nvcc itself names it: what is on the PATH may be a link or a
    script.
    """
    said = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    return Path(found[1].strip() if found else Path(nvcc).resolve().parent.parent).resolve()


def _version(nvcc: str) -> tuple[int, int]:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if not found:
        raise UserError(
            f"{nvcc} does not tell its version", "set CUDACXX to the path of a working nvcc"
        )
    return int(found[1]), int(found[2])


def _gpus() -> list[str]:
    """Architectures of the GPUs that the driver sees."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if smi is None:
        return []
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    return [major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", said, re.MULTILINE)]
