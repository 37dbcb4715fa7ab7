"""What a run takes in memory, measured in a process of its own.

memory.py starts it as `python -m mod_export.benchmark.memory_worker`. processes.py has the
protocol.
"""

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mod_export.benchmark.processes import prompt_tokens, serve
from mod_export.common.system import forget_peak, resident
from mod_export.errors import UserError
from mod_export.formats import gguf_adapter

MADV_DONTNEED = 4  # Linux defines this value.
DECODE_TOKENS = 8  # The tokens follow the prompt, so that the graphs of decode exist too.
# llama.cpp's log of a context
COMPUTE_PATTERN = r"compute buffer size = +([\d.]+) MiB"
KV_PATTERN = r"_cache\w*: size = +([\d.]+) MiB"
NODES_PATTERN = r"max_nodes = (\d+)"  # that a graph has room for
STATE_PATTERN = r"RS buffer size = +([\d.]+) MiB"  # of recurrent layers


class ContextProbe:
    """A model whose contexts are only measured; its log is where llama.cpp tells the sizes.

    mod: routers that are put beside the file.
    """

    def __init__(self, file: str, mod: str | None = None):
        import llama_cpp as llama

        import mod_export.runtime.llama  # noqa: F401  (what a run imports is resident too)
        from mod_export.runtime import bindings
        from mod_export.runtime.assertions import AssertionFailure, guarded
        from mod_export.runtime.log import check_file, load_error

        check_file(file)

        @llama.llama_log_callback
        def keep(_level, text, _data):
            self.log += (text or b"").decode("utf-8", "replace")

        self.llama = llama
        self.file = file
        self.log = ""
        self.process = 0  # bytes that are resident while there is the first context
        self.states = 0  # bytes of recurrent layers, which are really there
        self.nodes = 0  # that a graph has room for
        self.keep = keep  # llama.cpp holds no reference to it
        llama.llama_log_set(keep, ctypes.c_void_p(0))
        params = llama.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        params.n_gpu_layers = 0
        try:
            self.model = guarded(
                lambda: llama.llama_model_load_from_file(os.fsencode(file), params)
            )
        except AssertionFailure as exc:
            raise load_error(file, 0, exc, []) from exc
        if not self.model:
            raise self.failed(f"cannot load {file}")
        if mod is not None:
            routers = os.fsencode(gguf_adapter.locate(mod))
            if bindings.llama_mod_adapter_load(self.model, routers):
                raise self.failed(f"cannot put the routers of {mod} beside {file}")
        self.repacks = "CPU_REPACK model buffer" in self.log

    def context(self, n_ctx: int, ubatch: int, types: Sequence[int]) -> dict:
        """Bytes that a context of this size takes; types: ggml's, of K and V.

        compute: buffers for one output. kv: the complete K/V.
        """
        options = self.llama.llama_context_default_params()
        options.n_ctx = n_ctx
        options.n_batch = options.n_ubatch = ubatch
        options.n_outputs_max = 1
        options.swa_full = False
        options.type_k, options.type_v = types
        options.flash_attn_type = self.llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.log = ""
        context = self.llama.llama_init_from_model(self.model, options)
        if not context:
            raise self.failed(f"cannot create a context of {n_ctx} tokens for {self.file}")
        self.states = self._sum(STATE_PATTERN)
        self.nodes = max(map(int, re.findall(NODES_PATTERN, self.log)), default=0)
        # The allocator may keep what a first context has given back.
        self.process = self.process or resident("VmRSS") - self.states
        self.llama.llama_free(context)
        return {
            "compute": self._sum(COMPUTE_PATTERN),
            "kv": self._sum(KV_PATTERN),
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


class MemoryWorker:
    """The two measurements; each process makes one of them."""

    def describe(self) -> dict:
        return {}

    def probe(
        self, file: str, mod: str | None, contexts: list[int], ubatch: int, types: Sequence[int]
    ) -> dict:
        """What contexts would take, from llama.cpp itself.

        It makes contexts without memory for weights, K/V and compute buffers (`no_alloc`), and says
        how much it would have taken. What is resident then is the process itself. sizes: in the
        order of `contexts`. process: its bytes. states: those of recurrent layers, whatever the
        context. nodes: that a graph has room for. repacks: whether weights are copied into another
        layout.
        """
        model = ContextProbe(file, mod)
        sizes = [model.context(n, ubatch, types) for n in contexts]
        return {
            "sizes": sizes,
            "process": model.process,
            "states": model.states,
            "nodes": model.nodes,
            "n_ctx_train": model.llama.llama_model_n_ctx_train(model.model),
            "repacks": model.repacks,
        }

    def run(
        self,
        file: str,
        mod: str | None,
        n_ctx: int,
        ubatch: int,
        types: Sequence[int],
        threads: int,
        text: str,
    ) -> Iterator[int]:
        """Fill the context with the text's tokens, the last ones one by one.

        Yields how many tokens have been read. The result has bytes: peak resident memory, and as
        `needed` the part of it that the run needs.

        At load llama.cpp maps the whole file, and on some processors copies weights into a layout
        of its own ("repack"). The pages behind such weights are not read again, but stay resident
        until the system wants them back. They are given back here before the run, so that `needed`
        does not hold them.
        """
        from mod_export.runtime.llama import MoDLlama

        llm = MoDLlama(
            file,
            mod=mod,
            n_ctx=n_ctx,
            threads=threads,
            n_batch=ubatch,
            n_ubatch=ubatch,
            type_k=types[0],
            type_v=types[1],
            swa_full=False,
        )
        loaded = resident("VmHWM")
        _release_pages(Path(file))
        # Not the whole text: the tokens of a book would count as memory too.
        tokens = prompt_tokens(llm, text[: 8 * n_ctx], n_ctx)
        prompt = n_ctx - DECODE_TOKENS
        for start in range(0, prompt, ubatch):
            llm.eval(tokens[start : min(start + ubatch, prompt)])
            yield llm.n_tokens
        for token in tokens[prompt:]:
            llm.eval([token])
        kv = llm.kv()
        needed = resident("VmHWM")
        return {
            "needed": needed,
            "peak": max(loaded, needed),
            "kv": kv.committed,
            "kv_used": kv.used,
            "activation": llm.activation(),
            "tokens": llm.n_tokens,
        }


def _release_pages(file: Path) -> None:
    """Give the file's mapped pages back to the page cache; what is read again comes back.

    The peak of resident memory counts from here on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    name = str(file.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(name):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
    forget_peak()


if __name__ == "__main__":
    serve(MemoryWorker)
