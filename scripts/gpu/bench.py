"""Measure synthetic models on the GPU by the code of `mod-export bench`.

The result is bench.jsonl, which has a line for each finished point. A point is a shape, a
quantisation, a kind of units, a way to decode and a context. The ways to decode are segments and
one graph for a token; kv units run as one graph in any case. At each point these variants take
turns: the dense model, the floor, all units active, no unit active, and activations of about 0.75,
0.5 and 0.25.

A point that the file has is not measured again. A point that is not likely to end in time is not
begun. SHAPES, QUANTS, UNITS, WAYS and CONTEXTS choose the points (values with commas).
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from common import GPU_LAYERS, REHEARSE, RESULTS, THREADS, WORK, machine, part

from mod_export.benchmark.run import BenchOptions, bench
from mod_export.common.progress import Progress
from mod_export.errors import UserError
from mod_export.synthetic.routers import SynthesisOptions, routing
from mod_export.synthetic.shape import preset_named
from mod_export.synthetic.write import synth

# shifts of the thresholds for 0.5, 0.75 and 0.25: the routers' logits have a standard deviation of
# 2
SHIFTS = (0.0, -1.35, 1.35)
VARIANTS = ("ceiling", "floor", "dense_patched", "mod", "all_active", "none_active")
OPTIONS = BenchOptions(
    ubatches=(1024,),
    shifts=SHIFTS,
    variants=VARIANTS,
    seconds=2.0,
    threads=THREADS,
    gpu_layers=GPU_LAYERS,
)
FIRST = 150.0  # s; what a point may take as long as none is known
if REHEARSE:
    DEFAULTS = {
        "SHAPES": "1b",
        "QUANTS": "q4_0",
        "UNITS": "attn,block",
        "WAYS": "segments,graph",
        "CONTEXTS": "64,128",
    }
    SMALL = {"layers": 4, "embd": 512, "heads": 8, "heads_kv": 2, "ff": 1024, "vocab": 2048}
    OPTIONS = replace(OPTIONS, ubatches=(64,), rounds=1, seconds=0.0)
else:
    DEFAULTS = {
        "SHAPES": "8b,1b,3b",
        "QUANTS": "q4_0,f16",
        "UNITS": "attn,block,kv",
        "WAYS": "segments,graph",
        "CONTEXTS": "8192,32768,2048,65536",
    }
    SMALL = {}


@dataclass(frozen=True)
class Point:
    """What one measurement is of: see the module's docstring."""

    shape: str
    quant: str
    units: str
    way: str
    context: int

    @property
    def name(self) -> str:
        return f"{self.shape} {self.quant} {self.units} {self.way} {self.context}"


def main() -> bool:
    end = time.monotonic() + 60 * float(os.environ["MINUTES"])
    plan, build = points(), machine()["build"]
    # lines of an earlier build stay for comparison, and the report takes the last of each point
    took = {
        line["point"]: line["seconds"] for line in finished() if line["machine"]["build"] == build
    }
    left = [point for point in plan if point.name not in took]
    for point in left:
        expected = max(
            [1.3 * s for name, s in took.items() if name.split()[0] == point.shape] or [FIRST]
        )
        if time.monotonic() + expected > end and not REHEARSE:
            n_left = sum(p.name not in took for p in plan)
            print(f"{n_left} of {len(plan)} points are left: call again to go on")
            sys.exit(3)
        start = time.monotonic()
        line = {"point": point.name, "machine": machine()} | measure(point)
        took[point.name] = line["seconds"] = round(time.monotonic() - start, 1)
        append(line)
        failure = f", failed: {line['error']}" if "error" in line else ""
        print(f"{point.name}: {line['seconds']} s{failure}", flush=True)
    failed = [
        line["point"]
        for line in finished()
        if line["machine"]["build"] == build and "error" in line
    ]
    print(
        "all points are there" + (f", {len(failed)} failed: {', '.join(failed)}" if failed else "")
    )
    return not failed


def points() -> list[Point]:
    shapes, quants, kinds, ways, contexts = (
        os.environ.get(name, default).split(",") for name, default in DEFAULTS.items()
    )
    if unknown := set(ways) - {"segments", "graph"}:
        raise UserError(f"WAYS has {', '.join(sorted(unknown))}", "known are segments and graph")
    try:
        return [
            Point(shape, quant, units, way, int(context))
            for shape, quant, context, units, way in product(shapes, quants, contexts, kinds, ways)
            if (units, way) != ("kv", "graph")
        ]
    except ValueError as exc:
        raise UserError(
            f"CONTEXTS is {os.environ['CONTEXTS']!r}", "give numbers of tokens, with commas"
        ) from exc


def measure(point: Point) -> dict:
    """Return the result of bench(), or the error.

    A point that does not fit the GPU must not end the others.
    """
    dense, mod = files(point)
    os.environ.pop("LLAMA_MOD_DECODE", None)  # the processes of the variants read it
    if point.way == "graph":
        os.environ["LLAMA_MOD_DECODE"] = "graph"
    try:
        return bench(
            mod,
            dense,
            replace(OPTIONS, contexts=(point.context,)),
            progress=Progress(),
        )
    except UserError as exc:
        return {"error": exc.message}


def files(point: Point) -> tuple[Path, Path]:
    """Return the point's dense and MoD file.

    The function removes the files of other shapes and types, because they take much space.
    """
    folder = WORK / "models" / f"{point.shape}-{point.quant}"
    for path in (WORK / "models").glob("*/*.gguf"):
        if path.parent != folder:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    dense, mod = folder / "dense.gguf", folder / f"{point.units}.gguf"
    if not mod.is_file():
        shape = replace(preset_named(point.shape), **SMALL).checked()
        options = SynthesisOptions(units=point.units, layers="2-", kv_window=64)
        synth(
            mod,
            shape,
            point.quant,
            routing(shape.layers, options, shape.heads_kv),
            None if dense.is_file() else dense,
        )
    return dense, mod


def finished() -> list[dict]:
    """Return the lines of bench.jsonl, without a last line that was cut off."""
    path = RESULTS / "bench.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def append(line: dict) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "bench.jsonl"
    text = path.read_text() if path.is_file() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    part(main)
