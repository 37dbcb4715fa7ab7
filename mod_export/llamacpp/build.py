"""Build llama.cpp as shared libraries in the cache, patched or stock, and install llama_cpp.

    lib = build(jobs=2)      # Path of a directory with libllama.so; at once if it was built before
    install(lib)             # llama-cpp-python x.y.z+mod into the running Python's environment
    stock_lib()              # the unpatched library beside it, or None; see build(stock=True)
    build(tools=True)        # Path of a directory with llama-server and other tools
    build(stock=True, tools=True)                # the same of the unpatched source

A build is found again under a key that is made from the hash of the source, the patches, the flags,
the compiler and the CPU. The tools are a build of their own: most people need the library alone,
and a change to the server does not build the library again.
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
from typing import TextIO

from mod_export.common.files import atomic_dir, locked
from mod_export.common.paths import SET_CACHE, cache_dir
from mod_export.common.progress import Progress
from mod_export.common.system import cpu_features, free_memory, usable_cpus
from mod_export.errors import UserError
from mod_export.llamacpp import cuda as llama_cuda
from mod_export.llamacpp import source as llama_source
from mod_export.llamacpp import wheel as llama_wheel

logger = logging.getLogger(__name__)

# These options build the libraries that llama_cpp loads, and nothing that links against curl,
# common or a web page.
FLAGS = {
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
    # a wheel holds no links, so each library is one plain libx.so
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    # a library finds the others beside it
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
}
TOOLS = ("llama-server", "llama-cli", "llama-bench", "llama-perplexity", "llama-quantize")
# The patched builds have this on top: layers on other machines, and the tool that serves them.
RPC_FLAGS = {"GGML_RPC": "ON"}
RPC_TOOL = "ggml-rpc-server"
# These options build the tools. Their web page needs npm or a download, so it is left out.
TOOL_FLAGS = FLAGS | {
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
C_COMPILERS = ("cc", "gcc", "clang")
CXX_COMPILERS = ("c++", "g++", "clang++")
# cmake takes these beside CXXFLAGS.
MORE_FLAGS = ("CFLAGS", "CUDAFLAGS", "LDFLAGS")
MARKER = "build.json"
BYTES_PER_JOB = 2 << 30  # memory that the largest compilation units take
LOGGED_PERCENT = 20  # between two lines of progress in a log


def build(
    jobs: int | None = None,
    cuda: bool = False,
    stock: bool = False,
    force: bool = False,
    cuda_arch: str | None = None,
    sdist: Path | None = None,
    extra: dict[str, str] | None = None,
    tools: bool = False,
) -> Path:
    """Return the directory of the built libraries; build them where the cache has none.

    tools: the directory of the TOOLS instead, which have libraries of their own beside them
    cuda_arch: GPU architectures to compile for ("75,86"); by default those of this machine's GPUs
    sdist: the source distribution; by default the cached one, or pip fetches it
    force: build in any case
    extra: cmake options of a build for another purpose (scripts/sanitize.py); stock_lib() and
        patched_lib() do not find such a build

    Raises UserError naming what is missing, or the last error of the build and its log.
    """
    missing = missing_tools(patching=not llama_source.is_unpacked(stock))
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise UserError(
            f"missing: {', '.join(missing)}", f"install them (Debian: apt-get install {packages})"
        )
    flags = (TOOL_FLAGS if tools else FLAGS) | ({} if stock else RPC_FLAGS)
    flags |= {"LLAMA_BUILD_COMMIT": llama_source.read_pin().commit[:9]}
    if cuda:
        toolkit = llama_cuda.find()
        flags |= toolkit.flags(toolkit.architectures(cuda_arch))
        if tools:
            # the driver's library, which a program's libraries need, may be a stub or another's
            flags |= {"CMAKE_EXE_LINKER_FLAGS": "-Wl,--allow-shlib-undefined"}
    flags |= extra or {}
    if sdist is not None:
        # a wrong file is refused even where nothing has to be built
        llama_source.fetch_sdist(sdist)
    kind = _kind(stock, tools)
    patches = None if stock else llama_source.patches_digest(tools)
    name = f"{kind}-{_key(flags, patches)}"
    lib = cache_dir() / "lib" / name
    with _lock(name):
        if not force and (lib / MARKER).is_file():
            logger.info(f"{_title(kind)} built already: {lib}")
        else:
            source = llama_source.source_dir(stock, sdist) / llama_source.LLAMA_CPP
            _compile(source, lib, flags, jobs or default_jobs(), patches)
    if not extra:
        _last_build_note(kind, cuda).write_text(name)
    return lib


def _kind(stock: bool, tools: bool) -> str:
    """What the names of builds begin with."""
    if tools:
        return "stock-tools" if stock else "tools"
    return "stock" if stock else "patched"


def _title(kind: str) -> str:
    return "the tools of llama.cpp are" if "tools" in kind else "llama.cpp is"


def missing_tools(patching: bool = True) -> dict[str, str]:
    """What a build needs and this machine lacks: tool -> Debian package.

    cuda.py knows what a CUDA build needs besides.
    """
    tools = {"cmake": "cmake", "ninja": "ninja-build"}
    if patching:
        tools["git"] = "git"
    missing = {tool: package for tool, package in tools.items() if not _which(tool)}
    if not compiler("CC", *C_COMPILERS):
        missing["a C compiler"] = "build-essential"
    if not compiler("CXX", *CXX_COMPILERS):
        missing["a C++ compiler"] = "build-essential"
    return missing


def default_jobs() -> int:
    """One job per core, fewer where memory is short."""
    return max(1, min(usable_cpus(), free_memory() // BYTES_PER_JOB))


def stock_lib(cuda: bool = False) -> Path | None:
    """The directory of the stock libraries last built, else None. Needs no compiler."""
    return _last_build("stock", cuda)


def patched_lib(cuda: bool = False) -> Path | None:
    """The directory of the patched libraries last built, else None. Needs no compiler."""
    return _last_build("patched", cuda)


def tools_dir(cuda: bool = False, stock: bool = False) -> Path | None:
    """The directory of the tools last built, None where the patches are others now."""
    folder = _last_build(_kind(stock, tools=True), cuda)
    patches = None if stock else llama_source.patches_digest(tools=True)
    return folder if folder and built_with(folder)["patches"] == patches else None


def built_with(lib: Path) -> dict:
    """What the marker of a build says: name, flags, and the digest of the patches."""
    return json.loads((lib / MARKER).read_text())


def install(lib: Path, force: bool = False) -> str:
    """Install llama_cpp with the libraries of `lib` into the running Python's environment.

    Returns the version, x.y.z+mod. Raises UserError with pip's words where pip fails.
    """
    version = f"{llama_source.read_pin().version}+mod"
    if not force and installed_build() == lib.name:
        logger.info(f"llama-cpp-python {version} is installed already")
        return version
    folder = cache_dir("wheel")
    wheel = llama_wheel.write_wheel(llama_source.source_dir(), lib, version, folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--force-reinstall", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheel.unlink()
    if result.returncode != 0:
        last = (result.stderr.strip() or "?").splitlines()[-1]
        raise UserError(
            f"pip could not install {wheel.name}: {last}",
            "use a Python environment of your own, which pip may write to",
        )
    logger.info(f"installed llama-cpp-python {version}")
    return version


def installed_build() -> str | None:
    """Name of the build that the environment's llama_cpp comes from.

    None for a stock llama_cpp, or where there is none.
    """
    spec = util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        return None
    marker = Path(spec.origin).parent / "lib" / MARKER
    return json.loads(marker.read_text())["name"] if marker.is_file() else None


def installed_for_cuda() -> bool:
    """Whether the environment's llama_cpp was built for GPUs. A stock llama_cpp was not."""
    spec = util.find_spec("llama_cpp")
    lib = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    return (lib / MARKER).is_file() and built_with(lib)["flags"].get("GGML_CUDA") == "ON"


