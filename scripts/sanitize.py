"""Run the runtime's tests on builds of the patched library with sanitizers.

    python scripts/sanitize.py                      # ThreadSanitizer, then AddressSanitizer
    python scripts/sanitize.py thread -k abort      # one sanitizer, some of the tests
    python scripts/sanitize.py address -- -x        # what follows -- goes to pytest
    python scripts/sanitize.py address --tools      # llama-server and the other tools; no tests

UndefinedBehaviorSanitizer runs together with AddressSanitizer. The builds are cached like any other
build (mod_export/llamacpp/build.py). The interpreter is not instrumented: the sanitizer's runtime
is preloaded, and a report counts where one of its frames lies in libllama or libggml*.

The exit code is 1 where a report counts, where a test fails, or where nothing ran.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mod_export.cli.output import show_messages
from mod_export.common import paths
from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build

ROOT = Path(__file__).resolve().parent.parent
# The tests that drive the library through its C functions (tests/support/c_api.py) run. Those whose
# path has one of these words do other things most of the time.
OTHER_TESTS = ("benchmark", "mod_llama", "synthetic")
# a sanitizer's own memory counts too, and it reserves terabytes of addresses
SKIP = "resident_memory or out_of_memory or fit_into_memory or address_space or all_layers_at_once"
# -O1: frames that can be read. Without NDEBUG: upstream's assertions on
FLAGS = {"CMAKE_BUILD_TYPE": "RelWithDebInfo"}
FLAGS |= {
    f"CMAKE_{lang}_FLAGS_RELWITHDEBINFO": "-O1 -g1 -fno-omit-frame-pointer" for lang in ("C", "CXX")
}
REPORT = re.compile(
    r"^(?:WARNING: ThreadSanitizer: .*|=+\d+=+ ?ERROR: .*|.*: runtime error: .*)$", re.MULTILINE
)
OURS = re.compile(r"vendor/llama\.cpp/|/lib(?:llama|ggml)[\w.-]*\.so")


@dataclass(frozen=True)
class Sanitizer:
    """How to build with it and what to preload; `options`: environment variable -> its value."""

    flags: str
    runtime: str
    options: dict[str, str]
    cmake: dict[str, str]


SANITIZERS = {
    # libgomp is not instrumented: its barriers would be unknown. ggml's own threads are
    "thread": Sanitizer(
        "-fsanitize=thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "exitcode=0 second_deadlock_stack=1"},
        {"GGML_OPENMP": "OFF"},
    ),
    # Python itself leaks by design; the standard library's own bounds are checked too
    "address": Sanitizer(
        "-fsanitize=address,undefined -D_GLIBCXX_ASSERTIONS",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        {},
    ),
}


def build(which: Sanitizer, jobs: int | None, tools: bool = False) -> Path:
    """The library (or the tools) built with the sanitizer, from the cache where it is there."""
    flags = {f"CMAKE_{lang}_FLAGS": which.flags for lang in ("C", "CXX")}
    show_messages(stdout=True)
    return llama_build.build(jobs=jobs, extra=FLAGS | flags | which.cmake, tools=tools)


def preload(which: Sanitizer) -> str:
    """Return the compiler's sanitizer runtime, and its C++ library.

    The library that throws must be known before the first throw.
    """
    compiler, paths = os.environ.get("CXX", "c++").split()[0], []
    for name in (which.runtime, "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not os.path.isabs(paths[-1]):  # the name as it was given
            raise UserError(
                f"{compiler} has no {name}", "set CC and CXX to gcc and g++ of Debian's package g++"
            )
    return " ".join(paths)


def environment(name: str, which: Sanitizer, lib: Path, log: Path, threads: int) -> dict[str, str]:
    """What the tests run with: reports go to files log.PID, suppressions come from scripts/."""
    env = os.environ | {"LD_PRELOAD": preload(which), "LLAMA_CPP_LIB_PATH": str(lib)}
    # numpy's BLAS would bring threads whose locks the sanitizer does not know
    env |= {
        "MOD_EXPORT_TEST_THREADS": str(threads),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }
    suppressions = ROOT / "scripts" / f"sanitize-{name}.supp"
    for variable, value in which.options.items():
        extra = f" suppressions={suppressions}" if suppressions.is_file() else ""
        env[variable] = f"{value} log_path={log}{extra}"
    return env


def findings(log: Path) -> tuple[Counter, Counter]:
    """Reports in our libraries and in others: first line -> how often."""
    ours, others = Counter(), Counter()
    for file in log.parent.glob(f"{log.name}.*"):
        text = file.read_text(errors="replace")
        starts = [m.start() for m in REPORT.finditer(text)] + [len(text)]
        for a, b in zip(starts, starts[1:], strict=False):
            report = text[a:b]
            title = re.sub(r"\(pid=\d+\)|0x[0-9a-f]+|==\d+==", "", report.splitlines()[0]).strip()
            frame = next(
                (line.strip() for line in report.splitlines()[1:] if OURS.search(line)), ""
            )
            (ours if OURS.search(report) else others)[
                f"{title} {re.sub(r'0x[0-9a-f]+', '', frame)}"
            ] += 1
    return ours, others


def test_files() -> list[str]:
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "c_api import" in path.read_text()
    ]
    return [
        str(path.relative_to(ROOT))
        for path in files
        if not any(other in str(path) for other in OTHER_TESTS)
    ]


def run(name: str, jobs: int | None, threads: int, rest: list[str]) -> bool:
    """Build, test, report; whether all is well."""
    which = SANITIZERS[name]
    lib = build(which, jobs)
    log = paths.cache_dir() / "log" / f"sanitize-{name}"
    for old in log.parent.glob(f"{log.name}.*"):
        old.unlink()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        *test_files(),
        *rest,
    ]
    # UndefinedBehaviorSanitizer writes to stderr, which pytest would keep to itself without -s
    with open(f"{log}.stderr", "w") as stderr:
        env = environment(name, which, lib, log, threads)
        code = subprocess.run(command, env=env, cwd=ROOT, stderr=stderr).returncode
    ours, others = findings(log)
    for title, counts in (("in llama.cpp or our code", ours), ("elsewhere", others)):
        print(f"{name}: {len(counts)} findings {title}")
        for line, n in counts.most_common():
            print(f"  {n} x {line}")
    print(
        f"{name}: pytest exit code {code}; full reports: {log}.*"
        if ours or others or code
        else f"{name}: clean"
    )
    return code == 0 and not ours


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sanitizer", nargs="?", choices=[*SANITIZERS, "all"], default="all")
    parser.add_argument("--jobs", type=int, help="compilers at once")
    parser.add_argument("--threads", type=int, default=2, help="of each decode (default: 2)")
    parser.add_argument("-k", metavar="EXPRESSION", help="which tests, as in pytest")
    parser.add_argument("--tools", action="store_true", help="build the tools, and run no tests")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:cut])
    rest = [
        "-k",
        f"({args.k}) and not ({SKIP})" if args.k else f"not ({SKIP})",
        *sys.argv[cut + 1 :],
    ]
    names = list(SANITIZERS) if args.sanitizer == "all" else [args.sanitizer]
    try:
        if args.tools:
            for name in names:
                print(build(SANITIZERS[name], args.jobs, tools=True))
            return 0
        good = [run(name, args.jobs, args.threads, rest) for name in names]
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
