"""One variant of a benchmark in a process of its own: a file, a library, a context.

Reads a JSON setup line, then a JSON line per command, from stdin; answers each with a JSON line on
stdout. Run by bench_process.py as `python -m mod_export.benchmark.worker`; the library is chosen by
LLAMA_CPP_LIB_PATH.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from mod_export.benchmark.process_helpers import (
    answers,
    forget_peak,
    prompt_tokens,
    resident,
)
from mod_export.errors import UserError

# s; OpenMP's threads look for work some time after the last, and would disturb who has the next
# turn
IDLE = 0.003


class Variant:
    """A model, a context for `batch` sequences of `context` tokens and a tail, and the tokens of
    each sequence.
    """

    def __init__(
        self,
        file: str,
        text: str,
        context: int,
        tail: int,
        batch: int = 1,
        ubatch: int = 512,
        chunk: int = 512,
        threads: int | None = None,
        flash_attn: bool = True,
        type_k: int = 1,
        type_v: int = 1,
        unified: bool = True,
        force: str = "none",
        gpu_layers: int = 0,
    ):
        from mod_export.runtime.llama import MoDLlama

        # llama_cpp.Llama knows one sequence only: this small context gives way to one for `batch`
        # sequences
        self.llm = MoDLlama(
            file,
            n_ctx=256,
            threads=threads,
            n_batch=256,
            n_ubatch=256,
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            n_gpu_layers=gpu_layers,
        )
        self.llm.new_context(
            n_ctx=batch * -(-(context + tail) // 256) * 256,
            n_batch=chunk,
            n_ubatch=ubatch,
            n_seq_max=batch,
            kv_unified=unified,
        )
        if force != "none" and self.llm.units:  # a dense file by mistake is told of by bench.py
            self.llm.force = force
        self.context = context
        self.tokens = [
            prompt_tokens(self.llm, text, context + tail, seq, batch) for seq in range(batch)
        ]
        self.seen: dict[str, np.ndarray] = {}  # kind -> active and all tokens of the prompts so far

    def describe(self) -> dict:
        llm = self.llm
        return {
            "units": len(llm.units),
            "kinds": llm.kinds,
            "n_ctx_train": llm.n_ctx_train,
            "n_vocab": llm.n_vocab(),
            "description": llm.description,
            "vocab": llm.has_vocab,
            "rss": resident("VmRSS"),
        }

    def clear(self, shift: float | None = None) -> dict:
        """An empty context; the thresholds shifted from now on."""
        self.llm.clear_cells()
        self.llm.n_tokens, self.seen = 0, {}
        if shift is not None and self.llm.units and shift != self.llm.shift:
            self.llm.shift = shift
            forget_peak()
        return {}

    def prefill(self, seq: int, start: int, n: int) -> dict:
        """Some tokens of a sequence's prompt in one batch; with the last of them, the first new
        token is chosen.
        """
        end = start + n
        batch = [(seq, i, i == self.context - 1) for i in range(start, end)]
        turn = self._turn([batch])
        for kind, counts in turn["units"].items():
            self.seen[kind] = self.seen.get(kind, 0) + np.array(counts)
        if end == self.context:
            began = time.perf_counter()
            self._best_token()
            turn["sample_ms"] = (time.perf_counter() - began) * 1e3
        return turn | {"activation": self._activation(turn["units"], {})}

    def decode(self, start: int, n: int) -> dict:
        """`n` steps from position context + start, one token of every sequence in each; the first
        is not timed.
        """
        at = self.context + start
        steps = [[(seq, i, True) for seq in range(len(self.tokens))] for i in range(at, at + n)]
        self._decode(steps[0])
        turn = self._turn(steps[1:])
        return turn | {"activation": self._activation(turn["units"], turn["units"])}

    def rewind(self) -> dict:
        """Takes back what has been decoded after the prompts."""
        for seq in range(len(self.tokens)):
            if not self.llm.remove_tail(seq, self.context):
                raise UserError(
                    "the decoded tokens cannot be taken back",
                    "decode fewer than kv_rollback tokens",
                )
        self.llm.n_tokens = self.context * len(self.tokens)
        return {}

    def state(self) -> dict:
        """KV and resident memory in bytes."""
        return {"kv": dataclasses.asdict(self.llm.kv()), "rss_peak": resident("VmHWM")}

    def _turn(self, steps: list[list[tuple]]) -> dict:
        """Decodes the batches. ms: of each; units: kind -> [active, seen]; perf: the runtime's
        counters.
        """
        self.llm.reset_stats()
        ms = [self._decode(step) for step in steps]
        units = {kind: [active, seen] for kind, (seen, active) in self.llm.stats_by_kind().items()}
        perf = self.llm.perf()
        time.sleep(IDLE)
        return {"ms": ms, "units": units, "perf": dataclasses.asdict(perf) if perf else {}}

    def _decode(self, step: list[tuple[int, int, bool]]) -> float:
        """One batch of (sequence, position, whether its logits are wanted); ms."""
        ms = self.llm.decode_rows(
            [(self.tokens[seq][pos], pos, seq, logits) for seq, pos, logits in step]
        )
        self.llm.n_tokens += len(step)
        return ms

    def _best_token(self) -> int:
        return int(self.llm.last_logits().argmax())

    def _activation(self, units: dict, after: dict) -> float:
        """Share of units' work that these tokens meet, 1 for a dense file.

        A `kv` unit's work is attention to what is remembered of the whole context, so for that kind
        the context's
        tokens count: the prompts', and those of `after`. For the others, the tokens of `units`.
        """
        counts = dict(units)
        if "kv" in counts:
            counts["kv"] = self.seen.get("kv", 0) + np.array(after.get("kv", [0, 0]))
        shares = {kind: active / seen for kind, (active, seen) in counts.items() if seen}
        weights = {kind: sum(u.kind == kind for u in self.llm.units) for kind in shares}
        return (
            sum(shares[k] * weights[k] for k in shares) / sum(weights.values()) if shares else 1.0
        )


def serve(make) -> None:
    """Reads the setup, then commands: {"do": name of a method, and its arguments}.

    With layers on a GPU each answer tells the GPU memory that this process has taken so far, in
    bytes: `vram`.
    """
    answer = answers()
    try:
        setup = json.loads(sys.stdin.readline())
        during, vram = _metered(setup.get("gpu_layers", 0))
        worker = during(make, **setup)
        answer(worker.describe() | vram())
        for line in sys.stdin:
            command = json.loads(line)
            answer(during(getattr(worker, command.pop("do")), **command) | vram())
    except UserError as exc:
        answer({"error": exc.message, "cure": exc.cure})
    except Exception as exc:  # a bug: its one line is all that the user sees of this process
        answer({"error": f"{type(exc).__name__}: {exc}", "cure": ""})


def _metered(gpu_layers: int) -> tuple[Callable, Callable]:
    """A function that calls another, and one that gives {"vram": what such calls have taken}, if
    there is a GPU.
    """
    if not gpu_layers:
        return lambda f, **kwargs: f(**kwargs), dict
    from mod_export.runtime.devices import GpuMemoryMeter

    meter = GpuMemoryMeter()
    return meter.during, lambda: {"vram": meter.used}


if __name__ == "__main__":
    serve(Variant)
