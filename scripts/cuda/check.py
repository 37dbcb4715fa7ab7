#!/usr/bin/env python3
"""Compile the CUDA files of patches/ for every supported architecture; no GPU is needed.

    python scripts/cuda/check.py                             # all files, all architectures
    python scripts/cuda/check.py --arch 75,90 mod-route.cu   # one file, two architectures
    python scripts/cuda/check.py --cached --fetch            # what scripts/test runs

`--cublas DIR` names a folder that has include/cublas_v2.h. `--cached` passes over a file that
compiled before with the same sources, nvcc and architectures. `--fetch` gets the headers of cuBLAS
where there are none: NVIDIA's package for CUDA 13 is fetched once (444 MB), and its headers
(0.6 MB) stay in the cache.

The exit code is 1 where a file does not compile, and 2 where nvcc or the headers of cuBLAS are
missing.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from mod_export.common import paths
from mod_export.common.files import atomic_dir
from mod_export.errors import UserError
from mod_export.llamacpp import cuda as llama_cuda
from mod_export.llamacpp import source as llama_source

FOLDER = Path("ggml/src/ggml-cuda")
# ggml-cuda/CMakeLists.txt has the same flags.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-use_fast_math",
    "-extended-lambda",
    "-DGGML_CUDA_USE_GRAPHS",
    "-I..",
    "-I../../include",
]
CUBLAS_VERSION = "13.10.0.20"
CUBLAS_SHA256 = "dcc6d63884c53d07e267ce7e6feac17b2538cebaafec5db865736c3e28e4dc84"


def touched() -> list[str]:
    """Names of the folder's files in the overlay and in the patches."""
    names = [str(path) for path in llama_source.overlay_files()]
    for patch in llama_source.read_series():
        names += re.findall(r"^\+\+\+ b/(.*)$", patch.read_text(), re.MULTILINE)
    files = {Path(name) for name in names}
    return sorted(
        file.name for file in files if file.parent == FOLDER and file.suffix in (".cu", ".cuh")
    )


def gencode(arch: str) -> list[str]:
    # upstream turns 120 into 120a, whose instructions no other architecture has
    arch += "a" if re.fullmatch(r"12\d", arch) else ""
    return ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]


def compile_file(command: list[str], folder: Path, name: str) -> str | None:
    """Return None, or what nvcc said.

    A header is compiled alone, because a header must include what it needs.
    """
    with tempfile.TemporaryDirectory() as tmp:
        source = folder / name
        if source.suffix == ".cuh":
            source = Path(tmp, "header.cu")
            source.write_text(f'#include "{name}"\n')
        command = [*command, f"-I{folder}", "-c", source, "-o", Path(tmp, "out.o")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr + done.stdout


def fetch_cublas() -> Path:
    """The headers of cuBLAS, in the cache."""
    target = paths.cache_dir() / f"cublas-{CUBLAS_VERSION}"
    if target.is_dir():
        return target / "include"
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as tmp,
        atomic_dir(target, force=True) as folder,
    ):
        wanted = Path(tmp, "wanted.txt")
        wanted.write_text(f"nvidia-cublas=={CUBLAS_VERSION} --hash=sha256:{CUBLAS_SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--only-binary=:all:", "--require-hashes", "--dest", tmp, "-r", wanted]
        print(f"fetching the headers of cuBLAS {CUBLAS_VERSION}, 444 MB once", flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["?"])[-1]
            raise UserError(
                f"pip cannot fetch nvidia-cublas {CUBLAS_VERSION}: {reason}", "check the network"
            )
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if "/include/" in name and name.endswith(".h"):
                    (folder / "include").mkdir(exist_ok=True)
                    (folder / "include" / Path(name).name).write_bytes(wheel.read(name))
    return target / "include"


def key(command: list[str], folder: Path, include: Path) -> str:
    """Hash of all that a compilation reads; nvcc's version stands for the toolkit's headers."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((version, command[1:])).encode())
    ggml = folder.parent.parent
    files = [
        *folder.rglob("*.cu*"),
        *folder.rglob("*.h"),
        *folder.parent.glob("*.h"),
        *ggml.glob("include/*.h"),
    ]
    for path in sorted({*files, *include.glob("cublas*.h")}):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def check(names: list[str], archs: str, cublas: Path | None, cached: bool, fetch: bool) -> int:
    """Compile the files `names`, print a line for each and return how many fail."""
    toolkit = llama_cuda.find()
    archs = toolkit.architectures(archs)
    include = cublas / "include" if cublas else toolkit.cublas_include()
    if not include and fetch and toolkit.version[0] == 13:
        include = fetch_cublas()
    if not include or not (include / "cublas_v2.h").is_file():
        raise UserError(
            "missing: cublas_v2.h",
            "install the toolkit's cuBLAS or `pip install nvidia-cublas`, or name the folder "
            "with --cublas",
        )
    folder = llama_source.source_dir() / "vendor/llama.cpp" / FOLDER
    command = [
        str(toolkit.nvcc),
        *FLAGS,
        f"-I{include}",
        *(flag for arch in archs for flag in gencode(arch)),
    ]
    print(f"nvcc {'.'.join(map(str, toolkit.version))}, architectures {', '.join(archs)}")
    done = paths.cache_dir() / "cuda-check" / key(command, folder, include)
    failed = 0
    for name in names:
        if cached and (done / name).is_file():
            print(f"{name:24} ok, as before")
            continue
        start = time.monotonic()
        said = compile_file(command, folder, name)
        failed += said is not None
        print(
            f"{name:24} {'ok' if said is None else 'failed':6} {time.monotonic() - start:6.1f} s",
            flush=True,
        )
        if cached and said is None:
            done.mkdir(parents=True, exist_ok=True)
            (done / name).touch()
        if said:
            print(said.rstrip(), file=sys.stderr)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="FILE", help="some of the touched files; default: all"
    )
    parser.add_argument(
        "--arch", default=",".join(llama_cuda.ARCHITECTURES), help="default: %(default)s"
    )
    parser.add_argument(
        "--cublas", type=Path, metavar="DIR", help="where cuBLAS is, if it is not found"
    )
    parser.add_argument("--cached", action="store_true", help="pass over what compiled before")
    parser.add_argument(
        "--fetch", action="store_true", help="get the headers of cuBLAS where there are none"
    )
    args = parser.parse_args()
    try:
        names = touched()
        if unknown := sorted(set(args.names) - set(names)):
            raise UserError(
                f"not among the touched files: {', '.join(unknown)}", f"they are {', '.join(names)}"
            )
        return (
            1 if check(args.names or names, args.arch, args.cublas, args.cached, args.fetch) else 0
        )
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
