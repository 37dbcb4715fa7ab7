"""Measure how fast decode, prefill and training are beside other processes.

First the threads that follow the load take turns with a fixed number, in one process on the quiet
machine. Then busy loops take processors, and where the control groups of this machine can be
written to, a quota takes half of them. There the ways to choose threads take turns in processes of
their own.

    python -m scripts.studies.neighbours quickstart/mod.gguf --out neighbours

Run it alone on a machine. Each run is a row of OUT/rows.jsonl; OUT/table.md has the medians.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from mod_export.common.system import bound_spinning, cpu_name, usable_cpus
from mod_export.common.tables import format_table
from scripts.studies import rows

PROMPT_TOKENS = 512
BUSY = "while True: pass"
CGROUP = Path("/sys/fs/cgroup")
TRAINED_TOKENS = 256
QUIET_TURNS, QUIET_TOKENS = 20, 60

# name -> (what runs, threads or None for the default, whether spinning is bounded)
WAYS = {
    "runtime, default": ("runtime", None, False),
    "runtime, all threads": ("runtime", -1, False),
    "runtime, 1 thread": ("runtime", 1, False),
    "torch, default": ("torch", None, True),
    "torch, unbounded spinning": ("torch", None, False),
    "torch, 1 thread": ("torch", 1, False),
}


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--rounds", default=5, show_default=True, help="Turns of each way.")
@click.option("--seconds", default=4.0, show_default=True, help="Of decode or training, per turn.")
@click.option("--neighbours", default="0,1,2", show_default=True, help="Numbers of busy loops.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of results.")
@click.option("--measure", hidden=True, help="Measure one way in this process.")
def main(file, rounds, seconds, neighbours, out, measure):
    """Write OUT/rows.jsonl and OUT/table.md."""
    if measure:
        print(json.dumps(run_way(measure, file, seconds)))
        return
    out.mkdir(parents=True, exist_ok=True)
    quiet = report_quiet(file)
    print(quiet)
    surroundings = [(f"{n} busy", int(n), None) for n in neighbours.split(",")]
    if quota_groups():
        surroundings.append(("quota of half", 0, usable_cpus() / 2))
    for turn in range(rounds):
        for name, busy, quota in surroundings:
            for way in WAYS if turn % 2 else reversed(WAYS):
                with busy_loops(busy):
                    figures = in_process(way, file, seconds, quota)
                rows.append(out / "rows.jsonl", {"beside": name, "way": way, **figures})
    table = report(rows.read(out / "rows.jsonl"))
    head = f"{cpu_name()}, {usable_cpus()} processors\n\n{quiet}\n\n"
    (out / "table.md").write_text(f"{head}{table}\n")
    print(table)


def report_quiet(file: str) -> str:
    """A table: threads that follow the load against a fixed number, in turns in one process."""
    from mod_export.data.text import default_texts
    from mod_export.runtime import MoDLlama, bindings

    llm = MoDLlama(file, n_ctx=2 * PROMPT_TOKENS)
    tokens = llm.tokenize(default_texts()[0].encode())[:PROMPT_TOKENS]
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(QUIET_TURNS):
        seconds: dict[bool, tuple[float, float]] = {}
        for adaptive in (True, False) if turn % 2 else (False, True):
            bindings.llama_mod_set_adaptive_threads(llm.ctx, adaptive)
            llm.reset()
            start = time.perf_counter()
            llm.eval(tokens)
            read = time.perf_counter()
            for token in tokens[:QUIET_TOKENS]:
                llm.eval([token])
            seconds[adaptive] = (read - start, time.perf_counter() - read)
        for what, ours, fixed in zip(ratios, seconds[True], seconds[False], strict=True):
            ratios[what].append(fixed / ours)
    llm.close()
    rows_ = [[what, *statistics.quantiles(found)] for what, found in ratios.items()]
    return format_table(
        ["quiet, speed / that of a fixed number", "quartile", "median", "quartile"], rows_
    )


def run_way(way: str, file: str, seconds: float) -> dict:
    """Figures of one way, in tokens per second."""
    kind, threads, bounded = WAYS[way]
    if bounded:
        bound_spinning()
    threads = usable_cpus_of_machine() if threads == -1 else threads
    return (run_runtime if kind == "runtime" else run_torch)(file, threads, seconds)


def usable_cpus_of_machine() -> int:
    """Processors without regard to a quota."""
    return len(os.sched_getaffinity(0))


def run_runtime(file: str, threads: int | None, seconds: float) -> dict:
    """Speed of prefill and of decode, and the threads of the last graph."""
    from mod_export.data.text import default_texts
    from mod_export.runtime import MoDLlama

    llm = MoDLlama(file, n_ctx=2 * PROMPT_TOKENS, threads=threads)
    tokens = llm.tokenize(default_texts()[0].encode())[:PROMPT_TOKENS]
    llm.eval(tokens[:32])  # pages of the file
    llm.reset()
    start = time.perf_counter()
    llm.eval(tokens)
    prefill = PROMPT_TOKENS / (time.perf_counter() - start)
    start, decoded = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        if llm.n_tokens == llm.n_ctx():
            llm.n_tokens = PROMPT_TOKENS
        llm.eval([tokens[decoded % PROMPT_TOKENS]])
        decoded += 1
    return {"decode": decoded / spent, "prefill": prefill, "threads": llm.running_threads}


def run_torch(_file: str, threads: int | None, seconds: float) -> dict:
    """Speed of training steps of a model of eight layers as wide as SmolLM2's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=8192,
        )
    )
    ids = torch.randint(0, 8192, (1, TRAINED_TOKENS))
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
        times.append(time.perf_counter() - began)
    return {"train": TRAINED_TOKENS / statistics.median(times), "threads": torch.get_num_threads()}


