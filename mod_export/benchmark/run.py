"""Speed and memory of a MoD file against the dense one.

Each variant is a process of its own, and the processes take short turns.

    result = bench("mod.gguf", "dense.gguf", BenchOptions(contexts=(512, 2048)))
    print(report.tables(result))

The variants:

* ceiling: the dense file on the stock library.
* ceiling_split: the same with a KV stream for each sequence, where several are decoded at once.
* dense_patched: the dense file on the patched library.
* mod: the MoD file.
* all_active, none_active: the MoD file with every unit forced.
* floor: the dense file without the routed layers on the stock library, where all that is routed is
  whole layers.
"""

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from mod_export.benchmark import grouping
from mod_export.benchmark.floor import block_floor, prefill_work, prune
from mod_export.benchmark.measure import TAIL_STEPS, Step, join, measure
from mod_export.benchmark.processes import Team
from mod_export.benchmark.rows import make_rows
from mod_export.benchmark.worker import VariantSetup
from mod_export.common.progress import Progress
from mod_export.common.system import busy_cpus, cpu_name, total_memory, usable_cpus
from mod_export.errors import UserError
from mod_export.formats import gguf_adapter
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_types import KVTypes, is_quantised
from mod_export.formats.recurrent_layers import state_bytes

logger = logging.getLogger(__name__)
BUSY_CPUS_MAX = 0.3  # of other processes, beside which times are still of use

VARIANTS = (
    "ceiling",
    "ceiling_split",
    "floor",
    "dense_patched",
    "mod",
    "all_active",
    "none_active",
)
DEFAULT_CONTEXTS = (512, 2048, 8192)
FORCE_OF_VARIANT = {"all_active": "active", "none_active": "inactive"}
STOCK_VARIANTS = ("ceiling", "ceiling_split", "floor")  # they run on the stock library
MAX_CONTEXT_TOKENS = 1 << 24


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: every combination of the lists.

    contexts: prompt tokens, None for the default ones that the model was trained for. kv_types: the
    type of K and V, or `K/V`. shifts: of the thresholds, in logit space. rounds, seconds: least
    number of turns, and time for a phase, see measure.measure. starts: how often the processes are
    started anew, each time for all of it. gpu_layers: how many layers lie on the GPU, -1 for all;
    needs a CUDA build. mod: routers that are put beside the MoD file, which is then a dense one.
    """

    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)
    kv_types: tuple[str, ...] = ("f16",)
    flash_attn: tuple[bool, ...] = (True,)
    ubatches: tuple[int, ...] = (512,)
    shifts: tuple[float, ...] = (0.0,)
    variants: tuple[str, ...] = VARIANTS
    rounds: int = 12
    seconds: float = 10.0
    starts: int = 1
    threads: int | None = None
    gpu_layers: int = 0
    mod: str | None = None

    def __post_init__(self):
        if unknown := set(self.variants) - set(VARIANTS):
            raise UserError(
                f"unknown variant {sorted(unknown)[0]!r}", f"choose from {', '.join(VARIANTS)}"
            )


def bench(
    file,
    dense,
    options: BenchOptions | None = None,
    text: str | None = None,
    stock: Path | None = None,
    progress: Progress | None = None,
) -> dict:
    """Measure; {"about": what was run, "rows": two per combination}.

    docs/reference/result-files.md has the keys of a row. text: of the prompts, by default the
    packaged one. stock: directory of the stock library, by default the cached one, built if there
    is none. Raises UserError for files that do not load or do not belong together.
    """
    from mod_export.data.text import default_texts
    from mod_export.runtime import bindings, devices

    bindings.require()
    options = options or BenchOptions()
    devices.check(options.gpu_layers)
    mod_file, dense_file = check_files(file, dense, options.mod)
    n_ctx_train = dense_file.get(f"{dense_file.architecture}.context_length", 0)
    options = replace(
        options,
        contexts=options.contexts
        or tuple(c for c in DEFAULT_CONTEXTS if c <= max(n_ctx_train, DEFAULT_CONTEXTS[0])),
    )
    todo = steps(options)
    for kv in options.kv_types:
        KVTypes.parse(kv).check(mod_file)
    # It may build the library, so it comes after all that can be refused.
    stock = stock or _stock_lib(bool(options.gpu_layers))
    text = text or "\n\n".join(default_texts())
    about = describe(mod_file, dense_file, options, stock)
    with tempfile.TemporaryDirectory(prefix="mod-export-bench-") as folder:
        floor = _make_floor(mod_file, dense_file, options, folder)
        about["floor_prefill_work"] = prefill_work(floor) if floor else None
        files = {"mod": mod_file, "dense": dense_file, "floor": floor}
        bencher = _Bench(files, options, text, stock, progress or Progress())
        rows = [row for step in todo for row in bencher.run(step, n_ctx_train)]
        about["descriptions"] = bencher.descriptions
    return {"about": about, "rows": rows}


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without ones at its end, which llama.cpp's converter writes and its quantiser not."""
    last = max((i for i, size in enumerate(shape) if size != 1), default=-1)
    return tuple(shape[: last + 1])


