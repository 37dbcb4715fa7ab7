"""Speed and KV memory of a MoD file against the dense one, each variant in a process of its own.

The variants take turns, so that a noisy machine disturbs all of them alike; figures are medians over the repeats
(a decode's figure within a repeat: the median over its tokens).

    rows = bench("mod.gguf", "dense.gguf", contexts=[512, 2048])
    print(report(rows))

Variants: ceiling (the dense file, stock library), dense_patched (the dense file, patched library), mod,
all_active and none_active (the MoD file with every unit forced), floor (a pruned dense file on the stock library
where one is given, else none_active).
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mod_export.errors import UserError
from mod_export.tables import format_table

VARIANTS = ("ceiling", "dense_patched", "mod", "all_active", "none_active")
FORCE = {"all_active": "active", "none_active": "inactive"}


class Worker:
    """A process that measures one variant at one context; see bench_worker."""

    def __init__(self, setup: dict, lib: Path | None):
        # LD_LIBRARY_PATH too: a user's own must not mix the libraries of two builds
        env = os.environ | ({"LLAMA_CPP_LIB_PATH": str(lib), "LD_LIBRARY_PATH": str(lib)} if lib else {})
        self.process = subprocess.Popen([sys.executable, "-m", "mod_export.bench_worker"], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.about = self._ask(setup)

    def run(self, **options) -> dict:
        return self._ask(options)

    def _ask(self, question: dict) -> dict:
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"a benchmark process ended with code {self.process.wait()}", "is there enough memory?")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"], answer["cure"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def bench(file, dense, contexts: list[int], repeats: int = 3, decode: int = 32, threads: int | None = None,
          ubatch: int = 512, text: str | None = None, floor=None, stock: Path | None = None,
          say: Callable = print) -> list[dict]:
    """Measures all variants. Returns two rows (prefill, decode) per context; see docs/runtime.md for the keys.

    text: the prompt's, by default the packaged one. floor: a pruned dense file. stock: directory of the stock
    library, by default the cached one, built if there is none.
    Times: ms for the whole prompt (prefill), ms per token (decode). Raises UserError for files that do not load,
    a MoD file without units, files that do not belong together.
    """
    from mod_export import bindings, data

    bindings.require()
    stock = stock or _stock_lib(say)
    text = text or "\n\n".join(data.default_texts())
    common = {"decode": decode, "threads": threads or len(os.sched_getaffinity(0)), "ubatch": ubatch, "text": text}
    rows = []
    for context in contexts:
        setups = {name: ({"file": str(dense if name in ("ceiling", "dense_patched") else file), "context": context,
                          "force": FORCE.get(name, "none"), **common}, stock if name == "ceiling" else None)
                  for name in VARIANTS}
        if floor:
            setups["floor"] = ({**setups["ceiling"][0], "file": str(floor)}, stock)
        workers = {}
        try:
            for name, (setup, lib) in setups.items():
                workers[name] = Worker(setup, lib)
            _check(workers, file, dense, context, say)
            rows += _rows(context, _measure(workers, repeats, say), common, repeats, (file, dense))
        finally:
            for worker in workers.values():
                worker.close()
    return rows


def _stock_lib(say: Callable) -> Path:
    from mod_export import llama_build

    return llama_build.stock_lib() or llama_build.build(stock=True, say=say)


def _check(workers: dict[str, Worker], file, dense, context: int, say: Callable) -> None:
    mod, ceiling = workers["mod"].about, workers["ceiling"].about
    if not mod["units"]:
        raise UserError(f"{file} is a dense model", "give a MoD file")
    if mod["n_vocab"] != ceiling["n_vocab"]:
        raise UserError(f"{file} and {dense} have different vocabularies", "give the dense file of the same model")
    if mod["description"] != ceiling["description"]:
        say(f"note: {file} is {mod['description']}, {dense} is {ceiling['description']}: the ceiling is not its own")
    if context > mod["n_ctx_train"]:
        say(f"note: context {context} is beyond the {mod['n_ctx_train']} of training: for timing only")


def _measure(workers: dict[str, Worker], repeats: int, say: Callable) -> dict[str, list[dict]]:
    """variant -> its runs; the variants take turns, in another order each time."""
    results: dict[str, list[dict]] = {name: [] for name in workers}
    for worker in workers.values():
        worker.run(warm_up=True)
    for repeat in range(repeats):
        names = list(workers)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            results[name].append(workers[name].run())
        r = results["mod"][-1]
        say(f"context {r['prefill']['tokens']}, repeat {repeat + 1} of {repeats}: MoD prefill "
            f"{r['prefill']['ms']:.0f} ms, decode {r['decode']['ms']:.2f} ms/token")
    return results


def _rows(context: int, results: dict[str, list[dict]], common: dict, repeats: int, files: tuple) -> list[dict]:
    rows = []
    for phase in ("prefill", "decode"):
        runs = {name: [r[phase]["ms"] for r in rs] for name, rs in results.items()}
        ms = {f"ms_{name}": statistics.median(times) for name, times in runs.items()}
        ms.setdefault("ms_floor", ms["ms_none_active"])
        last = results["mod"][-1][phase]
        a = last["activation"]
        tokens = context if phase == "prefill" else 1
        rows.append({
            "context": context, "phase": phase, "activation": a, **ms, "efficiency": efficiency(ms, a),
            "overhead_all_active": ms["ms_all_active"] / ms["ms_ceiling"],
            "overhead_none_active": ms["ms_none_active"] / ms["ms_floor"],
            "overhead_dense": ms["ms_dense_patched"] / ms["ms_ceiling"],
            "tokens_per_s_ceiling": 1e3 * tokens / ms["ms_ceiling"], "tokens_per_s_mod": 1e3 * tokens / ms["ms_mod"],
            "kv_bytes_dense": last["kv_dense"], "kv_bytes_committed": last["kv_committed"],
            "kv_bytes_used": last["kv_used"],
            "spread": {name: (max(t) - min(t)) / statistics.median(t) for name, t in runs.items()},
            "rss_peak_bytes": {name: max(r["rss_peak"] for r in rs) for name, rs in results.items()},
            "repeats": repeats, "threads": common["threads"], "ubatch": common["ubatch"],
            "decode_tokens": common["decode"], "file": str(files[0]), "dense": str(files[1]), **_about(),
        })
    return rows


def efficiency(ms: dict[str, float], activation: float) -> float | None:
    """Time saved against time that could be saved at this activation; None where nothing can be saved.

    (T_ceiling - T_mod) / ((1 - a) (T_ceiling - T_floor)); 1 means time proportional to work.
    """
    possible = (1 - activation) * (ms["ms_ceiling"] - ms["ms_floor"])
    return (ms["ms_ceiling"] - ms["ms_mod"]) / possible if possible > 0 else None


def _about() -> dict:
    """What the figures hold for."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv[1:])}


