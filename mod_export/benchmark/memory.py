"""What a run takes in memory, and the largest context that fits: the dense model against the MoD
one.

    plan = fit("mod.gguf", parse_size("8G"))
    print(report(plan))
    checks = check(plan)                   # runs it, and compares

Total = weights + K/V + compute buffers + process. llama.cpp itself tells the compute buffers, the
complete K/V and
what the process needs: it makes two contexts without memory behind them (memory_worker.py), and all
three grow in a straight line with the context. How much of the K/V a routed layer stores follows
from the activation in the file. The constants below were measured; `mod-export fit --check`
measures again (docs/log.md). Linux and CPU only.
"""

import copy
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from mod_export.common.tables import format_table
from mod_export.errors import UserError
from mod_export.formats.ggml_types import type_named
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_size import bytes_per_token, expected_cells, mean_activation
from mod_export.formats.schema import read_routers

logger = logging.getLogger(__name__)

MIB = 2**20
KV_TYPES = ("f16", "q8_0", "q4_0")
MARGIN = 0.1  # more activation than calibrated; smollm2-kv has up to 6 % more on three texts
STEP = 256  # llama.cpp rounds contexts up to a multiple of it
PROBED = (4096, 65536)  # contexts that llama.cpp measures
WORK = 1.07  # of the compute buffers: with those in which the CPU quantises the inputs of products
PROCESS = 6 * MIB  # tokens, Python's side of a run
CELL = 96  # in use: a node in each of the cache's two sets
PAGE = 4096
TOLERANCE = 0.05  # a run that takes more than this above the prediction fails the check


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes with a context of `context` tokens, all of them in use."""

    context: int
    weights: int
    kv: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute + self.process


@dataclass(frozen=True)
class Options:
    """Tokens per graph, type of K and V (of KV_TYPES), threads, activation above the calibrated one
    (a share).
    """

    ubatch: int = 512
    kv_type: str = "f16"
    threads: int = 1
    margin: float = MARGIN


class Model:
    """A GGUF file whose needs can be told."""

    def __init__(self, path: str | Path, options: Options):
        file = GGUFFile.open(path)
        n_layer = file.model_number("block_count")
        self.path, self.options, self.weights = Path(path), options, Path(path).stat().st_size
        self.config = read_routers(file)[0]
        self.layers = (
            [bytes_per_token(file, layer) for layer in range(n_layer)] if self.config else []
        )
        self.dense = self.config is None

    def as_dense(self) -> "Model":
        """The same weights as a dense model."""
        other = copy.copy(self)
        other.dense = True
        return other

    @cached_property
    def probe(self) -> dict:
        """See memory_worker.probe."""
        return _ask(
            do="probe",
            file=str(self.path),
            contexts=PROBED,
            ubatch=self.options.ubatch,
            kv_type=int(type_named(self.options.kv_type)),
        )

    def need(self, n: int) -> Need:
        """What a context of n tokens takes when it is full."""
        kv, compute = self._line("kv", n), self._line("compute", n) * WORK
        fixed = self._line("process", 0)
        lists = (
            self._line("process", n) - fixed
        )  # of cells, as long as the context, in each of the caches
        routed = [layer for layer in range(len(self.layers)) if self._routes(layer)]
        if self.dense:  # one cache for all layers
            process = fixed + lists / (1 + len(routed)) + CELL * n
        else:
            cells = {
                layer: expected_cells(self.config, layer, n, self.options.margin)
                for layer in routed
            }
            stored = sum(size * cells.get(layer, n) for layer, size in enumerate(self.layers))
            stored += self.options.ubatch * max(
                self.layers
            )  # the layer in work holds a ubatch before it drops any
            kv = kv * min(1, stored / (n * sum(self.layers))) + PAGE * len(
                self.layers
            )  # half a page for each K, V
            process = fixed + lists + CELL * (n + sum(cells.values()))
        return Need(n, self.weights, round(kv), round(compute), round(PROCESS + process))

    def _line(self, what: str, n: int) -> float:
        (n0, n1), (a, b) = PROBED, (size[what] for size in self.probe["sizes"])
        return a + (b - a) * (n - n0) / (n1 - n0)

    def _routes(self, layer: int) -> bool:
        return any(self.config.threshold(layer, kind) > 0 for kind in ("block", "attn", "kv"))

    def largest(self, memory: int, limit: int = 1 << 24) -> Need:
        """The largest context up to `limit` that fits, a multiple of STEP. Raises UserError where
        none does.
        """
        low, high = 0, max(1, limit // STEP)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.need(middle * STEP).total <= memory else (low, middle - 1)
            )
        if not low:
            least = self.need(STEP)
            cure = "use a smaller quantisation, or more memory"
            if self.weights > memory:
                raise UserError(
                    f"{mib(memory)} do not hold the weights of {self.path}, {mib(self.weights)}",
                    cure,
                )
            raise UserError(
                f"{self.path} needs {mib(least.total)} for a context of {STEP} tokens, not {mib(memory)}",
                cure,
            )
        return self.need(low * STEP)


def parse_size(text: str) -> int:
    """Bytes of `8G`, `512M`, `1.5GiB` or `8000000`: powers of 1024, with or without `iB` or `B`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if size <= 0:
        raise UserError(
            f"{text!r} is no size of memory",
            "for example 8G, 512M or a number of bytes; 1G is 1024M",
        )
    return size


