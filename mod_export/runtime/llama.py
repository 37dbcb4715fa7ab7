"""MoDLlama: llama_cpp.Llama with the routed units' statistics, thresholds, KV figures and
decisions.

Everything of llama_cpp.Llama works as there. Dense files open too, on a stock library as well: they
have no units.

    llm = MoDLlama("mod.gguf")
    llm("Once upon a time", max_tokens=32)
    print(llm.activation(), llm.kv())
"""

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mod_export.benchmark.process_helpers import available_memory, has_vocab
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import bindings  # first: it says what to do where llama_cpp is missing

import llama_cpp  # isort: skip
from llama_cpp import _logger  # isort: skip


GGML_LOG_LEVEL_ERROR = 4  # ggml.h; llama_cpp has no name for it


@dataclass(frozen=True)
class Unit:
    """A routed unit; `threshold` and `activation` (on calibration text) are those of the file."""

    index: int
    layer: int
    kind: str
    threshold: float
    activation: float


@dataclass(frozen=True)
class UnitStats:
    """Tokens that met the unit's router, and those of them that were active."""

    unit: Unit
    seen: int
    active: int

    @property
    def share(self) -> float:
        return self.active / self.seen if self.seen else float("nan")


@dataclass(frozen=True)
class KV:
    """KV memory: cells, and bytes reserved (address space), committed (memory), used, and what
    dense would use.
    """

    cells: int
    cells_used: int
    reserved: int
    committed: int
    used: int
    dense: int


@dataclass(frozen=True)
class Perf:
    """Decodes, tokens and graphs, and where the time went.

    graphs_reused: graphs that were not built again. decode_graphs: those of small batches, which
    are kept;
    decode_resized: those of them built again because the range of KV cells outgrew them. us_*:
    microseconds spent on forming the batches of active tokens, on KV cells, on building graphs, on
    their inputs, on running them, and on reading scores back.
    """

    decodes: int
    tokens: int
    graphs: int
    graphs_reused: int
    decode_graphs: int
    decode_resized: int
    us_route: int
    us_slots: int
    us_build: int
    us_inputs: int
    us_compute: int
    us_read: int


class Stopped(Exception):
    """The evaluation was stopped between two batches because `MoDLlama.stop` was set."""


SURE = 1 << 20  # tokens of context that any machine has lists for
LISTS = 48  # bytes of a cell's place, shift and sequences, in each cache (llama-kv-cells.h)