def check_files(file, dense, mod: str | None = None) -> tuple[GGUFFile, GGUFFile]:
    """The two files, opened; mod: routers that are put beside the first.

    Raises UserError where they are not a MoD and a dense file of one model.
    """
    mod_file, dense_file = gguf_adapter.with_routers(file, mod), GGUFFile.open(dense)
    arch = mod_file.architecture
    if f"{arch}.mod.version" not in mod_file.keys:
        raise UserError(f"{file} is a dense model", "give a MoD file, or routers with --mod")
    if f"{dense_file.architecture}.mod.version" in dense_file.keys:
        raise UserError(
            f"{dense} is a MoD file", "give the dense file of the same model with --dense"
        )
    shapes = [
        {t.name: _without_ones(t.shape) for t in f.tensors.values() if ".mod_" not in t.name}
        for f in (mod_file, dense_file)
    ]
    if shapes[0] != shapes[1]:
        name = next(
            n for n in sorted(shapes[0] | shapes[1]) if shapes[0].get(n) != shapes[1].get(n)
        )
        raise UserError(
            f"{file} and {dense} are not of one model: {name} differs",
            "give the dense file of the same model",
        )
    if any(mod_file.tensors[name].type != t.type for name, t in dense_file.tensors.items()):
        logger.warning(
            f"note: {file} and {dense} are quantised differently: the ceiling is not its own"
        )
    return mod_file, dense_file


def steps(options: BenchOptions) -> list[Step]:
    """Every combination, each for a set of processes of its own."""
    found = []
    for flash, kv, ubatch, context, batch in product(
        options.flash_attn, options.kv_types, options.ubatches, options.contexts, options.batches
    ):
        types = KVTypes.parse(kv)
        if not flash and is_quantised(types.numbers[1]):
            raise UserError(
                f"V in {types.v} needs flash attention", "leave out --flash-attn off, or use f16"
            )
        if not 0 < context < MAX_CONTEXT_TOKENS:
            raise UserError(f"a context of {context} tokens", "use one below 16777216")
        found.append(Step(context, batch, ubatch, flash, str(types), types.numbers))
    return found


class _Bench:
    """Runs the steps."""

    def __init__(
        self,
        files: dict[str, GGUFFile | None],
        options: BenchOptions,
        text: str,
        stock: Path,
        progress: Progress,
    ):
        self.files = files
        self.options = options
        self.text = text
        self.stock = stock
        self.progress = progress
        self.descriptions: dict[str, str] = {}  # of the variants' models, in llama.cpp's words

    def run(self, step: Step, n_ctx_train: int) -> list[dict]:
        """Two rows for each shift."""
        if step.context > n_ctx_train:
            logger.warning(
                f"note: context {step.context} is beyond the {n_ctx_train} of training: for timing "
                "only"
            )
        variants = [
            v
            for v in self.options.variants
            if (v != "floor" or self.files["floor"]) and (v != "ceiling_split" or step.batch > 1)
        ]
        found: dict[float, list] = {shift: [] for shift in self.options.shifts}
        for group in self._groups(step, variants):
            parts = [self._measure(group, step) for _ in range(self.options.starts)]
            for shift in parts[0]:
                found[shift].append(join([part[shift] for part in parts]))
        return [
            row
            for shift, groups in found.items()
            for row in make_rows(step, shift, groups, n_ctx_train)
        ]

    def _measure(self, group: list[str], step: Step) -> dict[float, dict]:
        """shift -> what `measure` says; the processes are started for it."""
        found = {}
        with Team({name: self._setup(name, step) for name in group}) as team:
            for name, worker in team.workers.items():
                self.descriptions[name] = worker.about["description"]
            for i, shift in enumerate(self.options.shifts):
                names = group if i == 0 else self._that_shift(group)
                if "mod" in names or i == 0:
                    found[shift] = measure(
                        team,
                        names,
                        step,
                        shift,
                        self.options.rounds,
                        self.options.seconds,
                        self.progress,
                    )
        return found

    def _groups(self, step: Step, variants: list[str]) -> list[list[str]]:
        tokens = step.batch * (step.context + TAIL_STEPS)
        on_gpu = self.options.gpu_layers != 0
        need = {
            name: grouping.process_bytes(
                self._file(name),
                grouping.dense_bytes(self._file(name), tokens, step.types, step.ubatch, step.batch),
                on_gpu,
            )
            for name in variants
        }
        return grouping.groups(variants, need, grouping.available_memory(on_gpu))

    def _that_shift(self, group: list[str]) -> list[str]:
        """The variants to measure again at another shift.

        These are the variant that the shift changes, and those that it is compared with.
        """
        floor = "floor" if "floor" in group else "none_active"
        return [name for name in group if name in ("ceiling", floor, "mod")]

    def _file(self, name: str) -> GGUFFile:
        """The file that a variant runs."""
        if name == "floor":
            return self.files["floor"]
        return self.files["dense" if self._is_dense(name) else "mod"]

    @staticmethod
    def _is_dense(name: str) -> bool:
        return name in STOCK_VARIANTS or name == "dense_patched"

    def _setup(self, name: str, step: Step) -> tuple[dict, Path | None]:
        """What a variant's process is opened with, and the directory of its library."""
        setup = VariantSetup(
            file=str(self._file(name).path),
            text=self.text,
            context=step.context,
            tail=TAIL_STEPS,
            batch=step.batch,
            ubatch=step.ubatch,
            chunk=step.chunk,
            threads=self.options.threads,
            flash_attn=step.flash_attn,
            type_k=step.types[0],
            type_v=step.types[1],
            unified=name != "ceiling_split",
            force=FORCE_OF_VARIANT.get(name, "none"),
            gpu_layers=self.options.gpu_layers,
            mod=None if self._is_dense(name) else self.options.mod,
        )
        return asdict(setup), self.stock if name in STOCK_VARIANTS else None


