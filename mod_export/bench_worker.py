"""One variant of a benchmark in a process of its own: a file, a library, a context length.

Reads a JSON setup line and then one line per run from stdin; answers each with a JSON line on stdout.
Run by bench.py as `python -m mod_export.bench_worker`; the library is chosen by LLAMA_CPP_LIB_PATH.
"""

import json
import os
import sys
import time

from mod_export.errors import UserError


class Variant:
    """A loaded model and the tokens of the text."""

    def __init__(self, file, text, context, decode, threads, ubatch, force):
        from mod_export.runtime import MoDLlama

        n_ctx = -(-(context + decode) // 256) * 256
        self.llm = MoDLlama(file, n_ctx=n_ctx, threads=threads, n_batch=max(2048, ubatch), n_ubatch=ubatch)
        if force != "none" and self.llm.units:  # a dense file by mistake is told of by bench.py
            self.llm.force = force
        tokens = _tokens(self.llm, text)
        if not tokens:
            raise UserError("the text has no tokens", "give a longer --text")
        tokens = (tokens * (-(-(context + decode) // len(tokens))))[: context + decode]
        self.prompt, self.rest = tokens[:context], tokens[context:]

    def describe(self) -> dict:
        llm = self.llm
        return {"units": len(llm.units), "n_ctx_train": llm._model.n_ctx_train(), "n_vocab": llm.n_vocab(),
                "description": llm._model.desc()}

    def run(self, warm_up: bool = False) -> dict:
        """Prefill of the whole prompt, then the text's next tokens one at a time; times in ms."""
        import llama_cpp

        prompt = self.prompt[:64] if warm_up else self.prompt
        rest = self.rest[:4] if warm_up else self.rest
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llm.ctx), False)
        self.llm.n_tokens = 0
        prefill = self._phase([prompt[i : i + self.llm.n_batch] for i in range(0, len(prompt), self.llm.n_batch)])
        decode = self._phase([[token] for token in rest])
        times = sorted(decode["ms"])
        return {"prefill": prefill | {"ms": sum(prefill["ms"])}, "decode": decode | {"ms": times[len(times) // 2]},
                "rss_peak": _peak_rss()}

    def _phase(self, batches: list[list[int]]) -> dict:
        import llama_cpp

        llm, times = self.llm, []
        llm.reset_stats()
        for tokens in batches:
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            start = time.perf_counter()
            code = llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(array, len(tokens)))
            llama_cpp.llama_synchronize(llm.ctx)
            times.append((time.perf_counter() - start) * 1e3)
            if code:
                raise UserError(f"llama_decode returned {code}")
            llm.n_tokens += len(tokens)
        kv = llm.kv()
        return {"ms": times, "tokens": llm.n_tokens, "activation": llm.activation(), "kv_dense": kv.dense,
                "kv_committed": kv.committed, "kv_used": kv.used}


def _tokens(llm, text: str) -> list[int]:
    """The text's tokens; its bytes where the file has no vocabulary."""
    from llama_cpp import LLAMA_VOCAB_TYPE_NONE

    if llm._model.vocab_type() == LLAMA_VOCAB_TYPE_NONE:
        return [byte % llm.n_vocab() for byte in text.encode()]
    return llm.tokenize(text.encode())


def _peak_rss() -> int:
    """Largest resident memory of this process in bytes, the mapped model file included."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def main() -> None:
    # llama.cpp and Python may print; the answers go to a copy of stdout that nothing else writes to
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        variant = Variant(**json.loads(sys.stdin.readline()))
        print(json.dumps(variant.describe()), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(variant.run(**json.loads(line))), file=out, flush=True)
    except UserError as exc:
        print(json.dumps({"error": exc.message, "cure": exc.cure}), file=out, flush=True)


if __name__ == "__main__":
    main()
