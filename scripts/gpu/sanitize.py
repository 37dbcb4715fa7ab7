"""Run compute-sanitizer's memcheck and racecheck; the result is sanitize.json.

The programs are our operations and a short decode in each way. The model of the decode has three
layers of random weights with attn, ffn and kv units. A rehearsal runs the programs without the
sanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ops
from common import GPU_LAYERS, REHEARSE, THREADS, WORK, part, save

from mod_export.errors import UserError

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # the exit code that says that the sanitizer found something
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def main() -> bool:
    sanitizer = shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *PLACES])
    )
    if sanitizer is None and not REHEARSE:
        raise UserError(
            "missing: compute-sanitizer",
            "install it with the CUDA toolkit, or add its folder to PATH",
        )
    file = tiny_model()
    decode = [sys.executable, __file__, str(file)]
    programs = {
        "operations": (ops.command(), {}),
        "decode, segments": (decode, {}),
        "decode, graph": (decode, {"LLAMA_MOD_DECODE": "graph"}),
    }
    found: dict[str, dict] = {}
    for tool in TOOLS:
        for what, (command, env) in programs.items():
            name = f"{tool}: {what}"
            prefix = [
                sanitizer,
                "--tool",
                tool,
                "--target-processes",
                "all",
                "--error-exitcode",
                str(FOUND),
            ]
            found[name] = result = run(([] if REHEARSE else prefix) + command, env)
            save("sanitize.json", {"runs": found})
            print(
                f"{name}: {result['summary']}, exit {result['exit']}, {result['seconds']} s",
                flush=True,
            )
    return all(run["exit"] == 0 for run in found.values())


def run(command: list[str], env: dict[str, str]) -> dict:
    """Return exit code, seconds, the sanitizer's summary, and the lines of what it found."""
    start = time.monotonic()
    done = subprocess.run(
        command,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = done.stdout.splitlines()
    summary = [line.strip("= ") for line in lines if re.search(r"SUMMARY", line)]
    result = {
        "exit": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "summary": summary,
    }
    marked = [line for line in lines if line.startswith("=========")]
    return result | ({"lines": (marked or lines)[-200:]} if done.returncode else {})


def tiny_model() -> Path:
    from mod_export.synthetic.routers import SynthesisOptions, routing
    from mod_export.synthetic.shape import preset_named
    from mod_export.synthetic.write import synth

    target = WORK / "sanitize.gguf"
    if not target.is_file():
        shape = replace(preset_named("135m"), layers=3, vocab=512)
        options = SynthesisOptions(units="attn+ffn+kv", layers="1-", kv_window=8)
        synth(target, shape, "f16", routing(shape.layers, options, shape.heads_kv))
    return target


def decode(file: str) -> None:
    """Decode a prompt, then some tokens, with cells dropped and freed on the way."""
    from mod_export.benchmark.processes import prompt_tokens
    from mod_export.runtime.llama import MoDLlama

    llm = MoDLlama(
        file, n_ctx=256, n_batch=32, n_ubatch=32, n_gpu_layers=GPU_LAYERS, threads=THREADS
    )
    llm.kv_rollback = 0
    tokens = prompt_tokens(llm, "", 48)
    llm.eval(tokens[:40])
    for token in tokens[40:]:
        llm.eval([token])
    llm.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        decode(sys.argv[1])
    else:
        part(main)