def mib(size: float) -> str:
    """In MiB, from 4 GiB on in GiB."""
    return f"{size / MIB:.1f} MiB" if size < 4 << 30 else f"{size / (1 << 30):.2f} GiB"


@dataclass(frozen=True)
class Plan:
    """What fits: needs at the largest context within the trained one, and how much the memory alone
    would hold.
    """

    memory: int
    options: Options
    models: dict[str, Model]  # "dense" first, "MoD" unless the file is a dense one
    needs: dict[str, Need] = field(default_factory=dict)
    unlimited: dict[str, int] = field(default_factory=dict)


def fit(file: str | Path, memory: int, options: Options, dense: str | Path | None = None) -> Plan:
    """The largest contexts of a MoD or dense file within `memory` bytes.

    dense: the dense file to compare with, by default the MoD file with all units active. Raises
    UserError for files that are damaged or refused, and where not even the shortest context fits.
    """
    if options.kv_type not in KV_TYPES:
        raise UserError(
            f"K/V type {options.kv_type!r} is unknown", f"use one of {', '.join(KV_TYPES)}"
        )
    model = Model(file, options)
    if model.dense and dense:
        raise UserError(f"{file} is a dense model", "give a MoD file to compare with --dense")
    model.probe  # noqa: B018  (once, for both)
    models = {"dense": Model(dense, options) if dense else model.as_dense()}
    plan = Plan(memory, options, models if model.dense else models | {"MoD": model})
    for name, m in plan.models.items():
        plan.unlimited[name] = m.largest(memory).context
        plan.needs[name] = m.largest(memory, m.probe["n_ctx_train"])
    return plan


def report(plan: Plan) -> str:
    """The plan as a table and the notes that belong to it."""
    names, needs = list(plan.needs), list(plan.needs.values())
    rows = [["largest context, tokens", *(need.context for need in needs)]]
    rows += [
        [label, *(mib(getattr(need, key)) for need in needs)]
        for key, label in (
            ("weights", "weights"),
            ("kv", f"K/V, {plan.options.kv_type}"),
            ("compute", "compute buffers"),
            ("process", "process"),
            ("total", "total"),
        )
    ]
    rows.append(["memory alone would hold, tokens", *plan.unlimited.values()])
    return "\n".join([format_table([f"in {mib(plan.memory)}", *names], rows), "", *_notes(plan)])


def _notes(plan: Plan) -> Iterator[str]:
    for name, model in plan.models.items():
        if plan.unlimited[name] > plan.needs[name].context:
            yield f"{name}: stops at the {model.probe['n_ctx_train']} tokens that the model was trained for"
    if "MoD" in plan.models:
        mean = mean_activation(plan.models["MoD"].config)["all"]
        yield f"activation: {mean:.3f} on calibration text, and {plan.options.margin:.0%} more to be safe"
    repacked = {m.path: m for m in plan.models.values() if m.probe["repacks"]}
    for model in repacked.values():
        yield (
            f"{model.path}: weights are copied into this processor's own layout; the file's pages behind them stay "
            f"resident too, up to {mib(model.weights)} more, until the system wants them back"
        )


def check(plan: Plan, text: str, longest: int) -> list[dict]:
    """Runs each file with its context full, or with `longest` tokens if that is less; a row for
    each.

    Rows: model, context, predicted and needed bytes, peak (RSS, with pages that the system can have
    back), activation, K/V, ok. Not ok: more than the memory given, or more than TOLERANCE above the
    prediction.
    """
    rows, options = [], plan.options
    for name, model in plan.models.items():
        if model.dense and model.config:
            logger.info(
                "dense: computed from the MoD file; give the dense one with --dense to have it run too"
            )
            continue
        n = min(plan.needs[name].context, -(-longest // STEP) * STEP)
        if n < plan.needs[name].context:
            logger.info(f"{name}: checked at {n} of {plan.needs[name].context} tokens")
        ran = _ask(
            f"{name}, {n} tokens: ubatch",
            -(-n // options.ubatch),
            do="run",
            file=str(model.path),
            n_ctx=n,
            ubatch=options.ubatch,
            kv_type=int(type_named(options.kv_type)),
            threads=options.threads,
            text=text,
        )
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


def check_report(rows: list[dict]) -> str:
    """The rows of check() as a table."""
    cells = [
        [
            r["model"],
            r["context"],
            mib(r["predicted"]),
            mib(r["needed"]),
            f"{r['predicted'] / r['needed'] - 1:+.1%}",
            mib(r["predicted_kv"]),
            mib(r["kv"]),
            round(r["activation"], 3),
            mib(r["peak"]),
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


def to_json(plan: Plan, checks: list[dict] | None) -> dict:
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


def _ask(label: str = "", steps: int = 0, **question) -> dict:
    """The answer of a worker process; its steps are shown as progress."""
    from mod_export.common.progress import Progress

    worker = subprocess.Popen(
        [sys.executable, "-m", "mod_export.benchmark.memory_worker"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with worker:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
        step = Progress().count(label, range(steps))
        for answer in map(json.loads, worker.stdout):
            if "error" in answer:
                raise UserError(answer["error"], answer["cure"])
            if "result" in answer:
                return answer["result"]
            next(step, None)
    raise UserError(
        f"the measuring process ended with code {worker.returncode}", "is there enough memory?"
    )
