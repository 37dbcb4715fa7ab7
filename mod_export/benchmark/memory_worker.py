"""What a run takes, measured in a process of its own; run by memory.py as `python -m
mod_export.benchmark.memory_worker`.

Reads one JSON line from stdin, {"do": "probe" or "run", ...}; answers with JSON lines on stdout,
the last one the result, those before {"read": tokens}.

* probe: llama.cpp makes contexts of the given sizes without memory for weights, K/V and compute
  buffers
  (`no_alloc`), and says how much it would have taken. What is resident then is the process itself.
* run: the real thing, a prompt that fills the context.
"""

import ctypes
import json
import os
import re
import sys
from pathlib import Path

from mod_export.benchmark.process_helpers import answers, forget_peak, prompt_tokens, resident
from mod_export.errors import UserError

MADV_DONTNEED = 4  # of Linux
DECODE = 8  # tokens after the prompt, so that the graphs of decode are there too


class Probe:
    """A model whose contexts are only measured; its log is where llama.cpp tells the sizes."""

    def __init__(self, file: str):
        import llama_cpp as llama

        import mod_export.runtime.llama  # noqa: F401  (what a run imports is resident too)

        @llama.llama_log_callback
        def keep(_level, text, _data):
            self.log += (text or b"").decode("utf-8", "replace")

        self.llama, self.file, self.log, self.keep = llama, file, "", keep
        llama.llama_log_set(keep, ctypes.c_void_p(0))
        params = llama.llama_model_default_params()
        params.no_alloc, params.load_mode, params.n_gpu_layers = True, llama.LLAMA_LOAD_MODE_NONE, 0
        self.model = llama.llama_model_load_from_file(os.fsencode(file), params)
        if not self.model:
            raise self.failed(f"cannot load {file}")
        self.repacks = "CPU_REPACK model buffer" in self.log

    def context(self, n_ctx: int, ubatch: int, kv_type: int) -> dict:
        """Bytes with a context of this size: compute buffers (one output), complete K/V, resident
        process.
        """
        options = self.llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_outputs_max = (
            n_ctx,
            ubatch,
            ubatch,
            1,
        )
        options.type_k = options.type_v = kv_type
        options.flash_attn_type = self.llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.log = ""
        context = self.llama.llama_init_from_model(self.model, options)
        if not context:
            raise self.failed(f"cannot create a context of {n_ctx} tokens for {self.file}")
        process = resident("VmRSS")
        self.llama.llama_free(context)
        return {
            "process": process,
            "compute": self._sum(r"compute buffer size = +([\d.]+) MiB"),
            "kv": self._sum(r"_cache\w*: size = +([\d.]+) MiB"),
        }

    def _sum(self, pattern: str) -> int:
        return round(sum(float(mib) for mib in re.findall(pattern, self.log)) * 2**20)

    def failed(self, what: str) -> UserError:
        from mod_export.runtime.log import reason

        lines = [line for line in self.log.splitlines() if "error" in line or "failed" in line]
        return UserError(
            f"{what}: {reason(lines) or 'llama.cpp refuses it'}",
            "`mod-export inspect` may tell more",
        )


def probe(file: str, contexts: list[int], ubatch: int, kv_type: int) -> dict:
    """What each context takes ("sizes", in the order of `contexts`), n_ctx_train, whether weights
    are repacked.
    """
    model = Probe(file)
    model.context(
        contexts[0], ubatch, kv_type
    )  # the first one leaves some memory with the allocator
    sizes = [model.context(n, ubatch, kv_type) for n in contexts]
    return {
        "sizes": sizes,
        "n_ctx_train": model.llama.llama_model_n_ctx_train(model.model),
        "repacks": model.repacks,
    }


def run(
    file: str, n_ctx: int, ubatch: int, kv_type: int, threads: int, text: str, progress
) -> dict:
    """Fills the context with the text's tokens, the last ones one by one. Bytes: peak RSS, and of
    it what is needed.

    At load llama.cpp maps the whole file, and on some processors copies weights into a layout of
    its own ("repack"). The pages behind such weights are not read again, but stay resident until
    the system wants them back. They are given back here before the run, so that `needed` does not
    hold them.
    """
    from mod_export.runtime.llama import MoDLlama

    llm = MoDLlama(
        file,
        n_ctx=n_ctx,
        threads=threads,
        n_batch=ubatch,
        n_ubatch=ubatch,
        type_k=kv_type,
        type_v=kv_type,
    )
    loaded = resident("VmHWM")
    _release_pages(Path(file))
    tokens = prompt_tokens(
        llm, text[: 8 * n_ctx], n_ctx
    )  # the tokens of a whole book would count too
    prompt = n_ctx - DECODE
    for start in range(0, prompt, ubatch):
        llm.eval(tokens[start : min(start + ubatch, prompt)])
        progress(llm.n_tokens)
    for token in tokens[prompt:]:
        llm.eval([token])
    kv, needed = llm.kv(), resident("VmHWM")
    return {
        "needed": needed,
        "peak": max(loaded, needed),
        "kv": kv.committed,
        "kv_used": kv.used,
        "activation": llm.activation(),
        "tokens": llm.n_tokens,
    }


def _release_pages(file: Path) -> None:
    """The file's mapped pages go back to the page cache; the peak counts from here on, what is read
    comes back.
    """
    libc, name = ctypes.CDLL(None, use_errno=True), str(file.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
    forget_peak()


def main() -> None:
    answer = answers()
    setup = json.loads(sys.stdin.readline())
    try:
        if setup.pop("do") == "probe":
            answer({"result": probe(**setup)})
        else:
            answer({"result": run(**setup, progress=lambda n: answer({"read": n}))})
    except UserError as exc:
        answer({"error": exc.message, "cure": exc.cure})


if __name__ == "__main__":
    main()