class MoDLlama(llama_cpp.Llama):
    """llama_cpp.Llama on a MoD (or dense) GGUF file.

    path: the file. n_ctx: context in tokens, 0 for the model's own. threads: for decode and
    prefill, default all
    cores. Flash attention is on by default: without it V is stored transposed, which touches every
    page of the
    KV cache, so that no KV memory is saved. threshold_shift: see `shift`. More arguments as in
    llama_cpp.Llama.

    Raises UserError for a file that is missing, no GGUF or refused by llama.cpp, telling the reason
    it logged, and for a shift that is not finite, or not 0 for a dense model.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        n_ctx: int = 4096,
        threads: int | None = None,
        flash_attn: bool = True,
        threshold_shift: float = 0.0,
        verbose: bool = False,
        **kwargs,
    ):
        _check_file(path)
        _check_context(path, n_ctx)
        if not math.isfinite(threshold_shift):
            raise UserError(f"threshold shift {threshold_shift} is not a number", "for example 0.5")
        self.stop = False
        self._recording: list | None = None
        self._thresholds_changed = False
        self._quiet = not verbose
        threads = threads or len(os.sched_getaffinity(0))
        with self._log() as log:
            try:
                super().__init__(
                    str(path),
                    n_ctx=n_ctx,
                    flash_attn=flash_attn,
                    verbose=verbose,
                    n_threads=threads,
                    n_threads_batch=threads,
                    **kwargs,
                )
            except ValueError as exc:
                raise _load_error(path, n_ctx, exc, log) from exc
        if (
            len(self.input_ids) < self.n_ctx()
        ):  # llama.cpp rounds the context up, llama_cpp.Llama does not know
            self.input_ids = np.zeros(self.n_ctx(), np.intc)
        self.units = self._read_units()
        if threshold_shift:
            try:
                self.set_shift(threshold_shift, reread=False)
            except UserError:
                self.close()
                raise

    def close(self) -> None:
        """Frees the context and the model."""
        if "_stack" in self.__dict__:  # not where __init__ refused the file
            super().close()

    # --- what the file says

    def require_vocab(self) -> None:
        """Raises UserError for a file without a tokenizer, where llama.cpp would abort on text."""
        if not has_vocab(self):
            raise UserError(f"{self.model_path} has no tokenizer", "give a file that has one")

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 text; special: also of the names of special tokens. Raises UserError
        as require_vocab.
        """
        self.require_vocab()
        return super().tokenize(text, add_bos, special)

    def _read_units(self) -> list[Unit]:
        units, raw = [], bindings.llama_mod_unit()
        for i in range(bindings.n_units(self.model)):
            bindings.llama_mod_get_unit(self.model, i, ctypes.byref(raw))
            units.append(
                Unit(i, raw.layer, bindings.KINDS[raw.kind], raw.threshold, raw.activation)
            )
        return units

    @property
    def kinds(self) -> list[str]:
        """The kinds of units that occur, in a fixed order."""
        return [kind for kind in bindings.KINDS if any(u.kind == kind for u in self.units)]

    @property
    def kv_window(self) -> int:
        """Recent window of the kv units in tokens; 0 where there are none."""
        return bindings.llama_mod_kv_window(self.model) if self.units else 0

    @property
    def sink_tokens(self) -> int:
        """First positions of a sequence that are always active; 0 for a dense model."""
        return bindings.llama_mod_n_sink(self.model) if self.units else 0

    # --- thresholds

    @property
    def thresholds(self) -> list[float]:
        """p of each unit now, without the shift."""
        return [bindings.llama_mod_get_threshold(self.ctx, u.index) for u in self.units]

    def set_threshold(self, unit: int, p: float) -> None:
        """Sets p of one unit, 0 < p < 1. The next prompt is read anew with it, as after all changes
        here.
        """
        self._set("threshold", f"threshold {p}", unit, p)

    @property
    def shift(self) -> float:
        """Shift of all thresholds in logit space: a token is active where logit(score) >= logit(p)
        + shift.
        """
        return bindings.llama_mod_get_shift(self.ctx) if self.units else 0.0

    @shift.setter
    def shift(self, value: float) -> None:
        self.set_shift(value)

    def set_shift(self, value: float, reread: bool = True) -> None:
        """Sets the shift; without `reread` for the tokens from now on, what has been read before
        stays as it is.
        """
        changed = self._thresholds_changed
        self._set("shift", f"shift {value}", value)
        self._thresholds_changed = changed or reread

    @property
    def force(self) -> str:
        """ "none": the routers decide; "active": all units run (the dense model); "inactive": none
        does.
        """
        return bindings.FORCES[bindings.llama_mod_get_force(self.ctx)] if self.units else "none"

    @force.setter
    def force(self, value: str) -> None:
        if value not in bindings.FORCES:
            raise UserError(
                f"force {value!r} is unknown", f"use one of {', '.join(bindings.FORCES)}"
            )
        self._set("force", f"force {value}", bindings.FORCES.index(value))

    @property
    def kv_rollback(self) -> int:
        """How many tokens of a tail can be taken back without reading the prompt again."""
        return bindings.llama_mod_get_kv_rollback(self.ctx) if self.units else self.n_ctx()

    @kv_rollback.setter
    def kv_rollback(self, value: int) -> None:
        self._set("kv_rollback", f"kv_rollback {value}", value)

    def _set(self, name: str, what: str, *args) -> None:
        bindings.require()
        code = getattr(bindings, f"llama_mod_set_{name}")(self.ctx, *args)
        if code:
            raise UserError(f"cannot set {what}: {bindings.ERRORS.get(code, f'error {code}')}")
        self._thresholds_changed = True

    # --- what happened

    def stats(self) -> list[UnitStats]:
        """Counters of each unit since the start or the last reset_stats()."""
        out, raw = [], bindings.llama_mod_unit_stats()
        for unit in self.units:
            bindings.llama_mod_get_unit_stats(self.ctx, unit.index, ctypes.byref(raw))
            out.append(UnitStats(unit, raw.n_seen, raw.n_active))
        return out

    def stats_by_kind(self) -> dict[str, tuple[int, int]]:
        """kind -> (tokens seen, of these active), summed over its units."""
        out = {kind: (0, 0) for kind in self.kinds}
        for s in self.stats():
            seen, active = out[s.unit.kind]
            out[s.unit.kind] = (seen + s.seen, active + s.active)
        return out

    def activation(self) -> float:
        """Share of (token, unit) pairs that were active; 1 for a dense model, nan before any token."""
        if not self.units:
            return 1.0
        seen, active = (sum(x) for x in zip(*self.stats_by_kind().values(), strict=True))
        return active / seen if seen else float("nan")

    def reset_stats(self) -> None:
        """Sets all counters to 0."""
        if self.units:
            bindings.llama_mod_reset_stats(self.ctx)

    def perf(self) -> Perf | None:
        """Counters of decodes and graphs; None for a dense model."""
        raw = bindings.llama_mod_perf()
        if not self.units or not bindings.llama_mod_get_perf(self.ctx, ctypes.byref(raw)):
            return None
        return Perf(*(getattr(raw, name) for name, _ in raw._fields_))

    def kv(self, layer: int = -1) -> KV:
        """KV memory of a layer, of all with -1; `dense`: what the tokens now in the context would
        use unrouted.
        """
        raw = bindings.get_kv_stats(self.ctx, layer) if self.units else None
        if raw is None:
            return self._dense_kv()
        return KV(
            raw.n_cells,
            raw.n_used,
            raw.bytes_reserved,
            raw.bytes_committed,
            raw.bytes_used,
            self.n_tokens * raw.bytes_per_cell,
        )

    def _dense_kv(self) -> KV:
        from mod_export.formats.ggml_types import bytes_per_value

        m = self.model
        head = llama_cpp.llama_model_n_embd(m) / llama_cpp.llama_model_n_head(m)
        row = llama_cpp.llama_model_n_layer(m) * llama_cpp.llama_model_n_head_kv(m) * head
        per_token = sum(
            row * bytes_per_value(t)
            for t in (self.context_params.type_k, self.context_params.type_v)
        )
        used, full = int(per_token * self.n_tokens), int(per_token * self.n_ctx())
        return KV(self.n_ctx(), self.n_tokens, full, full, used, used)

    @contextmanager
    def recording(self) -> Iterator[list]:
        """Collects the decisions of what is evaluated inside: a list of (active, score) per batch,
        see `trace`.
        """
        self._recording = []
        try:
            yield self._recording
        finally:
            self._recording = None

    def trace(self) -> tuple[np.ndarray, np.ndarray]:
        """Decisions of the last batch: active (uint8) and router logits (float32), both [n_tokens,
        n_units].
        """
        return bindings.get_trace(self.model, self.ctx)

    # --- llama_cpp.Llama, made safe

    def generate(self, tokens: Sequence[int], **kwargs):
        """As llama_cpp.Llama.generate; after a change of thresholds nothing of the past is reused."""
        if self._thresholds_changed:
            self.reset()
            self._thresholds_changed = False
        return super().generate(tokens, **kwargs)

    def eval(self, tokens: Sequence[int]) -> None:
        """As llama_cpp.Llama.eval. Raises UserError where the context is too small, Stopped after
        `stop` was set.
        """
        tokens = list(tokens)
        if self.n_tokens + len(tokens) > self.n_ctx():
            raise UserError(
                f"{self.n_tokens + len(tokens)} tokens do not fit a context of {self.n_ctx()}",
                "use a larger context or a shorter prompt",
            )
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            # K/V that the tail's predecessors need are gone: they have to be read again
            tokens = self.input_ids[: self.n_tokens].tolist() + tokens
            self.n_tokens = 0
            self._ctx.kv_cache_clear()
        for i in range(0, len(tokens), self.n_batch):
            if self.stop:
                raise Stopped
            self._eval_batch(tokens[i : i + self.n_batch])

    def _eval_batch(self, tokens: list[int]) -> None:
        with self._log() as log:
            try:
                self._decode(tokens)
            except RuntimeError as exc:
                reason = (
                    "no free KV cell" if str(exc).endswith(" 1") else (_reason(log) or str(exc))
                )
                raise UserError(
                    f"llama.cpp cannot decode: {reason}", "use a larger context"
                ) from exc
        if self._recording is not None:
            self._recording.append(self.trace())

    def _decode(self, tokens: list[int]) -> None:
        super().eval(tokens)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token; those of a control token only with `special`."""
        vocab, size = self._model.vocab, 64
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_token_to_piece(vocab, token, buffer, -n, 0, special)
        return buffer.raw[:n]

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return llama_cpp.llama_vocab_is_eog(self._model.vocab, token)

    @contextmanager
    def _log(self) -> Iterator[list[str]]:
        """Keeps llama.cpp's errors instead of printing them; with `verbose` it prints as usual."""
        lines: list[str] = []
        if not self._quiet:
            yield lines
            return

        @llama_cpp.llama_log_callback
        def keep(level, text, _data):
            if level == GGML_LOG_LEVEL_ERROR:
                lines.append((text or b"").decode("utf-8", "replace").strip())

        llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
        try:
            yield lines
        finally:
            llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def _check_file(path: str | os.PathLike) -> None:
    file = Path(path)
    if not file.exists():
        raise UserError(f"{path} does not exist", "check the path")
    if not file.is_file():
        raise UserError(
            f"{path} is not a file",
            "give a GGUF file; `mod-export export` makes one from a directory",
        )
    try:
        with file.open("rb") as f:
            magic = f.read(4)
    except OSError as exc:
        raise UserError(f"cannot read {path}: {exc.strerror}") from exc
    if magic != b"GGUF":
        raise UserError(
            f"{path} is not a GGUF file", "`mod-export export` makes one from a MoD directory"
        )