def _which(tool: str) -> str | None:
    """Path of a tool. cmake and ninja may be Python packages, whose commands lie beside Python."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which(tool, path=os.pathsep.join(folders))


def compiler(variable: str, *names: str) -> str | None:
    """Path of the compiler that cmake will take.

    It is the choice of the environment variable, else the first of the names that is there.
    """
    if choice := os.environ.get(variable, "").split():
        return _which(choice[0])
    return next((path for name in names if (path := _which(name))), None)


def _key(flags: dict[str, str], patches: str | None) -> str:
    """Key of a build in the cache: twelve hexadecimal digits.

    patches: their digest, None for the stock source.
    """
    source = patches or llama_source.read_pin().sha256
    compilers = [compiler("CC", *C_COMPILERS), compiler("CXX", *CXX_COMPILERS)]
    if "CMAKE_CUDA_COMPILER" in flags:
        compilers.append(flags["CMAKE_CUDA_COMPILER"])
    versions = [
        subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace").stdout
        for path in compilers
        if path
    ]
    parts = [
        source,
        sorted(flags.items()),
        compilers,
        versions,
        os.environ.get("CXXFLAGS"),
        cpu_features(),
    ]
    parts += [(name, os.environ[name]) for name in MORE_FLAGS if os.environ.get(name)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Let one process at a time build `name`; the next one finds it built."""
    with locked(
        cache_dir("log") / f"{name}.lock",
        lambda: logger.info("another process is building the same; waiting for it"),
    ):
        yield