def report(rows: list[dict], markdown: bool = False) -> str:
    """The rows as two tables: times and efficiency, memory."""
    times = [[r["context"], r["phase"], round(r["activation"], 3),
              *(round(r[f"ms_{v}"], 2) for v in ("ceiling", "dense_patched", "all_active", "mod", "none_active")),
              round(r["ms_floor"], 2), _round(r["efficiency"]), round(r["tokens_per_s_ceiling"], 1),
              round(r["tokens_per_s_mod"], 1)] for r in rows]
    head = ["context", "phase", "activation", "dense, stock", "dense, patched", "all active", "MoD", "none active",
            "floor", "efficiency", "dense tok/s", "MoD tok/s"]
    memory = [[r["context"], r["phase"], *(round(r[f"kv_bytes_{k}"] / 1e6, 2) for k in ("dense", "used", "committed")),
               round(r["kv_bytes_used"] / r["kv_bytes_dense"], 3),
               *(round(r["rss_peak_bytes"][v] / 1e6) for v in ("ceiling", "mod"))] for r in rows]
    memory_head = ["context", "phase", "KV dense MB", "KV used MB", "KV committed MB", "used/dense",
                   "dense peak RSS MB", "MoD peak RSS MB"]
    return "\n".join(["Time: ms per prompt (prefill), ms per token (decode); medians", "",
                      format_table(head, times, markdown), "", "Memory", "",
                      format_table(memory_head, memory, markdown)])


def _round(x: float | None) -> float | None:
    return None if x is None else round(x, 3)
