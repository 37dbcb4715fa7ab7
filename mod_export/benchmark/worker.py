"""One variant of a benchmark in a process of its own: a file, a library, a context.

processes.py starts it as `python -m mod_export.benchmark.worker` and has the protocol.
LLAMA_CPP_LIB_PATH chooses the library.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from mod_export.benchmark.processes import prompt_tokens, serve
from mod_export.common.system import forget_peak, resident
from mod_export.errors import UserError

# OpenMP's threads look for work some time after the last piece of it, and would disturb the variant
# that has the next turn.
IDLE_SECONDS = 0.003


@dataclass(frozen=True)
class VariantSetup:
    """What a variant is opened with.

    context: tokens of each prompt. tail: tokens that are decoded after it. batch: sequences.
    chunk: tokens of a prefill's turn. type_k, type_v: ggml types of K and V. unified: whether the
    sequences share one KV stream. force, mod: as those of MoDLlama.
    """

    file: str
    text: str
    context: int
    tail: int
    batch: int = 1
    ubatch: int = 512
    chunk: int = 512
    threads: int | None = None
    flash_attn: bool = True
    type_k: int = 1
    type_v: int = 1
    unified: bool = True
    force: str = "none"
    gpu_layers: int = 0
    mod: str | None = None


class Variant:
    """A model, a context for several sequences and their tails, and the tokens of each sequence."""

    def __init__(self, setup: VariantSetup):
        from mod_export.runtime.llama import MoDLlama

        # llama_cpp.Llama knows one sequence only: this small context gives way to one for several.
        self.llm = MoDLlama(
            setup.file,
            mod=setup.mod,
            n_ctx=256,
            threads=setup.threads,
            n_batch=256,
            n_ubatch=256,
            flash_attn=setup.flash_attn,
            type_k=setup.type_k,
            type_v=setup.type_v,
            n_gpu_layers=setup.gpu_layers,
        )
        tokens = setup.context + setup.tail
        self.llm.new_context(
            n_ctx=setup.batch * -(-tokens // 256) * 256,
            n_batch=setup.chunk,
            n_ubatch=setup.ubatch,
            n_seq_max=setup.batch,
            kv_unified=setup.unified,
            swa_full=False,  # as llama.cpp's own programs: sliding layers keep little
        )
        # Another module tells of a dense file that was given as the MoD file.
        if setup.force != "none" and self.llm.units:
            self.llm.force = setup.force
        self.context = setup.context
        self.tokens = [
            prompt_tokens(self.llm, setup.text, tokens, seq, setup.batch)
            for seq in range(setup.batch)
        ]
        # kind -> active and all tokens of the prompts so far
        self.seen: dict[str, np.ndarray] = {}
        # sequence -> recurrent states after its prompt, which no decoded token can be taken from
        self.states: dict[int, object] = {}

    @classmethod
    def from_setup(cls, **setup) -> Variant:
        """The variant of a request's fields, see VariantSetup."""
        return cls(VariantSetup(**setup))

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
        """Empty the context; from now on the thresholds are shifted."""
        self.llm.clear_cells()
        self.llm.n_tokens, self.seen, self.states = 0, {}, {}
        if shift is not None and self.llm.units and shift != self.llm.shift:
            self.llm.shift = shift
            forget_peak()
        return {}

    def prefill(self, seq: int, start: int, n: int) -> dict:
        """Read some tokens of a sequence's prompt in one batch.

        After the last token of the prompt the first new token is chosen too.
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
            if self.llm.is_hybrid:
                self.states[seq] = self.llm.partial_state(seq)
        return turn | {"activation": self._activation(turn["units"], {})}

    def decode(self, start: int, n: int) -> dict:
        """Decode n steps from position context + start, one token of every sequence in each.

        The first step is not timed.
        """
        at = self.context + start
        steps = [[(seq, i, True) for seq in range(len(self.tokens))] for i in range(at, at + n)]
        self._decode(steps[0])
        turn = self._turn(steps[1:])
        return turn | {"activation": self._activation(turn["units"], turn["units"])}

    def rewind(self) -> dict:
        """Take back what has been decoded after the prompts."""
        for seq in range(len(self.tokens)):
            if state := self.states.get(seq):
                self.llm.put_back(seq, state)
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
        """Decode the batches.

        ms: milliseconds of each batch. units: kind -> [active, seen]. perf: the runtime's counters.
        """
        self.llm.reset_stats()
        ms = [self._decode(step) for step in steps]
        units = {kind: [active, seen] for kind, (seen, active) in self.llm.stats_by_kind().items()}
        perf = self.llm.perf()
        time.sleep(IDLE_SECONDS)
        return {"ms": ms, "units": units, "perf": dataclasses.asdict(perf) if perf else {}}

    def _decode(self, step: list[tuple[int, int, bool]]) -> float:
        """Decode one batch of (sequence, position, whether its logits are wanted); milliseconds."""
        ms = self.llm.decode_rows(
            [(self.tokens[seq][pos], pos, seq, logits) for seq, pos, logits in step]
        )
        self.llm.n_tokens += len(step)
        return ms

    def _best_token(self) -> int:
        return int(self.llm.last_logits().argmax())

    def _activation(self, units: dict, after: dict) -> float:
        """Share of the units' work that these tokens meet, 1 for a dense file.

        The work of a `kv` unit is attention to what is remembered of the whole context. So for that
        kind the tokens of the context count: those of the prompts and of `after`. For other kinds
        the tokens of `units` count.
        """
        counts = dict(units)
        if "kv" in counts:
            counts["kv"] = self.seen.get("kv", 0) + np.array(after.get("kv", [0, 0]))
        shares = {kind: active / seen for kind, (active, seen) in counts.items() if seen}
        weights = {kind: sum(u.kind == kind for u in self.llm.units) for kind in shares}
        if not shares:
            return 1.0
        return sum(shares[kind] * weights[kind] for kind in shares) / sum(weights.values())


if __name__ == "__main__":
    serve(Variant.from_setup)
