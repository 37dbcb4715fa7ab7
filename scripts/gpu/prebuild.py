"""Build here, without a GPU, what scripts/gpu/call runs on an H100 or H200, and pack it.

    scripts/gpu/prebuild               # builds and packs; an interrupted build goes on
    scripts/gpu/prebuild --check       # says whether the package is current; exit code 1: it is not

The package is one archive and a JSON file, in gpu/prebuilt or in --output. It has the patched
library, llama-server, llama-bench and test-backend-ops for sm_90 alone, the Python packages that
torch does not bring, and a part of SmolLM2 with its logits on the CPU. The key of a package is made
from the source, the patches and the scripts that make it.

Only ggml is compiled for CUDA. libllama and the tools know nothing of it: they are those of
`mod-export build --tools`. The sources of ggml lie in the cache and are replaced only where their
content changes, so that after a change of the patches only what reads it is compiled again.
"""

import argparse
import filecmp
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import instances
import model

from mod_export.cli.output import show_messages
from mod_export.common.files import atomic_dir, locked
from mod_export.common.paths import cache_dir
from mod_export.common.text import size
from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import cuda as llama_cuda
from mod_export.llamacpp import source as llama_source

HERE = Path(__file__).parent
OUTPUT = HERE.parent.parent / "gpu/prebuilt"
ARCHITECTURE = "90"
MOST_BYTES = 56 << 20
TOOLS = ("llama-server", "llama-bench")
# What mod_export and llama_cpp import beside numpy, jinja2 and typing_extensions, which come with
# torch. The Python of the GPU machine may not be this one.
PACKAGES = "click filelock gguf psutil pyyaml tqdm diskcache safetensors".split()
PYTHON = ("--python-version", "3.12", "--implementation", "cp")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MAKERS = ("instances.py", "model.py", "prebuild.py", "trim.cmake")
ARCHIVE, ABOUT = "prebuilt.tar.gz", "prebuilt.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder of the package")
    parser.add_argument("--check", action="store_true", help="only say whether it is current")
    parser.add_argument("--jobs", type=int, default=llama_build.default_jobs())
    args = parser.parse_args()
    show_messages(stdout=True)
    try:
        if (current := is_current(args.output)) or args.check:
            print(
                f"the package in {args.output} is {'' if current else 'not '}that of this checkout"
            )
            return 0 if current else 1
        tools = llama_build.build(tools=True, jobs=args.jobs)
        work = cache_dir("gpu")
        with locked(work, lambda: print("another process builds; waiting for it", flush=True)):
            compile_ggml(work, args.jobs)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        pack(args.output, [tools, work / "tree/bin"], packages=True)
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


