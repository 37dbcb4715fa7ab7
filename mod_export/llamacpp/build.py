"""Build llama.cpp, patched or stock, as shared libraries in the cache; install the patched
llama_cpp package.

    lib = build(jobs=2)      # Path of a directory with libllama.so; instant when it was built before
    install(lib)             # llama-cpp-python x.y.z+mod into the running Python's environment
    stock_lib()              # the unpatched library beside it, or None; see build(stock=True)

A build is found again under a key made from the source's hash, the patches, the flags, the compiler
and the CPU.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path

from mod_export.common.files import atomic_dir, locked
from mod_export.common.progress import Progress
from mod_export.common.system import cpu_features, free_memory, usable_cpus
from mod_export.errors import UserError
from mod_export.llamacpp import cuda as llama_cuda
from mod_export.llamacpp import source as llama_source
from mod_export.llamacpp import wheel as llama_wheel

logger = logging.getLogger(__name__)

# the libraries that llama_cpp loads, and nothing that links against curl, common or a web page
FLAGS = dict.fromkeys(["COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP"], "OFF")
FLAGS = {f"LLAMA_BUILD_{name}": value for name, value in FLAGS.items()}
FLAGS |= {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
}
# one plain libx.so for each library (a wheel holds no links), found beside the one that needs it
FLAGS |= {"CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON"}
FLAGS |= {"CMAKE_BUILD_WITH_INSTALL_RPATH": "ON", "CMAKE_INSTALL_RPATH": "$ORIGIN"}
MARKER = "build.json"
BYTES_PER_JOB = 2 << 30  # what the largest compilation units take


def build(
    jobs: int | None = None,
    cuda: bool = False,
    stock: bool = False,
    force: bool = False,
    cuda_arch: str | None = None,
    sdist: Path | None = None,
    extra: dict[str, str] | None = None,
) -> Path:
    """Return the directory of the built libraries, building them where the cache has none (or with
    `force`).

    `cuda_arch`: GPU architectures to compile for ("75,86"), default: those of this machine's GPUs.
    `extra`: cmake options of a build for a purpose of its own (scripts/sanitize.py), which stock_lib()
    and patched_lib() do not find.

    Raises UserError naming what is missing, or the last error of the build and its log.
    """
    missing = missing_tools(patching=not llama_source.is_unpacked(stock))
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise UserError(
            f"missing: {', '.join(missing)}", f"install them (Debian: apt-get install {packages})"
        )
    flags = FLAGS | {"LLAMA_BUILD_COMMIT": llama_source.read_pin().commit[:9]}
    if cuda:
        toolkit = llama_cuda.find()
        flags |= toolkit.flags(toolkit.architectures(cuda_arch))
    flags |= extra or {}
    if sdist is not None:
        llama_source.fetch_sdist(sdist)  # a wrong one is told even where nothing has to be built
    name = f"{'stock' if stock else 'patched'}-{_key(flags, stock)}"
    lib = llama_source.cache_dir() / "lib" / name
    with _lock(name):
        if not force and (lib / MARKER).is_file():
            logger.info(f"llama.cpp is built already: {lib}")
            return lib
        source = llama_source.source_dir(stock, sdist) / "vendor/llama.cpp"
        _compile(source, lib, flags, jobs or default_jobs())
    if not extra:
        _remember(name, cuda, stock)
    return lib


def missing_tools(patching: bool = True) -> dict[str, str]:
    """What a build needs and this machine lacks: tool -> Debian package. For CUDA see
    cuda_toolkit.py.
    """
    tools = {"cmake": "cmake", "ninja": "ninja-build"} | ({"git": "git"} if patching else {})
    missing = {tool: package for tool, package in tools.items() if not _which(tool)}
    if not compiler("CC", "cc", "gcc", "clang"):
        missing["a C compiler"] = "build-essential"
    if not compiler("CXX", "c++", "g++", "clang++"):
        missing["a C++ compiler"] = "build-essential"
    return missing


def default_jobs() -> int:
    """One job per core, fewer where memory is short."""
    return max(1, min(usable_cpus(), free_memory() // BYTES_PER_JOB))


def stock_lib(cuda: bool = False) -> Path | None:
    """The directory of the stock libraries if `build(stock=True)` has made them, else None. Needs
    no compiler.
    """
    return _recall(cuda, stock=True)


def patched_lib(cuda: bool = False) -> Path | None:
    """The directory of the patched libraries last built, else None. Needs no compiler."""
    return _recall(cuda, stock=False)


def install(lib: Path, force: bool = False) -> str:
    """Install llama_cpp with the libraries of `lib` into the running Python; return its version
    (x.y.z+mod).
    """
    version = f"{llama_source.read_pin().version}+mod"
    if not force and installed_build() == lib.name:
        logger.info(f"llama-cpp-python {version} is installed already")
        return version
    folder = llama_source.cache_dir() / "wheel"
    folder.mkdir(exist_ok=True)
    wheel = llama_wheel.write_wheel(llama_source.source_dir(), lib, version, folder)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
    ]
    command += ["--no-deps", "--force-reinstall", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheel.unlink()
    if result.returncode != 0:
        raise UserError(
            f"pip could not install {wheel.name}: {(result.stderr.strip() or '?').splitlines()[-1]}"
        )
    logger.info(f"installed llama-cpp-python {version}")
    return version


def installed_build() -> str | None:
    """Name of the build that the environment's llama_cpp comes from; None for a stock one or none
    at all.
    """
    spec = util.find_spec("llama_cpp")
    marker = Path(spec.origin).parent / "lib" / MARKER if spec and spec.origin else None
    return json.loads(marker.read_text())["name"] if marker and marker.is_file() else None


def _which(tool: str) -> str | None:
    # cmake and ninja may come as Python packages, whose commands lie beside the interpreter
    return shutil.which(
        tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )


def compiler(variable: str, *names: str) -> str | None:
    """Path of the compiler that cmake will take: the environment's choice, else the first that is
    there.
    """
    if choice := os.environ.get(variable, "").split():
        return _which(choice[0])
    return next(filter(None, map(_which, names)), None)


def _key(flags: dict[str, str], stock: bool) -> str:
    source = llama_source.read_pin().sha256 if stock else llama_source.patches_digest()
    compilers = [compiler("CC", "cc", "gcc", "clang"), compiler("CXX", "c++", "g++", "clang++")]
    compilers += [flags["CMAKE_CUDA_COMPILER"]] if "CMAKE_CUDA_COMPILER" in flags else []
    versions = [
        subprocess.run([c, "--version"], capture_output=True, text=True).stdout
        for c in compilers
        if c
    ]
    parts = [
        source,
        sorted(flags.items()),
        compilers,
        versions,
        os.environ.get("CXXFLAGS"),
        cpu_features(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Let one process at a time build `name`; the next one finds it built."""
    folder = llama_source.cache_dir() / "log"
    folder.mkdir(exist_ok=True)
    with locked(
        folder / f"{name}.lock",
        lambda: logger.info("another process is building the same; waiting for it"),
    ):
        yield


