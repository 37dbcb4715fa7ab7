"""Count what a token launches and waits for, on a CPU build of the same graphs; writes counts.json.

    PYTHONPATH=. .venv/bin/python scripts/gpu/count.py

The models have the layers and heads of the plans, and small widths: the graphs have the same nodes.
launches: nodes that compute something, which is an upper bound for a GPU, where some are fused.
waits: graphs, after each of which the host reads scores back.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from plans import KINDS, ROUTED

from mod_export.runtime import bindings
from mod_export.synthetic.routers import SynthesisOptions, routing
from mod_export.synthetic.shape import preset_named
from mod_export.synthetic.write import synth

COUNTS = Path(__file__).parent / "counts.json"
SMALL = {"embd": 512, "ff": 512, "vocab": 2048}
PROMPT, TOKENS = 600, 48
NO_OPS = {"NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE"}
OP_OFFSET = 80  # of the field `op` of ggml_tensor


def main() -> None:
    counts = {}
    with tempfile.TemporaryDirectory() as tmp:
        for shape in ("8b", "1b"):
            for kind in KINDS if shape == "8b" else KINDS[:1]:
                target, dense = Path(tmp, f"{shape}-{kind}.gguf"), Path(tmp, f"{shape}-dense.gguf")
                sizes = replace(preset_named(shape), **SMALL).checked()
                config = routing(
                    sizes.layers, SynthesisOptions(kind, layers=ROUTED), sizes.heads_kv
                )
                synth(target, sizes, "q4_0", config, None if dense.exists() else dense)
                for force in ("none", "active", "inactive"):
                    counts[f"{shape} {kind} segments {force}"] = counted(target, force)
                if kind != "kv":
                    name = f"{shape} {kind} graph active"
                    counts[name] = counted(target, "active", LLAMA_MOD_DECODE="graph")
            counts[f"{shape} dense segments none"] = counted(dense, "none")
    COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


def counted(file: Path, force: str, **env: str) -> dict[str, float]:
    """Count in a process of its own, because the library reads its environment once."""
    command = [sys.executable, __file__, str(file), force]
    return json.loads(subprocess.check_output(command, env=os.environ | env))


def count(file: str, force: str) -> dict[str, float]:
    """Launches and waits of one decoded token."""
    import llama_cpp

    from mod_export.benchmark.processes import prompt_tokens
    from mod_export.runtime.llama import MoDLlama

    lib, launches = bindings._llama._lib, 0
    lib.ggml_op_name.argtypes, lib.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p

    @llama_cpp.ggml_backend_sched_eval_callback
    def seen(tensor, ask, _):
        nonlocal launches
        op = ctypes.c_int.from_address(tensor + OP_OFFSET).value
        launches += ask and lib.ggml_op_name(op).decode() not in NO_OPS
        return False

    llm = MoDLlama(file, n_ctx=256, threads=1)
    llm.new_context(n_ctx=1024, n_batch=512, n_ubatch=512, cb_eval=seen)
    if llm.units:
        llm.force = force
        # a CPU takes one graph of its own for a token, but not in a warm-up; a GPU takes segments
        llama_cpp.llama_set_warmup(llm.ctx, "LLAMA_MOD_DECODE" not in os.environ)
    tokens = prompt_tokens(llm, "", PROMPT + TOKENS)
    llm.eval(tokens[:PROMPT])
    launches, llm_before = 0, llm.perf().graphs if llm.units else 0
    for token in tokens[PROMPT:]:
        llm.eval([token])
    graphs = (llm.perf().graphs - llm_before) / TOKENS if llm.units else 1.0
    return {"launches": round(launches / TOKENS, 1), "waits": round(graphs, 1)}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(count(*sys.argv[1:])))
    else:
        main()
