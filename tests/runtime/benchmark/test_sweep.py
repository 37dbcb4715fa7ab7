"""The sweep over thresholds, its divergence from the dense model, and the plots."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mod_export.benchmark import plots as bench_plots
from mod_export.benchmark import report as bench_report
from mod_export.benchmark import run as bench_run
from mod_export.benchmark import sweep
from mod_export.common.text import result_as_json
from mod_export.config import MoDConfig, UnitConfig
from mod_export.errors import UserError
from mod_export.export import write_routers
from mod_export.formats import hub
from mod_export.formats.gguf import GGUFFile
from mod_export.runtime import bindings
from tests.runtime.benchmark.test_run import make
from tests.support.c_api import stock_lib

patched = pytest.mark.skipif(
    not bindings.patched(), reason="needs the patched llama.cpp: run `mod-export build`"
)
OPTIONS = {"contexts": (64,), "rounds": 1, "seconds": 0, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def swept(folder):
    """A file with a vocabulary, and its sweep."""
    rng, layers = np.random.default_rng(0), range(3, 28)
    half = [0.5 * (layer in layers) for layer in range(30)]
    routers = {
        (i, "attn"): (rng.standard_normal(576, np.float32) / 24, np.zeros(1, np.float32))
        for i in layers
    }
    units = {"attn": UnitConfig(tuple(half), tuple(1 - x for x in half))}
    path = folder / "attn.gguf"
    write_routers(GGUFFile.open(hub.embedded_gguf()), path, MoDConfig(units=units), routers)
    return sweep.sweep(
        path,
        hub.embedded_gguf(),
        bench_run.BenchOptions(**OPTIONS),
        (1.0, 0.6, 0.1),
        stock=stock_lib(),
        length=64,
        sequences=1,
    )


@patched
def test_sweep(swept):
    rows = swept["sweep"]
    held_out = [row["activation_held_out"] for row in rows]
    assert held_out == pytest.approx([1, 0.6, 0.1], abs=0.02)
    assert [row["shift"] for row in rows] == sorted(row["shift"] for row in rows)
    assert 0 <= rows[0]["kl"] < 1e-6 < 0.1 < rows[1]["kl"] < rows[2]["kl"]
    assert rows[0]["top1_agreement"] == 1 > rows[1]["top1_agreement"] > rows[2]["top1_agreement"]
    kv = [row["kv_share_decode"] for row in rows]
    assert kv[0] == 1 > kv[1] > kv[2]
    for row in rows:
        assert row["ms_decode_mod"] > 0 and row["ms_prefill_ceiling"] > 0
    table = bench_report.tables(swept)
    assert "same best token" in table and len(swept["rows"]) == 6
    assert json.loads(result_as_json(swept)) == swept


@patched
def test_sweep_of_a_file_without_a_vocabulary(folder):
    mod, dense = make(folder, "block")
    options = bench_run.BenchOptions(**OPTIONS, shifts=(0.0, 50.0))
    result = sweep.sweep(mod, dense, options, None, stock=stock_lib())
    assert [(row["shift"], row["kl"]) for row in result["sweep"]] == [(0.0, None), (50.0, None)]
    assert "No KL" in bench_report.tables(result)
    with pytest.raises(UserError, match="needs the variants ceiling and mod"):
        sweep.sweep(
            mod,
            dense,
            bench_run.BenchOptions(**OPTIONS, variants=("mod",)),
            None,
            stock=stock_lib(),
        )


def colours(path) -> int:
    import matplotlib.pyplot as plt

    return len(np.unique(plt.imread(path)[..., :3].reshape(-1, 3), axis=0))


@patched
def test_plots(swept, folder, tmp_path):
    drawn = bench_plots.draw(swept, tmp_path / "sweep")
    assert [p.name for p in drawn] == ["latency_activation.png", "speed_quality.png"]
    mod, dense = make(folder, "block")
    rows = bench_run.bench(
        mod, dense, bench_run.BenchOptions(**OPTIONS, batches=(1, 2)), stock=stock_lib()
    )
    drawn += bench_plots.draw(rows, tmp_path / "bench")
    names = {p.name for p in drawn[2:]}
    assert names == {
        f"{x}-batch-{n}.png"
        for x in ("latency_context", "memory_context", "ratios_context")
        for n in (1, 2)
    } | {"latency_batch.png"}
    for path in drawn:
        assert colours(path) > 50 and path.stat().st_size > 10_000
    with pytest.raises(UserError, match="exists already"):
        bench_plots.draw(rows, tmp_path / "bench")
    bench_plots.draw(rows, tmp_path / "bench", force=True)


@patched
def test_contexts_are_drawn_where_they_lie(folder, tmp_path):
    """Two contexts give lines, their ends at the contexts."""
    mod, dense = make(folder, "block")
    result = bench_run.bench(
        mod,
        dense,
        bench_run.BenchOptions(**OPTIONS | {"contexts": (64, 128)}, variants=("ceiling", "mod")),
        stock=stock_lib(),
    )
    figure = bench_plots.latency_context(result["rows"], "title")
    lines = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert list(lines["MoD"].get_xdata()) == [64, 128]
    assert list(lines["MoD"].get_ydata()) == [
        r["ms"]["mod"] for r in result["rows"] if r["phase"] == "decode"
    ]


@patched
def test_ctrl_c_ends_the_processes(folder, tmp_path):
    mod, dense = make(folder, "block")
    stock_lib()
    command = [
        sys.executable,
        "-m",
        "mod_export",
        "bench",
        mod,
        "--dense",
        dense,
        "--contexts",
        "4096",
        "--threads",
        1,
        "--rounds",
        "1000",
        "--json",
        tmp_path / "rows.json",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    children, start = [], time.monotonic()
    while len(children) < 6 and time.monotonic() - start < 60:
        time.sleep(0.2)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
            children = f.read().split()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read().splitlines()[-1] == "error: interrupted"
    assert len(children) == 6
    # one that was just being started ends by itself when it finds its pipe closed
    while (
        left := [child for child in children if os.path.exists(f"/proc/{child}")]
    ) and time.monotonic() - start < 90:
        time.sleep(0.1)
    assert not left
    assert not list(tmp_path.iterdir())
