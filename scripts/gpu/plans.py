"""What the parts of a call measure, in the order of their worth, and the models that they need.

PLANS["decode"].contexts
write_models()               # into WORK/models: dense, pruned, and one for each kind of units
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from common import MODELS, REHEARSE

from mod_export.benchmark.floor import block_floor, prune
from mod_export.formats.gguf import GGUFFile
from mod_export.synthetic.routers import SynthesisOptions, routing
from mod_export.synthetic.shape import Shape, preset_named
from mod_export.synthetic.write import synth

KINDS = ("kv", "attn", "block")
QUANT = "q4_0"
# The first two layers stay dense, so that kinds are compared at the same depth.
ROUTED = "2-"
SMALL = {"layers": 4, "embd": 512, "heads": 8, "heads_kv": 2, "ff": 1024, "vocab": 2048}
FORCES = ("none", "active", "inactive")


@dataclass(frozen=True)
class Lane:
    """One model and one way to decode it. model: dense, pruned or a kind of units."""

    model: str
    way: str = "segments"

    @property
    def name(self) -> str:
        return f"{self.model} graph" if self.way == "graph" else self.model

    def forces(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f for f in wanted if f == "none" or self.model in KINDS)


@dataclass(frozen=True)
class Plan:
    """What one part measures: every lane, at each ubatch, force and context.

    seconds: its budget. fills: how often a context is read; the last time counts.
    """

    seconds: int
    shape: str
    lanes: tuple[Lane, ...]
    contexts: tuple[int, ...]
    forces: tuple[str, ...] = ("none",)
    batch: int = 1
    ubatches: tuple[int, ...] = (2048,)
    fills: int = 1
    steps: int = 40


DENSE, PRUNED, KV, ATTN, BLOCK = (Lane(name) for name in ("dense", "pruned", *KINDS))
GRAPHS = (Lane("attn", "graph"), Lane("block", "graph"))
PLANS = {
    "decode": Plan(
        180, "8b", (DENSE, KV, ATTN, BLOCK, *GRAPHS, PRUNED), (2048, 8192, 32768), FORCES
    ),
    "prefill": Plan(
        120, "8b", (DENSE, KV, ATTN, BLOCK, PRUNED), (8192,), FORCES, ubatches=(512, 2048), fills=2
    ),
    "sequences": Plan(60, "8b", (DENSE, KV, ATTN, BLOCK), (8192,), ("none", "active"), batch=8),
    "long": Plan(60, "1b", (DENSE, KV), (65536, 131072)),
}
if REHEARSE:
    _SMALLER = {
        "decode": {"contexts": (64, 128), "ubatches": (64,)},
        "prefill": {"contexts": (64,), "ubatches": (32, 64)},
        "sequences": {"contexts": (64,), "ubatches": (64,), "batch": 2},
        "long": {"contexts": (128, 256), "ubatches": (64,)},
    }
    PLANS = {name: replace(p, steps=4, **_SMALLER[name]) for name, p in PLANS.items()}


def shape_of(name: str) -> Shape:
    return replace(preset_named(name), **(SMALL if REHEARSE else {})).checked()


def path_of(shape: str, model: str) -> Path:
    return MODELS / f"{shape}-{model}.gguf"


def write_models() -> None:
    """Write the models of all plans, each whole or not at all; those that are there stay."""
    MODELS.mkdir(parents=True, exist_ok=True)
    wanted = {(plan.shape, lane.model) for plan in PLANS.values() for lane in plan.lanes}
    jobs = sorted((shape, model) for shape, model in wanted if model in KINDS)
    with ProcessPoolExecutor(1 if REHEARSE else len(jobs)) as pool:
        list(pool.map(write_model, *zip(*jobs, strict=True)))


def write_model(shape: str, kind: str) -> None:
    """Write a model of one kind; with `kv` the dense one too, with `block` the pruned one too."""
    sizes, target = shape_of(shape), path_of(shape, kind)
    if target.is_file():
        return
    options = SynthesisOptions(units=kind, layers=ROUTED, kv_window=64 if REHEARSE else 256)
    config = routing(sizes.layers, options, sizes.heads_kv)
    dense = path_of(shape, "dense") if kind == "kv" else None
    if kind == "block":
        own = path_of(shape, "block-dense")
        synth(target, sizes, QUANT, config, own)
        prune(GGUFFile.open(own), path_of(shape, "pruned"), block_floor(GGUFFile.open(target)))
        own.unlink()
    else:
        synth(target, sizes, QUANT, config, dense)


if __name__ == "__main__":
    sys.exit(write_models())
