"""What a run takes in memory, and the largest context that fits, for the dense and the MoD model.

    plan = fit("mod.gguf", parse_size("8G"), MemoryOptions())
    print(report(plan))
    checks = check(plan, text, longest=8192)       # runs it, and compares

Total = weights + K/V + recurrent states + checkpoints + compute buffers + process. llama.cpp itself
tells the compute buffers, the states, the K/V of a dense file and what the process needs: it makes
two contexts without memory behind them (memory_worker.py). K/V and compute buffers grow in a
straight line with the context. The K/V of a MoD file follow from its keys: the window of each
layer, and how much the activation has a routed layer store. Checkpoints are the runtime's, and may
take a share of the dense K/V. The constants below were measured, and `mod-export fit --check`
measures again (docs/log.md). Linux and CPU only.
"""

import copy
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from mod_export.benchmark.processes import Worker
from mod_export.common.progress import Progress
from mod_export.common.tables import format_table
from mod_export.common.text import mebibytes
from mod_export.errors import UserError
from mod_export.formats import gguf_adapter
from mod_export.formats.kv_size import (
    checkpoint_cells,
    checkpoint_room,
    expected_cells,
    kv_layers,
    lists_of_cells,
    mean_activation,
)
from mod_export.formats.kv_types import KVTypes
from mod_export.formats.recurrent_layers import recurrent_layers, state_bytes
from mod_export.formats.schema import read_routers
from mod_export.units import UNIT_KINDS

logger = logging.getLogger(__name__)

