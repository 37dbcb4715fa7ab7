"""MoDLlama: llama_cpp.Llama with statistics, thresholds, KV figures and decisions of the units.

Everything of llama_cpp.Llama works as there. Dense files open too, on a stock library as well: a
dense file has no units.

    llm = MoDLlama("mod.gguf")
    llm("Once upon a time", max_tokens=32)
    print(llm.activation(), llm.kv())
    llm = MoDLlama("base.gguf", mod="routers.gguf")      # routers beside the file of a dense model
"""

import ctypes
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mod_export.common.system import usable_cpus
from mod_export.errors import UserError
from mod_export.formats import gguf_adapter
from mod_export.formats.ggml_types import bytes_per_value
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import LayerKV, checkpoint_room, kv_layers
from mod_export.formats.recurrent_layers import state_bytes
from mod_export.runtime import bindings  # first: it says what to do where llama_cpp is missing
from mod_export.runtime import rpc as rpc_servers
from mod_export.runtime.assertions import AssertionFailure, guarded
from mod_export.runtime.checked_sampler import row_logits
from mod_export.runtime.checkpoints import SEQUENCE, Checkpoints, put_state, take_state
from mod_export.runtime.guard import InputError
from mod_export.runtime.log import (
    check_context,
    check_file,
    decode_error,
    load_error,
    reason,
    routers_error,
)
from mod_export.runtime.opening import RoutersRefusedError, put_routers
from mod_export.runtime.safe_llama import SafeLlama, check_kv_types, check_options
from mod_export.runtime.statistics import KVMemory, PerfCounters, RoutedUnit, UnitStats
from mod_export.units import UNIT_KINDS, kind_of_c_value

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

# What llama_cpp raises for a file that llama.cpp refuses, and for arguments of a wrong type.
OPENING_ERRORS = ValueError, RuntimeError, TypeError, AttributeError, ctypes.ArgumentError
# The number is that of llama-server (--ctx-checkpoints), whose spacing is 8192 tokens because its
# checkpoints may hold as much as a whole state.
CHECKPOINTS, CHECKPOINT_TOKENS = 32, 512
# Words, blanks, digits and letters of one to four bytes.
PROBE_TEXT = "  Two words,\n\n\t12 \u00e9 \u4e16 \U0001f600</s>"
NO_FLASH_ATTENTION = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
# (token, position, sequence, whether its logits are wanted): one row of a batch
Row = tuple[int, int, int, bool]


class StoppedError(Exception):
    """The evaluation was stopped between two batches because `MoDLlama.stop` was set."""


class StateMismatchError(UserError, KeyError):
    """A saved state that does not fit the context, mostly because other thresholds made it.

    llama_cpp.Llama takes the KeyError for a miss of its cache, and so reads the prompt anew.
    """

    __str__ = Exception.__str__  # a KeyError's text would have quotes around it