def _check_context(path: str | os.PathLike, n_ctx: int) -> None:
    """Lists of cells are as long as the context, however little of it is used, and no lack of
    memory is reported.
    """
    if n_ctx <= SURE:
        return
    file = GGUFFile.open(path)
    layers = file.get(f"{file.architecture}.block_count", 0)
    caches = (
        1 + layers
        if f"{file.architecture}.mod.version" in file.keys and isinstance(layers, int)
        else 1
    )
    need, free = n_ctx * caches * LISTS, available_memory()
    if n_ctx >= 1 << 31 or need > free:
        raise UserError(
            f"a context of {n_ctx} tokens takes {need >> 20} MiB for its lists of cells alone, of "
            f"{free >> 20} MiB that are free",
            "use a smaller context",
        )


def _load_error(path, n_ctx: int, exc: ValueError, log: list[str]) -> UserError:
    reason = _reason(log) or str(exc)
    if "context" in str(exc):
        cure = "use a smaller context" if "alloc" in reason else ""
        return UserError(f"cannot create a context of {n_ctx} tokens for {path}: {reason}", cure)
    stock_meets_mod = not bindings.patched() and "wrong number of tensors" in reason
    cure = "a MoD file needs the patched llama.cpp: run `mod-export build`"
    if not stock_meets_mod:
        cure = "make the file again"
    return UserError(f"cannot load {path}: {reason}", cure)


def _reason(log: list[str]) -> str:
    """The line of llama.cpp's log that says what is wrong, without the function's name."""
    lines = [line for line in log if line]
    for mark in (
        "error loading model: ",
        "error loading model hyperparameters: ",
        "error loading model vocabulary: ",
    ):
        lines = [line.split(mark)[-1] for line in lines]
    return lines[0] if lines else ""
