"""A benchmark's rows in the form of llama-bench, which compare-llama-bench.py reads.

    for row in llama_bench_rows(bench(...)):
        print(json.dumps(row))

One row is one variant's prefill (`pp512`: n_prompt 512) or decode (`tg64 @ d512`: n_gen 64, n_depth
512). The names of the fields are those of tools/llama-bench; fields that bench has no option for
have llama-bench's defaults. `variant`, `activation` and `kv_used_bytes` are ours, and programs of
llama.cpp leave them out.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mod_export.benchmark.measure import TAIL_STEPS, TURN_STEPS, Step
from mod_export.formats.gguf import GGUFFile
from mod_export.formats.kv_types import KVTypes

# Of tests that bench has no option for.
DEFAULTS = {
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "n_cpu_moe": 0,
    "split_mode": "layer",
    "main_gpu": 0,
    "no_kv_offload": False,
    "devices": "auto",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "auto",
    "lazy_mode": "auto",
    "embeddings": False,
    "no_op_offload": 0,
    "no_host": False,
    "repack": True,
    "fit_target": 0,
    "fit_min_ctx": 0,
}
COMMIT_LENGTH = 9  # all builds of a file need commits of one length


def llama_bench_rows(result: dict) -> Iterator[dict]:
    """A row for each phase, combination and variant of a result of bench().

    Batches of several sequences are left out: llama-bench has no such test.
    """
    models = {name: _model(Path(file["file"])) for name, file in result["about"]["files"].items()}
    for row in result["rows"]:
        if row["batch"] > 1:
            continue
        for variant in row["ms"]:
            yield _row(result["about"], models, row, variant)


def _model(path: Path) -> dict:
    tensors = GGUFFile.open(path).tensors.values()
    return {
        "model_filename": str(path),
        "model_size": sum(tensor.nbytes for tensor in tensors),
        "model_n_params": sum(int(np.prod(tensor.shape)) for tensor in tensors),
    }


def _row(about: dict, models: dict[str, dict], row: dict, variant: str) -> dict:
    stock = variant in about["stock_variants"]
    dense = stock or variant == "dense_patched"
    types, prefill = KVTypes.parse(row["kv_type"]), row["phase"] == "prefill"
    model = dict(models["dense" if dense else "mod"])
    if variant != "mod" and (not dense or variant in ("floor", "ceiling_split")):
        model["model_filename"] += f" ({variant})"  # files of one name are taken for one
    if row["shift"] and not dense:
        model["model_filename"] += f" (shift {row['shift']:g})"
    return {
        "build_commit": _commit(about["build_stock" if stock else "build_patched"], stock),
        "build_number": 0,
        "cpu_info": about["cpu"],
        "gpu_info": ", ".join(name for name, _ in about["gpus"]),
        "backends": "CUDA" if about["gpus"] else "CPU",
        **model,
        "model_type": about["descriptions"][variant],
        "n_batch": Step(row["context"], ubatch=row["ubatch"]).chunk,
        "n_ubatch": row["ubatch"],
        "n_threads": about["threads"],
        "type_k": types.k,
        "type_v": types.v,
        "n_gpu_layers": about["gpu_layers"],
        "flash_attn": int(row["flash_attn"]),
        **DEFAULTS,
        "n_prompt": row["context"] if prefill else 0,
        "n_gen": 0 if prefill else TAIL_STEPS,
        "n_depth": 0 if prefill else row["context"],
        "test_time": _utc(about["date"]),
        **_times(row, variant, prefill),
        "variant": variant,
        "activation": row.get("activation") if variant == "mod" else None,
        "kv_used_bytes": row["kv_bytes"][variant]["used"],
    }


def _times(row: dict, variant: str, prefill: bool) -> dict:
    """Nanoseconds of each repeat, and tokens per second.

    The first token of a turn of decode is not timed, and counts with the mean of the others.
    """
    tokens, untimed = (row["context"], 0) if prefill else (TAIL_STEPS, 1)
    factor = TURN_STEPS / (TURN_STEPS - untimed)
    ns = 1e6 * factor * np.asarray(row["raw_ms"][variant]).sum(1)
    speeds = 1e9 * tokens / ns
    return {
        "avg_ns": round(ns.mean()),
        "stddev_ns": round(_deviation(ns)),
        "avg_ts": speeds.mean(),
        "stddev_ts": _deviation(speeds),
        "samples_ns": [round(value) for value in ns],
        "samples_ts": speeds.tolist(),
    }


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _commit(build: dict, stock: bool) -> str:
    """llama.cpp's commit of a stock build; of a patched one the hash of its source and flags."""
    commit = build.get("flags", {}).get("LLAMA_BUILD_COMMIT", "unknown")
    name = commit if stock else build.get("name", commit).rpartition("-")[2]
    return f"{name:0<{COMMIT_LENGTH}}"[:COMMIT_LENGTH]


def _utc(date: str) -> str:
    """The local time of `about` as llama-bench writes times."""
    local = datetime.datetime.strptime(date, "%Y-%m-%d %H:%M").astimezone()
    return local.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
