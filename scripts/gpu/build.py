"""Build both libraries and test-backend-ops; the result is build.json.

An interrupted build goes on at the next call.
"""

import json
import subprocess
import time

from common import REHEARSE, WORK, part, patched_lib, save

from mod_export.errors import UserError
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import source as llama_source


def main() -> bool:
    timed("patched", lambda: llama_build.build(cuda=not REHEARSE))
    timed("test-backend-ops", build_tests)
    timed(
        "stock", lambda: llama_build.build(cuda=not REHEARSE, stock=True)
    )  # last: only bench needs it
    return True


def timed(name: str, build) -> None:
    """Run `build` and note its seconds.

    The seconds of a call that was cut off count too. A call that finds it built adds none.
    """
    start = time.monotonic()
    try:
        build()
    finally:
        took = round(time.monotonic() - start, 1)
        path = WORK / "seconds.json"
        seconds = json.loads(path.read_text()) if path.is_file() else {}
        if took > 2 or name not in seconds:
            seconds[name] = [*seconds.get(name, []), took]
            path.write_text(json.dumps(seconds))
            save("build.json", {"seconds": seconds})


def build_tests() -> None:
    """Compile one file against the built library; cmake would build a great deal more for it."""
    target, root = WORK / "test-backend-ops", llama_source.source_dir() / "vendor/llama.cpp"
    lib = patched_lib()
    if target.is_file() and target.stat().st_mtime > (lib / llama_build.MARKER).stat().st_mtime:
        return
    print("compiling test-backend-ops", flush=True)
    compiler = llama_build.compiler("CXX", "c++", "g++", "clang++")
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        f"-I{root}/ggml/include",
        f"{root}/tests/test-backend-ops.cpp",
    ]
    command += [
        f"-L{lib}",
        "-lggml",
        "-lggml-cpu",
        "-lggml-base",
        f"-Wl,-rpath,{lib}",
        f"-Wl,-rpath-link,{lib}",
    ]
    # cuBLAS and the driver are found at run time
    command += ["-Wl,--allow-shlib-undefined", "-pthread", "-o", f"{target}.tmp"]
    if subprocess.run(command).returncode:
        raise UserError("test-backend-ops does not compile", "see the compiler's words above")
    (WORK / "test-backend-ops.tmp").replace(target)


if __name__ == "__main__":
    part(main, needs_gpu=False)