MIB = 2**20
# Share of activation above the one in the file. The adapters smollm2-kv and smollm2-kv-quarter have
# up to 1.5 and 10 % more on three texts.
ACTIVATION_MARGIN = 0.1
CONTEXT_STEP_TOKENS = 256  # llama.cpp rounds contexts up to a multiple of it
PROBED_CONTEXTS = (4096, 65536)  # contexts that llama.cpp measures
# The compute buffers are multiplied by it, for buffers in which the CPU quantises the inputs of
# products.
COMPUTE_FACTOR = 1.07
# The runtime keeps two graphs of one token, which have room for so many copies of a layer's state.
KEPT_STATES = 5
# A run has another graph beside the one that llama.cpp measures with. A MoD model has one for
# segments, and small ones that it keeps, which take less than a third one.
NODE_BYTES = 409  # of a graph's room: ggml_tensor_overhead and ggml_graph_overhead_custom
PROCESS_BYTES = 6 * MIB  # tokens, and Python's side of a run
USED_CELL_BYTES = 13  # position, set of sequences, place in its list, byte of the mask
PAGE_BYTES = 4096
TOLERANCE = 0.05  # a run that takes more than this share above the prediction fails the check
MAX_CONTEXT_TOKENS = 1 << 24


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run takes with a context of `context` tokens, all of them in use."""

    context: int
    weights: int
    kv: int
    states: int
    checkpoints: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        attention = self.kv + self.states + self.checkpoints
        return self.weights + attention + self.compute + self.process


@dataclass(frozen=True)
class MemoryOptions:
    """The settings of a run.

    ubatch: tokens per graph
    kv_type: type of K and V, or `K/V`
    margin: activation above the calibrated one, as a share of it
    """

    ubatch: int = 512
    kv_type: str = "f16"
    threads: int = 1
    margin: float = ACTIVATION_MARGIN

    @property
    def types(self) -> KVTypes:
        """Raises UserError for types that are unknown."""
        return KVTypes.parse(self.kv_type)


class MemoryModel:
    """A GGUF file whose needs can be told; mod: routers that are put beside it."""

    def __init__(self, path: str | Path, options: MemoryOptions, mod: str | None = None):
        file = gguf_adapter.with_routers(path, mod)
        self.mod = mod
        self.path = Path(path)
        self.options = options
        self.weights = self.path.stat().st_size
        self.config = read_routers(file)[0]
        options.types.check(file)
        self.layers = kv_layers(file, *options.types.sizes) if self.config else []
        self.layer_state = state_bytes(file) // max(1, sum(recurrent_layers(file)))
        self.dense = self.config is None

    def as_dense(self) -> "MemoryModel":
        """The same weights as a dense model."""
        other = copy.copy(self)
        other.dense = True
        return other

    @cached_property
    def probe(self) -> dict:
        """What llama.cpp says that contexts take, see MemoryWorker.probe."""
        with _worker() as worker:
            return worker.ask(
                do="probe",
                file=str(self.path),
                mod=self.mod,
                contexts=PROBED_CONTEXTS,
                ubatch=self.options.ubatch,
                types=self.options.types.numbers,
            )

    def need(self, n: int) -> MemoryNeed:
        """What a context of n tokens takes when it is full."""
        kept = 0 if self.dense else KEPT_STATES * self.layer_state
        compute = self._line("compute", n) * COMPUTE_FACTOR + kept
        layers = range(len(self.layers))
        if self.dense:  # it has one cache for all layers
            kv = self._line("kv", n) if self.config is None else self._dense_kv(n)
            used = n
        else:
            cells = [self._cells(layer, n) for layer in layers]
            kv = self._stored(cells, n)
            routed = [layer for layer in layers if self._routes(layer)]
            used = n + sum(cells[layer] * lists_of_cells(self.config, layer) for layer in routed)
        graphs = NODE_BYTES * self.probe["nodes"] * (1 if self.dense else 2)
        process = self.probe["process"] + USED_CELL_BYTES * used + graphs + PROCESS_BYTES
        # A MoD model has the states before a decode too.
        states = self.probe["states"] / (2 if self.dense and self.config else 1)
        return MemoryNeed(
            n,
            self.weights,
            round(kv),
            round(states),
            self._checkpoints(n),
            round(compute),
            round(process),
        )

    def _dense_kv(self, n: int) -> float:
        return sum(layer.dense_bytes(n, self.options.ubatch) for layer in self.layers)

    def _cells(self, layer: int, n: int) -> float:
        """Cells of a layer after n tokens; a sliding one holds a ubatch beside its window."""
        if window := self.layers[layer].window:
            window += self.options.ubatch
        return expected_cells(self.config, layer, n, self.options.margin, window)

    def _stored(self, cells: list[float], n: int) -> float:
        """Bytes of K and V in so many cells of each layer."""
        sizes = [layer.bytes_per_token for layer in self.layers]
        stored = sum(size * used for size, used in zip(sizes, cells, strict=True))
        # The layer in work holds a ubatch before it drops any cell of it.
        stored += self.options.ubatch * max(sizes)
        # K and V of each list of cells waste half a page each.
        lists = sum(lists_of_cells(self.config, layer) for layer in range(len(sizes)))
        return min(stored, n * sum(sizes)) + PAGE_BYTES * lists

    def _line(self, what: str, n: int) -> float:
        """The line through the two probed contexts, at a context of n tokens."""
        n0, n1 = PROBED_CONTEXTS
        a, b = (size[what] for size in self.probe["sizes"])
        return a + (b - a) * (n - n0) / (n1 - n0)

    def _routes(self, layer: int) -> bool:
        return any(
            unit.layer == layer and UNIT_KINDS[unit.kind].frees_kv for unit in self.config.routed()
        )

    def _checkpoints(self, n: int) -> int:
        """What the runtime's checkpoints may take; it makes them where K/V are given back."""
        if self.dense:
            return 0
        state = round(self.probe["states"] / 2)
        one = state + sum(
            layer.bytes_per_token * checkpoint_cells(self.config, i, n, layer.window)
            for i, layer in enumerate(self.layers)
        )
        return round(max(one, checkpoint_room(self._dense_kv(n), state))) if one else 0

    def largest(self, memory: int, limit: int = MAX_CONTEXT_TOKENS) -> MemoryNeed:
        """The largest context up to `limit` that fits, in steps of CONTEXT_STEP_TOKENS.

        Raises UserError where no context fits.
        """
        low = 0
        high = max(1, limit // CONTEXT_STEP_TOKENS)
        while low < high:
            middle = (low + high + 1) // 2
            if self.need(middle * CONTEXT_STEP_TOKENS).total <= memory:
                low = middle
            else:
                high = middle - 1
        if not low:
            least = self.need(CONTEXT_STEP_TOKENS)
            cure = "use a smaller quantisation, or more memory"
            if self.weights > memory:
                raise UserError(
                    f"{mebibytes(memory)} do not hold the weights of {self.path}, "
                    f"{mebibytes(self.weights)}",
                    cure,
                )
            raise UserError(
                f"{self.path} needs {mebibytes(least.total)} for a context of "
                f"{CONTEXT_STEP_TOKENS} tokens, not {mebibytes(memory)}",
                cure,
            )
        return self.need(low * CONTEXT_STEP_TOKENS)


def parse_size(text: str) -> int:
    """Bytes of `8G`, `512M`, `1.5GiB` or `8000000`; the units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if size <= 0:
        raise UserError(
            f"{text!r} is no size of memory",
            "for example 8G, 512M or a number of bytes; 1G is 1024M",
        )
    return size


@dataclass(frozen=True)
class MemoryPlan:
    """What fits into `memory` bytes.

    models: "dense" first, then "MoD" unless the file is a dense one. needs: those of the largest
    context within the trained one. unlimited: tokens that the memory alone would hold.
    """

    memory: int
    options: MemoryOptions
    models: dict[str, MemoryModel]
    needs: dict[str, MemoryNeed] = field(default_factory=dict)
    unlimited: dict[str, int] = field(default_factory=dict)


def fit(
    file: str | Path,
    memory: int,
    options: MemoryOptions,
    dense: str | Path | None = None,
    mod: str | None = None,
) -> MemoryPlan:
    """The largest contexts of a MoD or dense file within `memory` bytes.

    dense: the dense file to compare with, by default the MoD file with all units active. mod:
    routers that are put beside a dense `file`. Raises UserError for files that are damaged or
    refused, and where not even the shortest context fits.
    """
    model = MemoryModel(file, options, mod)
    if model.dense and dense:
        raise UserError(f"{file} is a dense model", "give a MoD file, or routers with --mod")
    model.probe  # noqa: B018  measured once, for both models
    models = {"dense": MemoryModel(dense, options) if dense else model.as_dense()}
    plan = MemoryPlan(memory, options, models if model.dense else models | {"MoD": model})
    for name, m in plan.models.items():
        plan.unlimited[name] = m.largest(memory).context
        plan.needs[name] = m.largest(memory, m.probe["n_ctx_train"])
    return plan


def report(plan: MemoryPlan) -> str:
    """The plan as a table and the notes that belong to it."""
    names, needs = list(plan.needs), list(plan.needs.values())
    rows = [["largest context, tokens", *(need.context for need in needs)]]
    rows += [
        [label, *(mebibytes(getattr(need, key)) for need in needs)]
        for key, label in (
            ("weights", "weights"),
            ("kv", f"K/V, {plan.options.types}"),
            *([("states", "recurrent states")] if any(need.states for need in needs) else []),
            ("checkpoints", "checkpoints"),
            ("compute", "compute buffers"),
            ("process", "process"),
            ("total", "total"),
        )
    ]
    rows.append(["memory alone would hold, tokens", *plan.unlimited.values()])
    return "\n".join(
        [format_table([f"in {mebibytes(plan.memory)}", *names], rows), "", *_notes(plan)]
    )


def _notes(plan: MemoryPlan) -> Iterator[str]:
    for name, model in plan.models.items():
        if plan.unlimited[name] > plan.needs[name].context:
            trained = model.probe["n_ctx_train"]
            yield f"{name}: stops at the {trained} tokens that the model was trained for"
    if "MoD" in plan.models:
        mean = mean_activation(plan.models["MoD"].config)["all"]
        margin = plan.options.margin
        yield f"activation: {mean:.3f} on calibration text, and {margin:.0%} more to be safe"
    repacked = {m.path: m for m in plan.models.values() if m.probe["repacks"]}
    for model in repacked.values():
        yield (
            f"{model.path}: weights are copied into this processor's own layout; the file's pages "
            f"behind them stay resident too, up to {mebibytes(model.weights)} more, until the "
            "system wants them back"
        )


def check(plan: MemoryPlan, text: str, longest: int) -> list[dict]:
    """Run each file with its context full, or with `longest` tokens if that is less.

    Returns a row for each: model, context, predicted and needed bytes, peak (resident memory, with
    pages that the system can have back), activation, K/V, ok. A run is not ok where it needs more
    than the memory given, or more than TOLERANCE above the prediction.
    """
    rows = []
    for name, model in plan.models.items():
        if model.dense and model.config:
            logger.info(
                "dense: computed from the MoD file; give the dense one with --dense to have it run "
                "too"
            )
            continue
        n = min(plan.needs[name].context, -(-longest // CONTEXT_STEP_TOKENS) * CONTEXT_STEP_TOKENS)
        if n < plan.needs[name].context:
            logger.info(f"{name}: checked at {n} of {plan.needs[name].context} tokens")
        ran = _run(name, model, n, text)
        need = model.need(n)
        ok = ran["needed"] <= min(plan.memory, need.total * (1 + TOLERANCE))
        rows.append(
            {
                "model": name,
                "context": n,
                "predicted": need.total,
                "predicted_kv": need.kv,
                **ran,
                "ok": ok,
            }
        )
    return rows


def _run(name: str, model: MemoryModel, n_ctx: int, text: str) -> dict:
    """The result of MemoryWorker.run, with a line of progress for each ubatch."""
    options = model.options
    ubatches = -(-n_ctx // options.ubatch)
    steps = Progress().count(f"{name}, {n_ctx} tokens: ubatch", range(ubatches))
    with _worker() as worker:
        return worker.ask(
            on_progress=lambda _: next(steps, None),
            do="run",
            file=str(model.path),
            mod=model.mod,
            n_ctx=n_ctx,
            ubatch=options.ubatch,
            types=options.types.numbers,
            threads=options.threads,
            text=text,
        )


def check_report(rows: list[dict]) -> str:
    """The rows of check() as a table."""
    cells = [
        [
            r["model"],
            r["context"],
            mebibytes(r["predicted"]),
            mebibytes(r["needed"]),
            f"{r['predicted'] / r['needed'] - 1:+.1%}",
            mebibytes(r["predicted_kv"]),
            mebibytes(r["kv"]),
            round(r["activation"], 3),
            mebibytes(r["peak"]),
            "yes" if r["ok"] else "NO",
        ]
        for r in rows
    ]
    return format_table(
        [
            "",
            "context",
            "predicted",
            "measured",
            "difference",
            "K/V predicted",
            "measured",
            "activation",
            "peak RSS",
            "within",
        ],
        cells,
    )


def to_json(plan: MemoryPlan, checks: list[dict] | None) -> dict:
    """Everything as plain values."""
    models = {
        name: {
            "file": str(plan.models[name].path),
            **asdict(need),
            "total": need.total,
            "n_ctx_train": plan.models[name].probe["n_ctx_train"],
            "memory_would_hold": plan.unlimited[name],
        }
        for name, need in plan.needs.items()
    }
    return {"memory": plan.memory, **asdict(plan.options), "models": models, "checks": checks}


def _worker() -> Worker:
    """A process that measures, see memory_worker.py."""
    return Worker(
        "", {}, module="mod_export.benchmark.memory_worker", cure="is there enough memory?"
    )