def key() -> str:
    """Hash of what a package is made from: the source, the patches and the scripts that make it."""
    digest = hashlib.sha256(llama_source.patches_digest(tools=True).encode())
    for name in MAKERS:
        digest.update(name.encode() + (HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def is_current(package: Path) -> bool:
    about = package / ABOUT
    return about.is_file() and json.loads(about.read_text())["key"] == key()


def flags(work: Path) -> dict[str, str]:
    """The cmake options: those of `mod-export build --cuda`, and the chosen kernels."""
    toolkit = llama_cuda.find()
    return (
        llama_build.FLAGS
        | llama_build.RPC_FLAGS
        | toolkit.flags(toolkit.architectures(ARCHITECTURE))
        | {
            "LLAMA_BUILD_COMMIT": llama_source.read_pin().commit[:9],
            "CMAKE_CUDA_ARCHITECTURES": f"{ARCHITECTURE}-real",
            "GGML_CUDA_FA_QUANTS": "f16-f16",
            "GGML_NATIVE": "OFF",  # for the processor of another machine
            "CMAKE_PROJECT_ggml_INCLUDE": str(HERE / "trim.cmake"),
            "MOD_INSTANCES": str(work / "instances"),
            # an instance that is neither compiled nor a stub ends the build, not a run
            "CMAKE_SHARED_LINKER_FLAGS": "-Wl,-z,defs",
        }
    )


def compile_ggml(work: Path, jobs: int) -> None:
    """Build in work/tree, whose folder bin has ggml's libraries and test-backend-ops then."""
    source, tree = work / "source", work / "tree"
    sync(llama_source.source_dir() / llama_source.LLAMA_CPP, source)
    instances.write(source / "ggml/src/ggml-cuda/template-instances", work / "instances")
    configure = ["cmake", "-S", source, "-B", tree, "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in flags(work).items()]
    for command in (configure, ["ninja", "-C", tree, "-j", str(jobs), "ggml"]):
        if subprocess.run(command).returncode:
            raise UserError("the build failed", "see the words of the compiler above")
    compile_tests(source, tree / "bin")


def sync(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`. Files of the same content keep their times."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif not copy.is_file() or not filecmp.cmp(path, copy, shallow=False):
            shutil.copyfile(path, copy)
    for copy in sorted(target.rglob("*"), reverse=True):
        if not (source / copy.relative_to(target)).exists():
            copy.rmdir() if copy.is_dir() else copy.unlink()


def compile_tests(source: Path, lib: Path) -> None:
    """Compile test-backend-ops alone; cmake would build a great deal more for it."""
    target = lib / "test-backend-ops"
    if target.is_file() and target.stat().st_mtime > (lib / "libggml.so").stat().st_mtime:
        return
    command = [llama_build.compiler("CXX", *llama_build.CXX_COMPILERS), "-std=c++17", "-O1"]
    command += [f"-I{source}/ggml/include", f"{source}/tests/test-backend-ops.cpp", f"-L{lib}"]
    command += ["-lggml", "-lggml-cpu", "-lggml-base", "-Wl,-rpath,$ORIGIN"]
    # cuBLAS and the driver are found at run time
    command += ["-Wl,--allow-shlib-undefined", "-pthread", "-o", str(target)]
    if subprocess.run(command).returncode:
        raise UserError("test-backend-ops does not compile", "see the compiler's words above")


def pack(package: Path, folders: list[Path], packages: bool) -> None:
    """Write the archive of libraries and programs, and what is said of it.

    folders: of builds; of two files of one name the later is taken. packages: whether the Python
    packages go along; a rehearsal takes those of this Python.
    """
    with (
        tempfile.TemporaryDirectory() as tmp,
        atomic_dir(package, force=True, markers=(ABOUT,)) as out,
    ):
        content = Path(tmp)
        (content / "lib").mkdir()
        for folder in folders:
            for name in ("lib*.so", *TOOLS, "test-backend-ops"):
                for path in folder.glob(name):
                    shutil.copy2(path, content / "lib")
        for path in (content / "lib").iterdir():
            subprocess.run(["strip", "--strip-unneeded", path], check=True)
        shutil.copytree(llama_source.source_dir() / "llama_cpp", content / "site/llama_cpp")
        if packages:
            install(content / "site")
        model.write(content / "model")
        with tarfile.open(out / ARCHIVE, "w:gz") as archive:
            archive.add(content, ".")
        about = describe(content, out / ARCHIVE)
        (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        print("".join(f"{name:16} {size(n):>10}\n" for name, n in about["bytes"].items()), end="")
        if about["bytes"][ARCHIVE] > MOST_BYTES:
            raise UserError(f"the package has more than {size(MOST_BYTES)}", "leave something out")


def describe(content: Path, archive: Path) -> dict:
    """What the JSON file says: the key, the toolkit, the sizes, the sum."""
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in sorted(content.iterdir())
    }
    cuda = (content / "lib/libggml-cuda.so").is_file()
    return {
        "key": key(),
        "patches": llama_source.patches_digest(),
        "cuda": list(llama_cuda.find().version) if cuda else None,
        "architecture": ARCHITECTURE if cuda else None,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "bytes": sizes | {ARCHIVE: archive.stat().st_size},
    }


def install(site: Path) -> None:
    """Install PACKAGES for the Python of the GPU machine."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--no-compile", "--target", str(site), *PYTHON]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    command += ["--constraint", str(HERE.parent / "constraints.txt"), *PACKAGES]
    if subprocess.run(command).returncode:
        raise UserError(f"pip cannot install {' '.join(PACKAGES)}", "check the network")


if __name__ == "__main__":
    sys.exit(main())
