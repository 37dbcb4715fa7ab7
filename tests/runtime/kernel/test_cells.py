"""The compact cells of K/V caches (llama_mod_cells) against upstream's class (llama_kv_cells)."""

import os
import subprocess
from pathlib import Path

import llama_cpp

from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import source as llama_source

LIB = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib")
N_OPERATIONS = 100_000
# errors of memory and undefined behaviour end the program
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover"]


def test_random_operations(tmp_path):
    """Both classes say the same after each of many random operations of all methods."""
    root, program = llama_source.source_dir() / llama_source.LLAMA_CPP, tmp_path / "test-mod-cells"
    compiler = llama_build.compiler("CXX", *llama_build.CXX_COMPILERS)
    command = [compiler, *FLAGS, *(f"-I{root}/{folder}" for folder in ("include", "src"))]
    command += [f"-I{root}/ggml/include", f"{root}/tests/test-mod-cells.cpp", f"-L{LIB}"]
    command += ["-lggml-base", f"-Wl,-rpath,{LIB}", "-o", str(program)]
    subprocess.run(command, check=True)
    # the test runner may preload another sanitizer
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([program, str(N_OPERATIONS)], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert f"{N_OPERATIONS} operations: OK" in result.stdout
