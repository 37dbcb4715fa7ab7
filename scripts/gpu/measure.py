"""Measure the lanes of one plan; the result, PLAN.json, is written again after each row.

    python scripts/gpu/measure.py decode

A row is a lane at one ubatch, force and context: the time to read the prompt, the time of a decoded
token, K/V and GPU memory, and the runtime's counters. Lanes that fit into the GPU's memory together
stay loaded side by side. A lane that does not fit alone, or fails, is noted and passed over. A row
that is not likely to end in time is not begun.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
from common import GPU_LAYERS, REHEARSE, THREADS, environment, part, save, seconds_left
from plans import PLANS, Lane, Plan, path_of

from mod_export.benchmark import grouping
from mod_export.benchmark.processes import Worker
from mod_export.common.text import size
from mod_export.errors import UserError
from mod_export.formats.gguf import GGUFFile

F16 = (1, 1)  # types of K and V
PATIENCE = 1.3  # how much longer than the slowest row of its context a row may take


class Measurement:
    """The rows of a plan so far, and what has failed: lane -> why."""

    def __init__(self, name: str):
        self.name, self.plan = name, PLANS[name]
        self.rows: list[dict] = []
        self.failures: dict[str, str] = {}
        self.left_out = 0
        self.slowest: dict[int, float] = {}  # context -> seconds of a row

    def run(self) -> bool:
        for group in self.groups():
            workers = self.start(group)
            try:
                for ubatch in self.plan.ubatches:
                    for lane in list(workers):
                        self.attempt(workers, lane, self.open, ubatch)
                    for force in self.plan.forces:
                        self.rows_of(workers, ubatch, force)
            finally:
                for worker in workers.values():
                    worker.close()
        self.save()
        return bool(self.rows) and not self.failures

    def groups(self) -> list[list[Lane]]:
        """Lanes that fit side by side, as many as possible at once."""
        free, groups, taken = memory(), [], 0
        for lane in self.plan.lanes:
            need = bytes_of(self.plan, lane)
            if need > free:
                self.fail(lane, f"does not fit: about {size(need)}, {size(free)} are free")
                continue
            if not groups or taken + need > free:
                groups, taken = [*groups, []], 0
            groups[-1].append(lane)
            taken += need
        return groups

    def start(self, group: list[Lane]) -> dict[Lane, Worker]:
        """Load the models, all at once; the order of the plan stays."""

        def load(lane: Lane) -> Worker | None:
            file = str(path_of(self.plan.shape, lane.model))
            setup = {"file": file, "gpu_layers": GPU_LAYERS, "threads": THREADS}
            try:
                return Worker(lane.name, setup, module="lane", env=environment(lane.way))
            except UserError as exc:
                self.fail(lane, exc.message)
                return None

        with ThreadPoolExecutor(len(group)) as pool:
            loaded = dict(zip(group, pool.map(load, group), strict=True))
        return {lane: worker for lane, worker in loaded.items() if worker}

    def attempt(self, workers: dict[Lane, Worker], lane: Lane, what, *args):
        """The result of what(lane, worker, ...); a lane that fails takes no more part."""
        try:
            return what(lane, workers[lane], *args)
        except UserError as exc:
            self.fail(lane, exc.message)
            workers.pop(lane).close()
            return None

    def open(self, lane: Lane, worker: Worker, ubatch: int) -> None:
        """Open a context, and keep what it takes of the GPU's memory."""
        before = worker.about.get("vram", 0)
        # llama.cpp decodes dense sequences faster where each has a K/V stream of its own
        unified = lane.model not in ("dense", "pruned")
        where = {"context": self.plan.contexts[-1], "batch": self.plan.batch, "ubatch": ubatch}
        after = worker.ask(do="open", unified=unified, **where).get("vram", 0)
        worker.about |= {"vram": after, "opened_at": before}

    def rows_of(self, workers: dict[Lane, Worker], ubatch: int, force: str) -> None:
        """One row for each lane and context; a lane goes on from one context to the next."""
        for number, context in enumerate(self.plan.contexts):
            for lane in list(workers):
                if force not in lane.forces(self.plan.forces):
                    continue
                if seconds_left() < PATIENCE * self.slowest.get(context, 0.0):
                    self.left_out += 1
                    continue
                before = seconds_left()
                start = self.plan.contexts[number - 1] if number else 0
                row = self.attempt(workers, lane, self.row, force, start, context)
                if row:
                    self.rows.append(asdict(lane) | {"lane": lane.name, "ubatch": ubatch} | row)
                    self.slowest[context] = max(
                        self.slowest.get(context, 0.0), before - seconds_left()
                    )
                    self.save()

    def row(self, lane: Lane, worker: Worker, force: str, start: int, end: int) -> dict:
        for _ in range(self.plan.fills):
            if start == 0:
                worker.ask(do="begin", force=force)
            fill = worker.ask(do="fill", start=start, end=end)
        steps = worker.ask(do="steps", n=self.plan.steps)
        decoded = self.plan.batch * self.plan.steps
        return {
            "force": force,
            "context": end,
            "batch": self.plan.batch,
            "prefill_tokens_per_s": 1e3 * fill["tokens"] / sum(fill["ms"]),
            "prefill_ms": sum(fill["ms"]),
            "ms": float(np.median(steps["ms"])),
            "quartiles_ms": np.quantile(steps["ms"], (0.25, 0.75)).tolist(),
            "activation": steps["activation"],
            "prefill_activation": fill["activation"],
            # what the runtime counts, for each step
            "perf": {key: value / self.plan.steps for key, value in steps["perf"].items()},
            "prefill_perf": fill["perf"],
            "kv_bytes": steps["kv"],
            "vram": steps.get("vram"),
            "context_vram": steps.get("vram", 0) - worker.about["opened_at"],
            "decoded": decoded,
        }

    def fail(self, lane: Lane, why: str) -> None:
        self.failures[lane.name] = why
        print(f"{self.name}, {lane.name}: {why}", flush=True)
        self.save()

    def save(self) -> None:
        save(
            f"{self.name}.json",
            {
                "plan": asdict(self.plan),
                "rows": self.rows,
                "failures": self.failures,
                "left_out": self.left_out,
            },
        )


def memory() -> int:
    """Bytes that the lanes may take together; a rehearsal can pretend to have little."""
    return int(os.environ.get("MOD_REHEARSE_BYTES") or grouping.available_memory(not REHEARSE))


def bytes_of(plan: Plan, lane: Lane) -> int:
    file = GGUFFile.open(path_of(plan.shape, lane.model))
    tokens = plan.batch * plan.contexts[-1]
    kv = grouping.dense_bytes(file, tokens, F16, plan.ubatches[-1], plan.batch)
    return grouping.process_bytes(file, kv, not REHEARSE)


if __name__ == "__main__":
    part(Measurement(sys.argv[1]).run)