def _stock_lib(cuda: bool) -> Path:
    from mod_export.llamacpp import build as llama_build

    return llama_build.stock_lib(cuda) or llama_build.build(stock=True, cuda=cuda)


def _make_floor(
    mod_file: GGUFFile, dense_file: GGUFFile, options: BenchOptions, folder: str
) -> GGUFFile | None:
    layers = block_floor(mod_file) if "floor" in options.variants else None
    if not layers:
        return None
    target = Path(folder) / "floor.gguf"
    prune(dense_file, target, layers)
    return GGUFFile.open(target)


def describe(mod_file: GGUFFile, dense_file: GGUFFile, options: BenchOptions, stock: Path) -> dict:
    """What the figures hold for."""
    import shlex
    import sys

    import llama_cpp

    from mod_export.runtime.devices import gpus

    if (busy := busy_cpus()) > BUSY_CPUS_MAX:
        logger.warning(
            f"other processes keep {busy:.1f} of {os.cpu_count()} processors busy: times will be "
            "too long and uneven; measure on a quiet machine"
        )
    patched = os.environ.get("LLAMA_CPP_LIB_PATH") or Path(llama_cpp.__file__).parent / "lib"
    return {
        "command": shlex.join(["mod-export", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "busy_cores": round(busy, 2),
        "memory_bytes": total_memory(),
        "threads": options.threads or usable_cpus(),
        "llama_cpp": llama_cpp.__version__,
        "build_patched": _build(Path(patched)),
        "build_stock": _build(stock),
        "rounds": options.rounds,
        "starts": options.starts,
        "gpu_layers": options.gpu_layers,
        "gpus": [[gpu.name, gpu.total] for gpu in gpus()] if options.gpu_layers else [],
        "files": {
            name: {"file": str(f.path), "bytes": f.path.stat().st_size}
            for name, f in (("mod", mod_file), ("dense", dense_file))
        },
        "mod": options.mod,
        "stock_variants": list(STOCK_VARIANTS),
        "routed": routed(mod_file),
        "state_bytes": state_bytes(dense_file),
        "random_weights": dense_file.get("tokenizer.ggml.model") == "no_vocab",
    }


def routed(mod_file: GGUFFile) -> dict[str, int]:
    """Return a mapping from each kind to the number of layers with such a router."""
    from mod_export.formats import schema

    config = schema.from_keys(mod_file)
    return {kind: len({unit.layer for unit in units}) for kind, units in config.by_kind().items()}


def _build(lib: Path) -> dict:
    """Name and flags of a library's build; empty for one that mod-export did not build."""
    import json

    marker = lib / "build.json"
    return json.loads(marker.read_text()) if marker.is_file() else {}
