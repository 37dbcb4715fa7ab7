"""Where the time of the worst row of `decode` goes; the result is profile.json.

The stages are timestamps of the runtime: forming batches, K/V cells, building graphs, inputs,
running, reading back. Where torch sees the GPU, its profiler adds the time of each kernel. Where
nsys is on the PATH, OUT/profile.nsys-rep has everything.
"""

import json
import shutil
import subprocess
import sys

from common import GPU_LAYERS, OUT, REHEARSE, THREADS, environment, part, save, seconds_left
from plans import PLANS, path_of

from mod_export.common.tables import format_table
from mod_export.errors import UserError

PLAN = PLANS["decode"]
STEPS, TOP = 16, 25


def main() -> bool:
    row = worst(json.loads((OUT / "decode.json").read_text())["rows"])
    target = OUT / "profile.json"
    command = [sys.executable, __file__, json.dumps(row), str(target)]
    nsys = None if REHEARSE else shutil.which("nsys")
    if nsys:
        options = ["--force-overwrite", "true", "-o", str(OUT / "profile")]
        command = [nsys, "profile", *options, *command]
    try:
        subprocess.run(command, env=environment(row["way"]), check=True, timeout=seconds_left())
    except subprocess.SubprocessError as exc:
        raise UserError("the profiled run failed or had no time", "see call.log") from exc
    found = json.loads(target.read_text())
    save("profile.json", found)
    print(f"{row['lane']}, {row['force']}, {row['context']} tokens: {found['ms']:.3f} ms a token")
    print(format_table(["stage", "ms"], list(found["stages"].items())))
    print(format_table(["kernel", "ms a token", "launches a token"], found["kernels"][:TOP]))
    return True


def worst(rows: list[dict]) -> dict:
    """The row of a MoD model that takes longest beside the dense one of its context."""
    dense = {row["context"]: row["ms"] for row in rows if row["model"] == "dense"}
    others = [r for r in rows if r["model"] not in ("dense", "pruned") and r["context"] in dense]
    if not others:
        raise UserError("decode has no rows to choose from", "run the part decode first")
    return max(others, key=lambda row: row["ms"] / dense[row["context"]])


def profile(row: str, target: str) -> None:
    """Run the row again, some steps under the profiler, and write what it says."""
    from lane import Lane

    at = json.loads(row)
    lane = Lane(str(path_of(PLAN.shape, at["model"])), GPU_LAYERS, THREADS)
    lane.open(at["context"], 1, at["ubatch"], at["model"] != "dense")
    lane.begin(at["force"])
    lane.fill(0, at["context"])
    plain = lane.steps(STEPS)
    stages = {
        name.removeprefix("us_"): value / STEPS / 1e3
        for name, value in plain["perf"].items()
        if name.startswith("us_")
    }
    result = {"row": at, "ms": sum(plain["ms"]) / STEPS, "stages": stages, "kernels": kernels(lane)}
    with open(target, "w") as file:
        json.dump(result, file)


def kernels(lane) -> list[tuple[str, float, float]]:
    """(name, ms, launches) of a step, for each kernel, the longest first; empty without torch."""
    try:
        import torch
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler
    except ImportError:
        return []
    if REHEARSE or not torch.cuda.is_available():
        return []
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        lane.steps(STEPS)
        torch.cuda.synchronize()
    steps = STEPS + 1
    events = [
        (e.key, e.device_time_total / steps / 1e3, e.count / steps) for e in seen.key_averages()
    ]
    return sorted(events, key=lambda event: -event[1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        profile(*sys.argv[1:])
    else:
        part(main)