class MoDLlama(SafeLlama):
    """llama_cpp.Llama on a MoD (or dense) GGUF file.

    path: the file. n_ctx: context in tokens, 0 for the model's own. threads: threads of decode and
    prefill; by default all that this process may use, and fewer while other processes need them
    (see `running_threads`). threshold_shift: see `shift`. More arguments as in llama_cpp.Llama,
    whose names model_path and n_threads stand for path and threads too; type_k and type_v may be
    names, such as "q8_0". rpc: servers of llama.cpp's RPC backend that hold layers, HOST:PORT with
    commas or as a list; all layers, where n_gpu_layers names no number. Copies (copy, pickle) open
    the file again, with the same arguments, thresholds, shift and force.

    mod: routers that are put beside the file of a dense model, as formats.gguf_adapter.locate takes
    them: a file that `export ADAPTER` writes, or an adapter. The model is then the one that has
    them in its file, to the bit.

    checkpoints: how many checkpoints are kept at most, see `eval`; 0 for none. checkpoint_step: the
    tokens from one to the next. checkpoint_bytes: what all of them may take, by default an eighth
    of the dense K/V of the whole context and four times the recurrent states of a sequence, and
    256 MiB at most; the newest is kept in any case.

    Flash attention is on by default. Without it V is stored transposed, which touches every page of
    the KV cache, so that no KV memory is saved, and V cannot be quantised.

    Raises UserError for a file that is missing, no GGUF or refused by llama.cpp, telling the reason
    it logged, for routers of another model, and for a shift that is not finite, or not 0 for a
    dense model.
    """

    context_params: llama_cpp.llama_context_params
    _ctx: _internals.LlamaContext

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        model_path: str | os.PathLike | None = None,
        mod: str | os.PathLike | None = None,
        n_ctx: int = 4096,
        threads: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool = True,
        threshold_shift: float = 0.0,
        rpc: str | Sequence[str] | None = None,
        checkpoints: int = CHECKPOINTS,
        checkpoint_step: int = CHECKPOINT_TOKENS,
        checkpoint_bytes: int | None = None,
        verbose: bool = False,
        **kwargs,
    ):
        path = _one("path", path, "model_path", model_path)
        if path is None:
            raise InputError("no file is named", "give its path")
        check_file(path)
        bindings.check_version()
        if lora_path := kwargs.get("lora_path"):
            check_file(lora_path, is_model=False)
        self.mod = None if mod is None else os.fspath(mod)
        self._routers = None if mod is None else gguf_adapter.locate(mod)
        check_context(path, n_ctx, mod is not None)
        if not math.isfinite(threshold_shift):
            raise UserError(f"threshold shift {threshold_shift} is not a number", "for example 0.5")
        self._checkpoint_bytes = checkpoint_bytes
        self._checkpoints = _checkpoints(checkpoints, checkpoint_step, checkpoint_bytes)
        self._rpc = rpc
        if rpc:
            rpc_servers.connect(rpc)
            kwargs.setdefault("n_gpu_layers", -1)
        self.stop = False
        self._recording: list | None = None
        self._thresholds_changed = False
        self._quiet = not verbose
        threads = _one("threads", threads, "n_threads", n_threads)
        self._adaptive_threads = not threads and not n_threads_batch
        threads = threads or usable_cpus()
        read_file = functools.partial(
            super().__init__,
            str(path),
            n_ctx=n_ctx,
            flash_attn=flash_attn,
            verbose=verbose,
            n_threads=threads,
            n_threads_batch=n_threads_batch or threads,
            **kwargs,
        )

        def open_file() -> None:
            read_file()
            self._check_lora(log)
            if self.has_vocab:  # some assertions fail only where a text is tokenized
                self.tokenize(PROBE_TEXT.encode(), special=True)

        with self.errors_kept() as log:
            try:
                guarded(open_file)
            except UserError:
                raise
            except RoutersRefusedError as exc:
                raise routers_error(self.mod or "", path, log) from exc
            except (*OPENING_ERRORS, AssertionFailure, TemplateError) as exc:
                raise load_error(path, n_ctx, exc, log) from exc
        self._adapt_threads()
        self.units = self._read_units()
        if self.units:
            bindings.warn_of_other_patches()
        if threshold_shift:
            try:
                self.set_shift(threshold_shift, reread=False)
            except UserError:
                self.close()
                raise

    @property
    def _model(self) -> _internals.LlamaModel:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: _internals.LlamaModel) -> None:
        """Put the routers beside the model; llama_cpp.Llama makes the context right after this."""
        self.__dict__["_model"] = model
        if self._routers is not None:
            put_routers(model, self._routers)

    @property
    def running_threads(self) -> int:
        """Threads of the last graph.

        They are fewer than the most while other processes need processors, unless the number was
        given. Attention over a long context adds up in as many parts as there are threads, so the
        last bits of results depend on it.
        """
        return bindings.llama_mod_n_threads(self.ctx) if bindings.patched() else self.n_threads

    def _check_lora(self, log: list[str]) -> None:
        """Raise UserError for a LoRA file that llama.cpp refused.

        llama_cpp looks for None where a refusal is a null pointer, and decoding would read there.
        """
        if self.lora_path and not self._lora_adapter:
            self.close()
            raise UserError(
                f"cannot load the LoRA adapter {self.lora_path}: {reason(log)}",
                "give a LoRA GGUF file of this model",
            )

    # --- what the file says

    @property
    def n_ctx_train(self) -> int:
        """The context in tokens that the model was trained for."""
        return self._model.n_ctx_train()

    @property
    def description(self) -> str:
        """Return llama.cpp's description of the model: architecture, size, type of the weights."""
        return self._model.desc()

    def _read_units(self) -> list[RoutedUnit]:
        units = []
        raw = bindings.llama_mod_unit()
        for i in range(bindings.n_units(self.model)):
            bindings.llama_mod_get_unit(self.model, i, ctypes.byref(raw))
            units.append(
                RoutedUnit(
                    i,
                    raw.layer,
                    kind_of_c_value(raw.kind),
                    raw.threshold,
                    raw.activation,
                    raw.head if raw.head >= 0 else None,
                    raw.window,
                )
            )
        return units

    @property
    def kinds(self) -> list[str]:
        """The kinds of units that occur, in a fixed order."""
        return [kind for kind in UNIT_KINDS if any(u.kind == kind for u in self.units)]

    @property
    def kv_window(self) -> int:
        """Largest recent window of the kv units in tokens; 0 where there are none."""
        return bindings.llama_mod_kv_window(self.model) if self.units else 0

    @property
    def kv_kept(self) -> int:
        """The longest sequence in tokens of which kv units free nothing; 0 where there are none."""
        return self.sink_tokens + self.kv_window + self.kv_rollback if self.kv_window else 0

    @property
    def sink_tokens(self) -> int:
        """First positions of a sequence that are always active; 0 for a dense model."""
        return bindings.llama_mod_n_sink(self.model) if self.units else 0

    # --- thresholds

    @property
    def thresholds(self) -> list[float]:
        """Return the current p of each unit, without the shift."""
        return [bindings.llama_mod_get_threshold(self.ctx, u.index) for u in self.units]

    def set_threshold(self, unit: int | RoutedUnit, p: float) -> None:
        """Set p of one of `units`, or of the unit with this index there, 0 < p < 1.

        The next prompt is read anew, as after every change of a threshold, the shift or the force.
        States that were saved before are refused (load_state).
        """
        index = unit.index if isinstance(unit, RoutedUnit) else unit
        self._set("threshold", f"threshold {p}", index, p)
        self._thresholds_changed = True

    @property
    def shift(self) -> float:
        """Shift of all thresholds, in logit space.

        A token is active where logit(score) >= logit(p) + shift.
        """
        return bindings.llama_mod_get_shift(self.ctx) if self.units else 0.0

    @shift.setter
    def shift(self, value: float) -> None:
        self.set_shift(value)

    def set_shift(self, value: float, reread: bool = True) -> None:
        """Set the shift.

        Without `reread` it holds for the tokens from now on, and tokens that were read stay as they
        are. A state of such tokens cannot be loaded: no other context would compute it.
        """
        self._set("shift", f"shift {value}", value)
        self._thresholds_changed |= reread

    @property
    def force(self) -> str:
        """What decides: the routers ("none"), or a force.

        "active": all units run, which is the dense model. "inactive": no unit runs.
        """
        return bindings.FORCES[bindings.llama_mod_get_force(self.ctx)] if self.units else "none"

    @force.setter
    def force(self, value: str) -> None:
        if value not in bindings.FORCES:
            raise UserError(
                f"force {value!r} is unknown", f"use one of {', '.join(bindings.FORCES)}"
            )
        self._set("force", f"force {value}", bindings.FORCES.index(value))
        self._thresholds_changed = True

    @property
    def is_hybrid(self) -> bool:
        """Whether layers have a recurrent state, from which no token can be taken back."""
        return llama_cpp.llama_model_is_hybrid(self.model)

    @property
    def kv_rollback(self) -> int:
        """How many tokens of a tail can be taken back without reading the prompt again."""
        return bindings.llama_mod_get_kv_rollback(self.ctx) if self.units else self.n_ctx()

    @kv_rollback.setter
    def kv_rollback(self, value: int) -> None:
        self._set("kv_rollback", f"kv_rollback {value}", value)

    @functools.cached_property
    def _gives_back(self) -> bool:
        """Whether K/V are given back, or states written over: a tail may then not be taken back."""
        layers = range(llama_cpp.llama_model_n_layer(self.model) if self.units else 0)
        windows = (bindings.llama_mod_layer_window(self.model, layer) for layer in layers)
        return self.kv_window > 0 or any(windows) or (bool(self.units) and self.is_hybrid)

    def _settings(self) -> dict[str, Any]:
        """What `_set_all` gives to another context of the same file."""
        return {
            "thresholds": self.thresholds,
            "shift": self.shift,
            "force": self.force,
            "kv_rollback": self.kv_rollback,
        }

    def _set_all(self, settings: dict[str, Any]) -> None:
        if not self.units:
            return
        for unit, p in enumerate(settings["thresholds"]):
            self.set_threshold(unit, p)
        for name in ("shift", "force", "kv_rollback"):
            setattr(self, name, settings[name])

    def _set(self, name: str, what: str, *args) -> None:
        bindings.require()
        try:
            code = getattr(bindings, f"llama_mod_set_{name}")(self.ctx, *args)
        except ctypes.ArgumentError:
            raise InputError(f"cannot set {what}: it is of a wrong type", "use numbers") from None
        if code:
            why = bindings.ERRORS.get(code, f"error {code}")
            raise UserError(
                f"cannot set {what}: {why}", "`units` and `thresholds` say what there is"
            )

    # --- what happened

    def stats(self) -> list[UnitStats]:
        """Counters of each unit since the start or the last reset_stats()."""
        out = []
        raw = bindings.llama_mod_unit_stats()
        for unit in self.units:
            bindings.llama_mod_get_unit_stats(self.ctx, unit.index, ctypes.byref(raw))
            out.append(UnitStats(unit, raw.n_seen, raw.n_active))
        return out

    def stats_by_kind(self) -> dict[str, tuple[int, int]]:
        """kind -> (tokens seen, of these active), summed over its units."""
        out = dict.fromkeys(self.kinds, (0, 0))
        for unit in self.stats():
            seen, active = out[unit.unit.kind]
            out[unit.unit.kind] = (seen + unit.seen, active + unit.active)
        return out

    def activation(self) -> float:
        """Share of (token, unit) pairs that were active.

        It is 1 for a dense model, and nan before any token.
        """
        if not self.units:
            return 1.0
        counts = self.stats_by_kind().values()
        seen = sum(kind_seen for kind_seen, _ in counts)
        active = sum(kind_active for _, kind_active in counts)
        return active / seen if seen else float("nan")

    def reset_stats(self) -> None:
        """Sets all counters to 0."""
        if self.units:
            bindings.llama_mod_reset_stats(self.ctx)

    def perf(self) -> PerfCounters | None:
        """Counters of decodes and graphs; None for a dense model."""
        raw = bindings.llama_mod_perf()
        if not self.units or not bindings.llama_mod_get_perf(self.ctx, ctypes.byref(raw)):
            return None
        return PerfCounters(*(getattr(raw, entry[0]) for entry in raw._fields_))

    def kv(self, layer: int = -1) -> KVMemory:
        """KV memory of a layer, or of all layers with -1. Raises InputError for other layers."""
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        if not isinstance(layer, int) or not -1 <= layer < n_layer:
            raise InputError(f"layer {layer!r} does not exist", f"use one from 0 to {n_layer - 1}")
        raw = bindings.get_kv_stats(self.ctx, layer) if self.units else None
        if raw is None:
            return self._dense_kv(layer)
        return KVMemory(
            raw.n_cells,
            raw.n_used,
            raw.bytes_reserved,
            raw.bytes_committed,
            raw.bytes_used,
            self._dense_bytes(self.n_tokens, layer),
        )

    def _dense_kv(self, layer: int) -> KVMemory:
        used = self._dense_bytes(self.n_tokens, layer)
        full = self._dense_bytes(self.n_ctx(), layer)
        return KVMemory(self.n_ctx(), self.n_tokens, full, full, used, used)

    def _dense_bytes(self, n_tokens: int, layer: int = -1) -> int:
        """Bytes of K and V of so many tokens in a dense model, in a layer or with -1 in all.

        Sliding layers of a dense file keep all tokens where the context was made with `swa_full`,
        as llama_cpp.Llama makes it.
        """
        layers = self._kv_layers if layer < 0 else self._kv_layers[layer : layer + 1]
        params = self.context_params
        if params.swa_full and not self.units:
            return int(n_tokens * sum(kv.bytes_per_token for kv in layers))
        streams = 1 if self.units or params.kv_unified else params.n_seq_max
        return streams * int(
            sum(
                kv.dense_bytes(
                    n_tokens // streams,
                    llama_cpp.llama_n_ubatch(self.ctx),
                    params.n_seq_max // streams,
                )
                for kv in layers
            )
        )

    @functools.cached_property
    def _kv_layers(self) -> list[LayerKV]:
        return kv_layers(
            GGUFFile.open(self.model_path),
            bytes_per_value(self.context_params.type_k),
            bytes_per_value(self.context_params.type_v),
        )

    @functools.cached_property
    def _state_bytes(self) -> int:
        return state_bytes(GGUFFile.open(self.model_path)) if self.is_hybrid else 0

    @contextmanager
    def recording(self) -> Iterator[list]:
        """Collect the decisions of the batches that are evaluated inside the block.

        The list gets a pair (active, score) for each batch, as `trace` gives it.
        """
        batches: list = []
        self._recording = batches
        try:
            yield batches
        finally:
            self._recording = None

    def trace(self) -> tuple[np.ndarray, np.ndarray]:
        """Decisions (uint8) and router logits (float32) of the last batch, [n_tokens, n_units]."""
        return bindings.get_trace(self.model, self.ctx)

    # --- llama_cpp.Llama, made safe

    def _before_generation(self, ids: list[int], reset: bool) -> None:
        """Have the prompt read anew after a change of thresholds, else go back to where it differs.

        llama_cpp.Llama would read all of it again where the memory refuses to go back.
        """
        if self._thresholds_changed:
            self.reset()
            self._thresholds_changed = False
        elif reset and self._gives_back:
            # One token is read in any case, for its logits.
            n = min(self.longest_token_prefix(self._input_ids, ids), len(ids) - 1)
            fixed = llama_cpp.llama_memory_seq_pos_min(self._ctx.memory, SEQUENCE)
            if 0 < n <= fixed and (held := self._checkpoints.go_back(self.ctx, n)):
                self._changes += 1
                self.n_tokens, self._requires_eval = held, True

    @functools.cached_property
    def _dense_digest(self) -> str:
        """What a state of a dense file belongs to; the library knows it for MoD files only."""
        return "" if self.units else GGUFFile.open(self.model_path).digest()

    def save_state(self) -> llama_cpp.LlamaState:
        """The tokens, their K/V and what made these, see `load_state`."""
        state = super().save_state()
        state.dense_digest = self._dense_digest
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Go on with the tokens of a state that `save_state` has returned.

        The tokens are not read again, so the context must be one that would compute the same K/V.
        Raises StateMismatchError where another model made the state, or other thresholds, shift,
        force, RoPE parameters, adapters or types of K and V, where the shift changed among its
        tokens, and where the state is damaged or too long for the context. The object is usable
        afterwards.
        """
        if not isinstance(state, llama_cpp.LlamaState):
            raise UserError("this is no state", "give what save_state has returned")
        if getattr(state, "dense_digest", self._dense_digest) != self._dense_digest:
            raise StateMismatchError(
                "cannot load the state: it belongs to another model", "read its tokens again"
            )
        data = (ctypes.c_uint8 * len(state.llama_state)).from_buffer_copy(state.llama_state)
        with self.errors_kept() as log:
            read = llama_cpp.llama_state_set_data(self.ctx, data, len(data))
        n = state.n_tokens
        if not read or read != len(data) or n > self.n_ctx():
            # Cells that the refused state has not touched still belong to the tokens.
            if read or self._last_position() < self.n_tokens - 1:
                self.reset()
            why = reason(log) or "it is damaged, or too long for the context"
            raise StateMismatchError(f"cannot load the state: {why}", "read its tokens again")
        self._changes += 1
        self.input_ids[:n] = state.input_ids[:n]
        if self._logits_all:
            self.scores[:n] = state.scores if len(state.scores) == n else np.nan
        self.n_tokens, self._requires_eval, self._seed = n, True, state.seed
        self._thresholds_changed = False

    def _last_position(self) -> int:
        """The last position of the tokens in the context; -1 for none."""
        return llama_cpp.llama_memory_seq_pos_max(self._ctx.memory, 0)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens like llama_cpp.Llama.eval.

        Where more tokens were taken back than the K/V allow that are left, the context goes back to
        the nearest checkpoint, and the tokens from there on are read again. Checkpoints are made
        before and after each prompt, and every `checkpoint_step` tokens. One that was made with
        other thresholds, shift or force is not used.

        Raises UserError where the context is too small, and StoppedError after `stop` was set.
        """
        self._changes += 1
        pending = self._ids(tokens)
        if self.n_tokens + len(pending) > self.n_ctx():
            raise UserError(
                f"{self.n_tokens + len(pending)} tokens do not fit a context of {self.n_ctx()}",
                "use a larger context or a shorter prompt",
            )
        with self.errors_kept() as log:
            if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
                # The K/V that earlier tokens need are gone.
                held = self._checkpoints.go_back(self.ctx, self.n_tokens)
                if not held:
                    self._ctx.kv_cache_clear()
                pending = self.input_ids[held : self.n_tokens].tolist() + pending
                self.n_tokens = held
            self._checkpoints.cut(self.n_tokens)
            is_prompt = len(pending) > 1 and self.draft_model is None
            if is_prompt:
                self._checkpoint(self.kv_rollback)
            for i in range(0, len(pending), self.n_batch):
                if self.stop:
                    raise StoppedError
                self._eval_batch(pending[i : i + self.n_batch], log)
                self._checkpoint(self._checkpoints.step)
            if is_prompt:
                self._checkpoint(1)

    def _checkpoint(self, gap: int) -> None:
        """Make a checkpoint if the last one is so many tokens back.

        From a checkpoint the context can go back by `kv_rollback` tokens, so it takes the place of
        one that is nearer.
        """
        if self._gives_back and self.n_tokens - self._checkpoints.last >= max(gap, 1):
            if not self._checkpoints:  # The context may be a new one.
                self._checkpoints.max_bytes = self._checkpoint_room()
            self._checkpoints.take(self.ctx, self.n_tokens, self.kv_rollback)

    def _checkpoint_room(self) -> int:
        """Bytes that checkpoints may take in this context."""
        if self._checkpoint_bytes is not None:
            return self._checkpoint_bytes
        return checkpoint_room(self._dense_bytes(self.n_ctx()), self._state_bytes)

    def _eval_batch(self, tokens: list[int], log: list[str]) -> None:
        try:
            self._decode(tokens)
        except RuntimeError as exc:
            raise decode_error(exc, log) from exc
        if self._recording is not None:
            self._recording.append(self.trace())

    def _decode(self, tokens: list[int]) -> None:
        """Run one batch; a subclass may keep its logits elsewhere."""
        llama_cpp.Llama.eval(self, tokens)  # not super(): _eval_batch tells of what it raises

    # --- several sequences in one context; `n_tokens` is then the caller's business

    def new_context(self, **params: Any) -> None:
        """Replace the context by one with other llama_context_params.

        llama_cpp.Llama can make a context for one sequence only. Thresholds, shift, force and
        kv_rollback stay as they are. Raises UserError where llama.cpp refuses the context; the
        former parameters hold then, in an empty context.
        """
        settings = self._settings()
        self._checkpoints.clear()
        wanted = _context_params(self.context_params, params)
        if {"type_k", "type_v", "flash_attn_type"} & params.keys():
            types = {"type_k": wanted.type_k, "type_v": wanted.type_v}
            check_kv_types(self.model_path, types, wanted.flash_attn_type != NO_FLASH_ATTENTION)
        refused = None
        with self.errors_kept() as log:
            self._ctx.close()
            try:
                self._ctx = self._context(wanted)
                self.context_params = wanted
                self.__dict__.pop("_kv_layers", None)  # K and V may have other types now
            except ValueError as exc:
                why = log[0] if log else exc
                refused = UserError(
                    f"cannot create a context of {wanted.n_ctx} tokens: {why}",
                    "use a smaller context",
                )
                self._ctx = self._context(self.context_params)
        self._adapt_threads()
        self._size_buffers()
        self._set_all(settings)
        if refused:
            raise refused

    def _context(self, params: llama_cpp.llama_context_params) -> _internals.LlamaContext:
        return _internals.LlamaContext(model=self._model, params=params, verbose=False)

    def _adapt_threads(self) -> None:
        """Let the number of threads follow the load, unless the caller has chosen it."""
        if self._adaptive_threads and bindings.patched():
            bindings.llama_mod_set_adaptive_threads(self.ctx, True)

    def decode_rows(self, rows: Sequence[Row]) -> float:
        """Decode one batch of rows; the milliseconds that it took.

        Raises InputError for tokens, sequences and numbers of rows that the context does not have,
        and UserError where llama.cpp cannot decode the batch.
        """
        self._ids(row[0] for row in rows)
        most = llama_cpp.llama_n_batch(self.ctx)
        if not 0 < len(rows) <= most:
            raise InputError(f"{len(rows)} rows are no batch", f"give from 1 to {most}")
        for row in rows:
            self._check_sequence(row[2])
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        with self.errors_kept() as log:
            start = time.perf_counter()
            code = llama_cpp.llama_decode(self.ctx, batch)
            llama_cpp.llama_synchronize(self.ctx)
            milliseconds = (time.perf_counter() - start) * 1e3
        llama_cpp.llama_batch_free(batch)
        if code:
            raise decode_error(RuntimeError(f"llama_decode returned {code}"), log)
        return milliseconds

    def sample_row(self, sampler: _internals.LlamaSampler, row: int = -1) -> int:
        """The token that the sampler draws from the logits of a row of the last batch.

        Raises InputError where the row has none.
        """
        row_logits(self._ctx, row, self._n_vocab)
        return sampler.sample(self._ctx, row)

    def clear_cells(self) -> None:
        """Free the KV cells of all sequences."""
        llama_cpp.llama_memory_clear(self._ctx.memory, False)

    def remove_tail(self, sequence: int, start: int = -1) -> bool:
        """Take back a sequence from position `start` on, or all of it.

        False where the library cannot do it. Raises InputError for a sequence that the context does
        not have.
        """
        self._check_sequence(sequence)
        return llama_cpp.llama_memory_seq_rm(self._ctx.memory, sequence, start, -1)

    def partial_state(self, sequence: int) -> ctypes.Array | None:
        """What a sequence needs to end here again, beside what the memory keeps.

        For a model with recurrent states, of which no tail can be taken back: `put_back` it first.
        None for nothing. Raises InputError for a sequence that the context does not have.
        """
        self._check_sequence(sequence)
        return take_state(self.ctx, sequence)

    def put_back(self, sequence: int, state: ctypes.Array) -> bool:
        """Put back a partial state of this sequence; False where the library refuses it."""
        self._check_sequence(sequence)
        return put_state(self.ctx, sequence, state)

    def _check_sequence(self, sequence: int) -> None:
        most = llama_cpp.llama_n_seq_max(self.ctx)
        if not 0 <= sequence < most:
            raise InputError(f"sequence {sequence} does not exist", f"use one from 0 to {most - 1}")

    # --- copies

    def __getstate__(self) -> dict:
        """What __setstate__ makes a copy of: the arguments of llama_cpp.Llama, and our settings."""
        state = super().__getstate__()
        if self._adaptive_threads:  # nobody has chosen a number
            state["n_threads"] = None
        tokenizer = None if self.tokenizer_ is self._vocab else self.tokenizer_
        checkpoints = {
            "checkpoints": self._checkpoints.limit,
            "checkpoint_step": self._checkpoints.step,
            "checkpoint_bytes": self._checkpoint_bytes,
        }
        ours = {"tokenizer": tokenizer, "settings": self._settings(), "stop": self.stop}
        return state | checkpoints | ours | {"mod": self.mod, "rpc": self._rpc}

    def __setstate__(self, state: dict) -> None:
        options = dict(state)
        settings, stop = options.pop("settings"), options.pop("stop")
        type(self).__init__(self, **options)
        self._set_all(settings)
        self.stop = stop


