"""A model that stays loaded while contexts are opened, filled and decoded from: a worker process.

lane = Worker("kv", {"file": "kv.gguf", "gpu_layers": -1}, module="lane")
lane.ask(do="open", context=32768, batch=1, ubatch=2048, unified=True)
lane.ask(do="begin", force="none")
lane.ask(do="fill", start=0, end=2048)          # then 2048 to 8192, and so on
lane.ask(do="steps", n=32)                      # taken back afterwards
"""

from __future__ import annotations

import numpy as np

from mod_export.benchmark.measure import TAIL_STEPS
from mod_export.benchmark.processes import prompt_tokens, serve
from mod_export.benchmark.worker import Variant
from mod_export.runtime.llama import MoDLlama

CHUNK = 2048  # tokens of a batch


class Lane(Variant):
    """A model with one context at a time."""

    def __init__(self, file: str, gpu_layers: int, threads: int | None = None, chunk: int = CHUNK):
        self.llm = MoDLlama(
            file,
            n_ctx=256,
            n_batch=256,
            n_ubatch=256,
            flash_attn=True,
            type_k=1,
            type_v=1,
            n_gpu_layers=gpu_layers,
            threads=threads,
        )
        self.chunk = chunk
        self.context, self.tokens, self.seen = 0, [], {}

    @classmethod
    def from_setup(cls, **setup) -> Lane:
        return cls(**setup)

    def open(self, context: int, batch: int, ubatch: int, unified: bool) -> dict:
        """Replace the context by an empty one with room for `batch` sequences and their tails."""
        tokens = context + TAIL_STEPS
        self.llm.new_context(
            n_ctx=batch * -(-tokens // 256) * 256,
            n_batch=max(self.chunk, ubatch),
            n_ubatch=ubatch,
            n_seq_max=batch,
            kv_unified=unified,
            swa_full=False,
        )
        self.tokens = [prompt_tokens(self.llm, "", tokens, seq, batch) for seq in range(batch)]
        return {}

    def begin(self, force: str) -> dict:
        """Empty the context; from now on units are forced, or decide (`none`)."""
        if self.llm.units:
            self.llm.force = force
        return self.clear()

    def fill(self, start: int, end: int) -> dict:
        """Read the tokens from start to end of every sequence's prompt; ms of each chunk."""
        self.context = end
        chunks = [
            self.prefill(seq, at, min(self.chunk, end - at))
            for seq in range(len(self.tokens))
            for at in range(start, end, self.chunk)
        ]
        return {
            "tokens": (end - start) * len(self.tokens),
            "ms": [sum(chunk["ms"]) for chunk in chunks],
            "activation": float(np.mean([chunk["activation"] for chunk in chunks])),
            "perf": chunks[-1]["perf"],
        }

    def steps(self, n: int) -> dict:
        """Decode 1 + n tokens of every sequence and take them back; the first is not timed."""
        answer = self.decode(0, 1 + n)
        self.rewind()
        return answer | self.state()


if __name__ == "__main__":
    serve(Lane.from_setup)