def in_process(way: str, file: str, seconds: float, quota: float | None) -> dict:
    """Measure a way in a process of its own, under a quota of processors if there is one."""
    command = [sys.executable, "-m", "scripts.studies.neighbours", file, "--out", ".", "--measure"]
    command += [way, "--seconds", str(seconds)]
    with quota_group(quota) as joined:
        result = subprocess.run(
            command, check=True, capture_output=True, text=True, preexec_fn=joined
        )
    return json.loads(result.stdout.splitlines()[-1])


@contextlib.contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """Run n processes that never rest."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def quota_groups() -> Path | None:
    """The folder where a group with a quota can be made, None where this process may not."""
    for folder, name in ((CGROUP / "cpu", "cpu.shares"), (CGROUP, "cgroup.subtree_control")):
        if os.access(folder, os.W_OK) and (folder / name).exists():
            return folder
    return None


@contextlib.contextmanager
def quota_group(quota: float | None) -> Iterator:
    """Yield a function with which a new process joins a group that has a quota of processors."""
    if quota is None:
        yield None
        return
    group = quota_groups() / f"mod-export-{os.getpid()}"
    group.mkdir()
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{int(quota * 100000)} 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text(str(int(quota * 100000)))
        yield lambda: (group / "cgroup.procs").write_text("0")
    finally:
        group.rmdir()


def report(measured: list[dict]) -> str:
    """A table of the medians, and of their ratio to the quiet machine with all threads."""
    found: dict[tuple, list] = {}
    for row in measured:
        for what in ("decode", "prefill", "train"):
            if what in row:
                found.setdefault((what, row["way"], row["beside"]), []).append(row[what])
    medians = {key: statistics.median(values) for key, values in found.items()}
    lines = []
    for (what, way, beside), value in medians.items():
        kind = way.partition(",")[0]
        baseline = "all threads" if kind == "runtime" else "unbounded spinning"
        quiet = medians.get((what, f"{kind}, {baseline}", "0 busy"))
        lines.append([what, beside, way, value, quiet and value / quiet])
    return format_table(["", "beside", "way", "tokens/s", "of quiet, all threads"], sorted(lines))


if __name__ == "__main__":
    main()