def _one(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The one value that two names of an argument have."""
    if value is not None and other is not None and value != other:
        raise InputError(f"{name} is {value} and {other_name} {other}", "give one of them")
    return other if value is None else value


def _checkpoints(limit: int, step: int, max_bytes: int | None) -> Checkpoints:
    """No checkpoints yet. Raises InputError for values that are no sizes."""
    max_bytes = 0 if max_bytes is None else max_bytes
    for name, value, least in (
        ("checkpoints", limit, 0),
        ("checkpoint_step", step, 1),
        ("checkpoint_bytes", max_bytes, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} {value!r} is wrong", f"use a whole number from {least}")
    return Checkpoints(limit, step, max_bytes)


def _context_params(
    now: llama_cpp.llama_context_params, changes: dict[str, Any]
) -> llama_cpp.llama_context_params:
    """A copy of the parameters with some changed. Raises InputError for names and types."""
    changes = check_options(changes)
    params = type(now).from_buffer_copy(now)
    names = {field[0] for field in params._fields_}
    for name, value in changes.items():
        if name not in names:
            raise InputError(f"{name} is no parameter of a context", "see llama_context_params")
        try:
            setattr(params, name, value)
        except TypeError as exc:
            raise InputError(f"{name} cannot be {value!r}: {exc}", "use another value") from None
    room = min(params.n_batch, params.n_ubatch or params.n_batch)
    if params.n_seq_max > room:  # llama.cpp ends the process
        raise InputError(
            f"a batch of {room} tokens has no room for {params.n_seq_max} sequences",
            "use a larger n_batch and n_ubatch",
        )
    return params
