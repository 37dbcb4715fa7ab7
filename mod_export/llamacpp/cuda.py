"""What a CUDA build needs of this machine: nvcc, cuBLAS, the driver's library, and architectures.

    toolkit = find()                                # Toolkit; UserError without nvcc
    toolkit.flags(toolkit.architectures("86,89"))   # cmake options; UserError names what is missing

cuBLAS may lie in the toolkit or in NVIDIA's Python package, where cmake does not look. Nothing is
compiled here.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mod_export.common.files import atomic_file
from mod_export.common.paths import SET_CACHE, cache_dir
from mod_export.errors import UserError

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")  # scripts/cuda/check.py compiles for these
DRIVER_DIRS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib",
)
DEFAULT_ROOT = "/usr/local/cuda"
WSL_FOLDER = "/usr/lib/wsl/lib"  # nvidia-smi lies here under Windows
CUDA_WITHOUT_SUFFIX = 13  # NVIDIA's Python packages have no suffix -cuNN from this version on.


@dataclass(frozen=True)
class Toolkit:
    """nvcc, the directory of its toolkit, and its version: (13, 0) for CUDA 13.0."""

    nvcc: Path
    root: Path
    version: tuple[int, int]

    def cublas_include(self) -> Path | None:
        """The directory of cublas_v2.h: in the toolkit, else in a package."""
        folders = [*self.root.glob("targets/*/include"), self.root / "include"]
        folders += [package / "include" for package in self._packages()]
        return next((folder for folder in folders if (folder / "cublas_v2.h").is_file()), None)

    def library(self, name: str) -> Path | None:
        """libNAME.so of the toolkit, else libNAME.so.MAJOR of a package."""
        suffixes = ("", f".{self.version[0]}")
        for folder in (*self._library_folders(), *(path / "lib" for path in self._packages())):
            for suffix in suffixes:
                file = folder / f"lib{name}.so{suffix}"
                if file.is_file():
                    return file
        return None

    def driver(self) -> Path | None:
        """The driver's library: libcuda.so, or libcuda.so.1 where the driver brings no more.

        Without a driver it is the toolkit's stub, which suffices to link against. The toolkit of
        NVIDIA's Python packages brings no stub, so one is made from its header cuda.h.
        """
        folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), *DRIVER_DIRS]
        folders += [str(folder / "stubs") for folder in self._library_folders()]
        for folder in filter(None, folders):
            for name in ("libcuda.so", "libcuda.so.1"):
                file = Path(folder, name)
                if file.is_file():
                    return file
        return self._make_stub()

    def architectures(self, wanted: str | None = None) -> list[str]:
        """The architectures of `wanted` ("75,86") in ascending order.

        "native" or None stands for those of this machine's GPUs. Raises UserError where there is no
        GPU, or nvcc lacks an architecture.
        """
        if wanted and wanted != "native":
            found = wanted.replace(" ", "").split(",")
        else:
            found = _gpu_architectures()
        if not found:
            known = ",".join(ARCHITECTURES)
            raise UserError(
                "no GPU is found here (nvidia-smi)",
                f"say for which to build: --cuda-arch {known}, or some of these",
            )
        output = _output([str(self.nvcc), "--list-gpu-arch"]).stdout
        known_to_nvcc = re.findall(r"compute_(\d+)", output)
        for architecture in found:
            if architecture not in known_to_nvcc:
                version = ".".join(map(str, self.version))
                raise UserError(
                    f"nvcc {version} has no architecture {architecture!r}",
                    f"it has {', '.join(known_to_nvcc)}",
                )
        return sorted(set(found), key=int)

    def flags(self, architectures: list[str]) -> dict[str, str]:
        """The cmake options of a build. Raises UserError naming everything that is missing."""
        include = self.cublas_include()
        cublas = self.library("cublas")
        cublas_lt = self.library("cublasLt")
        driver = self.driver()
        missing = []
        cures = []
        if not include or not cublas or not cublas_lt:
            missing.append("cuBLAS (cublas_v2.h, libcublas, libcublasLt)")
            cures.append(f"install the toolkit's, or `pip install {self._cublas_package()}`")
        if not driver:
            missing.append("the driver's library (libcuda.so)")
            cures.append("install the NVIDIA driver, or the toolkit's stubs")
        if missing:
            raise UserError(f"missing: {', '.join(missing)}", ", ".join(cures))
        # The run finds the libraries in the same place; the driver's library is the system's own.
        found = [path for path in (cublas, self.library("cudart")) if path]
        folders = dict.fromkeys(str(path.parent) for path in found)
        return {
            "GGML_CUDA": "ON",
            "CMAKE_CUDA_ARCHITECTURES": ";".join(architectures),
            "CMAKE_CUDA_COMPILER": str(self.nvcc),
            "CUDAToolkit_ROOT": str(self.root),
            "CMAKE_CUDA_FLAGS": f"-I{include}",
            "CUDA_cuda_driver_LIBRARY": str(driver),
            "CUDA_cublas_LIBRARY": str(cublas),
            "CUDA_cublasLt_LIBRARY": str(cublas_lt),
            "CMAKE_INSTALL_RPATH": ";".join(["$ORIGIN", *folders]),
        }

    def _make_stub(self) -> Path | None:
        """A library in the cache that has the names of the driver's functions, to link against.

        A program that was linked with it loads the machine's own libcuda.so.1. None where there is
        no cuda.h, or no C compiler that works.
        """
        headers = [*self.root.glob("targets/*/include/cuda.h"), self.root / "include/cuda.h"]
        header = next((path for path in headers if path.is_file()), None)
        compiler = shutil.which(os.environ.get("CC") or "cc")
        if header is None or compiler is None:
            return None
        target = cache_dir("cuda-stub") / f"{'.'.join(map(str, self.version))}-libcuda.so"
        if target.is_file():
            return target
        names = sorted(set(re.findall(r"\bcu[A-Z]\w*", header.read_text(errors="replace"))))
        with tempfile.TemporaryDirectory() as tmp:
            source, built = Path(tmp, "libcuda.c"), Path(tmp, "libcuda.so")
            source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
            command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source)]
            if _output([*command, "-o", str(built)]).returncode:
                return None
            with atomic_file(target, force=True, cure=SET_CACHE) as stub:
                shutil.copyfile(built, stub)
        return target

    def _library_folders(self) -> list[Path]:
        return [*sorted(self.root.glob("targets/*/lib")), self.root / "lib64", self.root / "lib"]

    def _packages(self) -> Iterator[Path]:
        """Directories of NVIDIA's Python packages for this CUDA.

        They are nvidia/cu13, and for CUDA 12 nvidia/cublas.
        """
        major = self.version[0]
        for folder in filter(None, sys.path):
            for path in (Path(folder, "nvidia", f"cu{major}"), Path(folder, "nvidia/cublas")):
                if (path / f"lib/libcublas.so.{major}").is_file():
                    yield path

    def _cublas_package(self) -> str:
        """Name of NVIDIA's Python package with cuBLAS."""
        major = self.version[0]
        return "nvidia-cublas" if major >= CUDA_WITHOUT_SUFFIX else f"nvidia-cublas-cu{major}"


