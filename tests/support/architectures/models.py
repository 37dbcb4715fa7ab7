"""Write a tiny random GGUF file of each architecture, with upstream's own test of architectures.

    models = write(folder)            # [Model(name="llama", architecture="llama", ...), ...]
    models = write(folder, ["llama", "gemma4-e"])

The program is built once against the stock library, in seconds, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mod_export.common.files import atomic_file
from mod_export.common.paths import cache_dir
from mod_export.llamacpp import build as llama_build
from mod_export.llamacpp import source as llama_source

HERE = Path(__file__).resolve().parent
UPSTREAM = "tests/test-llama-archs.cpp"
# Two layers would be too few to route some of them, and wide ones would cost time.
REPLACED = {
    "static gguf_context_ptr get_gguf_ctx(": (
        "static uint32_t N_LAYER = 8;\nstatic gguf_context_ptr get_gguf_ctx("
    ),
    "uint32_t n_layer = 2;": "uint32_t n_layer = N_LAYER;",
    "uint32_t n_embd  = 256;": "uint32_t n_embd  = 128;",
    "uint32_t n_ff    = 384;": "uint32_t n_ff    = 192;",
}
FLAGS = ["-std=c++17", "-O1", "-ffunction-sections", "-Wl,--gc-sections"]
SEED, STDEV, N_LAYER = 1, 0.1, 8
# names of files with recurrent layers that can have routers
HYBRIDS = (
    *("qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "granitehybrid", "jamba", "plamo2"),
    *("falcon-h1", "nemotron_h", "nemotron_h_moe", "kimi-linear", "bailingmoe3", "minimax-01"),
)


@dataclass(frozen=True)
class Model:
    """A file that was written, and what llama.cpp says of its layers.

    n_swa: sliding window in tokens, 0 where there is none
    swa_type: enum llama_swa_type
    sliding, recurrent, without_kv, ffn_only: layers
    both: the recurrent layers attend as well
    """

    path: Path
    name: str
    architecture: str
    n_layer: int
    n_embd: int
    n_swa: int
    swa_type: int
    alibi: bool
    sliding: tuple[int, ...]
    recurrent: tuple[int, ...]
    without_kv: tuple[int, ...]
    ffn_only: tuple[int, ...]
    both: bool

    @property
    def full(self) -> tuple[int, ...]:
        """The layers with full attention and K/V that they alone read."""
        other = {*self.sliding, *self.without_kv, *self.ffn_only}
        other |= set() if self.both else set(self.recurrent)
        layers = [layer for layer in range(self.n_layer) if layer not in other]
        return tuple(layers[:-1] if self.without_kv else layers)  # later layers read the last one's


def write(
    folder: Path,
    names: list[str] | None = None,
    n_layer: int = N_LAYER,
    exact: bool = False,
    stdev: float = STDEV,
) -> list[Model]:
    """Write the files of the given names, or of all architectures that llama.cpp can make.

    n_layer: the layers of a model; some architectures have a number of their own. Unless `exact`,
        a model has fewer where its last layer would be a sliding one.
    stdev: of the weights

    Those that llama.cpp cannot make are left out. A tensor depends on its name only, so that a
    model with fewer layers is the same model without its last layers.
    """
    command = [str(_program()), str(folder), str(SEED), str(stdev), str(n_layer), str(int(exact))]
    command += names or []
    # The program is built against the stock library, and runs on no other.
    env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "LD_PRELOAD")}
    env["GGML_NO_BACKTRACE"] = "1"
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    (folder / "generate.log").write_text(result.stderr)
    models = []
    for line in map(json.loads, result.stdout.splitlines()):
        if "n_layer" in line:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items()}
            models.append(Model(path=folder / f"{line['name']}.gguf", **fields))
    return models


def _program() -> Path:
    """The built program; it is built where the cache has none of this key."""
    source = llama_source.source_dir(stock=True) / llama_source.LLAMA_CPP
    lib = llama_build.build(stock=True)
    code = (source / UPSTREAM).read_text(encoding="utf-8")
    for old, new in REPLACED.items():
        assert code.count(old) == 1, f"{UPSTREAM} has no single {old!r}"
        code = code.replace(old, new)
    compiler = llama_build.compiler("CXX", *llama_build.CXX_COMPILERS) or "c++"
    main = HERE / "generate.cpp"
    key = hashlib.sha256(repr([code, main.read_text(), lib.name, FLAGS, compiler]).encode())
    folder = cache_dir("architectures")
    program = folder / f"generate-{key.hexdigest()[:12]}"
    if program.is_file():
        return program
    for old in folder.glob("generate-*"):
        old.unlink()
    (folder / "archs.cpp").write_text(code, encoding="utf-8")
    command = [compiler, *FLAGS, f"-I{folder}", str(main), str(source / "common/log.cpp")]
    command += [f"-I{source / part}" for part in ("common", "src", "include", "ggml/include")]
    command += [f"-L{lib}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{lib}"]
    with atomic_file(program, force=True) as tmp:
        result = subprocess.run([*command, "-o", str(tmp)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    return program