def _compile(
    source: Path, lib: Path, flags: dict[str, str], jobs: int, patches: str | None
) -> None:
    """Configure and build in the cache, and copy the libraries and tools to `lib`.

    patches: digest of the patches of the source, None for the stock one.

    The tree of an interrupted build stays, and the next build goes on with it.
    """
    tree = cache_dir("tree") / lib.name
    tree.mkdir(exist_ok=True)
    log = cache_dir("log") / f"{lib.name}.log"
    tools = TOOLS if flags["LLAMA_BUILD_TOOLS"] == "ON" else ()
    if tools and "GGML_RPC" in flags:
        tools += (RPC_TOOL,)
    what = "llama.cpp and its tools" if tools else "llama.cpp"
    logger.info(
        f"building {what} with {jobs} {'job' if jobs == 1 else 'jobs'}, some minutes; log: {log}"
    )
    start = time.monotonic()
    cmake = _which("cmake") or "cmake"
    ninja = _which("ninja") or "ninja"
    configure = [cmake, "-S", str(source), "-B", str(tree), "-G", "Ninja"]
    configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
    configure += [f"-D{name}={value}" for name, value in flags.items()]
    with open(log, "w", encoding="utf-8") as file:
        _run(configure, file)
        _run([ninja, "-C", str(tree), "-j", str(jobs), "llama", "ggml", *tools], file)
    with atomic_dir(
        cache_dir("lib") / lib.name, force=True, markers=(MARKER,), cure=SET_CACHE
    ) as tmp:
        for built in [*sorted((tree / "bin").glob("lib*")), *(tree / "bin" / t for t in tools)]:
            shutil.copy2(built, tmp)
        about = {"name": lib.name, "flags": flags, "patches": patches}
        (tmp / MARKER).write_text(json.dumps(about, indent=1))
    shutil.rmtree(tree, ignore_errors=True)
    logger.info(f"built in {time.monotonic() - start:.0f} s: {lib}")


def _run(command: list[str], log: TextIO) -> None:
    """Run a build tool with its output in the log, and show the progress that it tells."""
    tool = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with tool, _terminated(tool), _progress() as show:
        assert tool.stdout is not None
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
    """End the build tool where this process is stopped."""
    try:
        yield
    except BaseException:
        tool.terminate()
        raise


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the [n/m] of a line.

    A terminal shows each step, a log one line for every LOGGED_PERCENT.
    """
    progress = Progress()
    logged = 0

    def show(line: str) -> None:
        nonlocal logged
        step = re.match(r"\[(\d+)/(\d+)\]", line)
        if not step:
            return
        share = 100 * int(step[1]) // int(step[2])
        if progress.terminal:
            progress.show(f"{step[0]} {share} %", share / 100)
        elif share >= logged + LOGGED_PERCENT:
            logged = share
            logger.info(f"{step[0]} {share} %")

    try:
        yield show
    finally:
        progress.clear()


def _last_error(log: Path) -> str:
    """The log's last line that names an error, else its last line."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    pattern = r"\berror\b|\bError\b|Killed|No space left|undefined reference"
    # ninja's own closing words and quoted source lines say less than the compiler's message
    errors = [
        line
        for line in lines
        if re.search(pattern, line) and not re.match(r"ninja:|FAILED:|\d+ \|", line)
    ]
    return (errors or lines or ["no output"])[-1]


def _last_build(kind: str, cuda: bool) -> Path | None:
    """The last build of a kind. It is found without a compiler, from which a key could be made."""
    note = _last_build_note(kind, cuda)
    if not note.is_file():
        return None
    lib = cache_dir() / "lib" / note.read_text()
    return lib if (lib / MARKER).is_file() else None


def _last_build_note(kind: str, cuda: bool) -> Path:
    """The file that holds the name of the last build of a kind, see _kind."""
    return cache_dir() / "log" / f"last-{kind}{'-cuda' if cuda else ''}"
