"""Compare SmolLM2 with routers on the GPU with its logits on the CPU, which travel along.

Each kind of units runs by segments and by one graph for a token, with flash attention (K and V in
f16 on the GPU) and without. Up to the first decision that differs both sides compute the same
function. There the KL must be at most 1e-4 without flash attention and 1e-3 with it, and the score
of the differing decision must lie within 1e-3 or 0.05 of its threshold. The result is parity.json.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import model
import numpy as np
from common import (
    GPU_LAYERS,
    MODELS,
    REHEARSE,
    THREADS,
    WORK,
    environment,
    part,
    save,
    seconds_left,
)

from mod_export.common.tables import format_table
from mod_export.common.text import last_words
from mod_export.evaluation.parity import Bounds, Sums, judge
from mod_export.units import Unit

STRICT = Bounds(0, 0, float("inf"), mean_kl=1e-4, margin=1e-3)
ROUNDED = Bounds(0, 0, float("inf"), mean_kl=1e-3, margin=0.05)
AT_ONCE = 6  # processes on the GPU


@dataclass(frozen=True)
class Case:
    """A way to compute. way: segments or graph."""

    units: str
    way: str
    flash_attn: bool

    @property
    def name(self) -> str:
        return f"{self.units}, {self.way}{'' if self.flash_attn else ', no flash attention'}"


def cases() -> list[Case]:
    """The most worth first: all kinds with flash attention, then without."""
    units = model.UNITS[:1] if REHEARSE else model.UNITS
    return [Case(u, w, f) for f, u, w in product((True, False), units, ("segments", "graph"))]


def main() -> bool:
    MODELS.mkdir(exist_ok=True)
    wanted, found = cases(), {}
    files = {
        units: model.file(WORK / "model", units, MODELS) for units in {c.units for c in wanted}
    }
    with ThreadPoolExecutor(1 if REHEARSE else AT_ONCE) as pool:
        running = {pool.submit(compare, case, files[case.units]): case for case in wanted}
        for done in as_completed(running):
            found[running[done].name] = done.result()
            save("parity.json", {"cases": found, "expected": len(wanted)})
    print(table(found))
    return not any(result["failures"] for result in found.values())


def compare(case: Case, file: Path) -> dict:
    """Run a case in a process of its own: the library reads its environment once."""
    output = MODELS / f"{case.name}.npz"
    arguments = [case.units, str(file), str(int(case.flash_attn)), str(output)]
    # cuBLAS would multiply F32 in TF32
    env = environment(case.way) | {"NVIDIA_TF32_OVERRIDE": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command, limit = [sys.executable, __file__, *arguments], max(seconds_left(), 1)
    try:
        done = subprocess.run(command, env=env, timeout=limit, **pipes)
    except subprocess.TimeoutExpired:
        return {"failures": ["time was up"]}
    if done.returncode:
        said = last_words(done.stdout.decode("utf-8", "replace"))
        return {"failures": [f"ended with code {done.returncode}: {said}"]}
    a, b = np.load(WORK / "model" / f"{case.units}.npz"), np.load(output)
    units = [
        Unit(int(layer), str(kind), int(head) if head else None) for layer, kind, head in a["units"]
    ]
    sums = Sums(units, a["p"].tolist())
    logits = a["logits"].astype(np.float32)
    sums.add(logits, a["active"], a["score"], b["logits"], b["active"])
    bounds, figures, graphs = (
        ROUNDED if case.flash_attn else STRICT,
        sums.result(),
        float(b["graphs"]),
    )
    failures = judge(figures, bounds)
    if case.way == "graph" and graphs != 1:
        failures.append(f"{graphs:.1f} graphs a token where one was asked for")
    plain = {k: v if isinstance(v, list) else float(v) for k, v in figures.items()}
    return {"case": asdict(case), **plain, "graphs": graphs, "failures": failures}


def table(found: dict) -> str:
    head = ["parity", "graphs a token", "equal decisions", "KL", "agreeing tokens", "passed"]
    rows = [
        [
            name,
            r.get("graphs"),
            r.get("decision_agreement"),
            f"{r['mean_kl']:.1e}" if "mean_kl" in r else None,
            r.get("tokens_agreed"),
            "; ".join(r["failures"]) or "yes",
        ]
        for name, r in found.items()
    ]
    return format_table(head, rows)


def run(units: str, file: str, flash_attn: str, output: str) -> None:
    tokens = np.load(WORK / "model" / f"{units}.npz")["tokens"]
    np.savez(output, **model.evaluate(file, tokens, flash_attn == "1", GPU_LAYERS, THREADS))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(*sys.argv[1:])
    else:
        part(main)