def _compile(source: Path, lib: Path, flags: dict[str, str], jobs: int) -> None:
    """Configure and build in a tree beside the cache's libraries; an interrupted build goes on
    where it was.
    """
    tree = lib.parent.parent / "tree" / lib.name
    tree.mkdir(parents=True, exist_ok=True)
    lib.parent.mkdir(exist_ok=True)
    log = lib.parent.parent / "log" / f"{lib.name}.log"
    logger.info(
        f"building llama.cpp with {jobs} {'job' if jobs == 1 else 'jobs'}, some minutes; log: {log}"
    )
    start = time.monotonic()
    configure = [_which("cmake"), "-S", str(source), "-B", str(tree), "-G", "Ninja"]
    configure += [
        f"-DCMAKE_MAKE_PROGRAM={_which('ninja')}",
        *(f"-D{name}={value}" for name, value in flags.items()),
    ]
    with open(log, "w") as file:
        _run(configure, file)
        _run([_which("ninja"), "-C", str(tree), "-j", str(jobs), "llama", "ggml"], file)
    with atomic_dir(lib, force=True, marker=MARKER) as tmp:
        for library in sorted((tree / "bin").glob("lib*")):
            shutil.copy2(library, tmp)
        (tmp / MARKER).write_text(json.dumps({"name": lib.name, "flags": flags}, indent=1))
    shutil.rmtree(tree, ignore_errors=True)
    logger.info(f"built in {time.monotonic() - start:.0f} s: {lib}")


def _run(command: list[str], log) -> None:
    """Run a build tool: its output into the log, its last [n/m] onto the terminal's line."""
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    with subprocess.Popen(command, **pipes) as tool, _terminated(tool), _progress() as show:
        for line in tool.stdout:
            log.write(line)
            show(line)
    if tool.returncode != 0:
        log.flush()
        raise UserError(
            f"building llama.cpp failed: {_last_error(Path(log.name))}", f"see {log.name}"
        )


@contextlib.contextmanager
def _terminated(tool: subprocess.Popen) -> Iterator[None]:
    """Do not leave the build running where we are stopped."""
    try:
        yield
    except BaseException:
        tool.terminate()
        raise


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the [n/m] of a line: on a terminal each, else every fifth part."""
    progress, logged = Progress(), 0

    def show(line: str) -> None:
        nonlocal logged
        step = re.match(r"\[(\d+)/(\d+)\]", line)
        if not step:
            return
        share = 100 * int(step[1]) // int(step[2])
        if progress.terminal:
            progress.show(f"{step[0]} {share} %", share / 100)
        elif share >= logged + 20:
            logged = share
            logger.info(f"{step[0]} {share} %")

    try:
        yield show
    finally:
        progress.clear()


def _last_error(log: Path) -> str:
    """The log's last line that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    pattern = r"\berror\b|\bError\b|Killed|No space left|undefined reference"
    # ninja's own closing words and quoted source lines say less than the compiler's message
    errors = [
        line
        for line in lines
        if re.search(pattern, line) and not re.match(r"ninja:|FAILED:|\d+ \|", line)
    ]
    return (errors or lines or ["no output"])[-1]


def _remember(name: str, cuda: bool, stock: bool) -> None:
    """Note the last build of each sort, so that it can be found without a compiler to make the key
    from.
    """
    _note(cuda, stock).write_text(name)


def _recall(cuda: bool, stock: bool) -> Path | None:
    note = _note(cuda, stock)
    lib = llama_source.cache_dir() / "lib" / note.read_text() if note.is_file() else None
    return lib if lib and (lib / MARKER).is_file() else None


def _note(cuda: bool, stock: bool) -> Path:
    kind = f"{'stock' if stock else 'patched'}{'-cuda' if cuda else ''}"
    return llama_source.cache_dir() / "log" / f"last-{kind}"