def find() -> Toolkit:
    """The toolkit of the first nvcc that is found. Raises UserError where there is none.

    The order is $CUDACXX, the PATH, $CUDA_PATH, $CUDA_HOME, /usr/local/cuda.
    """
    roots = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), DEFAULT_ROOT]
    folders = [os.environ.get("PATH", ""), *(str(Path(root, "bin")) for root in roots if root)]
    choice = os.environ.get("CUDACXX") or "nvcc"
    nvcc = shutil.which(choice, path=os.pathsep.join(folders))
    if nvcc is None:
        raise UserError(
            f"missing: {choice}", "install the CUDA toolkit, or set CUDACXX to the path of nvcc"
        )
    return Toolkit(Path(nvcc), _root(nvcc), _version(nvcc))


def _root(nvcc: str) -> Path:
    """The toolkit's directory as nvcc itself names it.

    What is on the PATH may be a link or a script.
    """
    output = _output([nvcc, "--dryrun", "-x", "cu", os.devnull]).stderr
    found = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE)
    return Path(found[1].strip() if found else Path(nvcc).resolve().parent.parent).resolve()


def _version(nvcc: str) -> tuple[int, int]:
    found = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]).stdout)
    if not found:
        raise UserError(
            f"{nvcc} does not tell its version", "set CUDACXX to the path of a working nvcc"
        )
    return int(found[1]), int(found[2])


def _gpu_architectures() -> list[str]:
    """Architectures of the GPUs that the driver sees."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=WSL_FOLDER)
    if smi is None:
        return []
    output = _output([smi, "--query-gpu=compute_cap", "--format=csv,noheader"]).stdout
    return [major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", output, re.MULTILINE)]


def _output(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")
